"""Every error torch raises for bad input is raised here, of the same type, and says which argument is wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import plain
import pytest
import torch
import torch.nn.functional as torch_functional

import fused_losses
import fused_losses.functional as F


@dataclass(frozen=True)
class Bad:
    """A call that torch refuses; our message holds every one of `words`."""

    name: str
    make: Callable[[], dict[str, Any]]
    words: tuple[str, ...]


class BadValue(Bad):
    """Nothing but a number in a tensor is wrong: on a GPU a device-side assertion (test_cuda.py), found later."""


def logits(*shape: int) -> torch.Tensor:
    return torch.zeros(shape or (4, 5))


def index(*values: int) -> torch.Tensor:
    return torch.tensor(values or (0, 1, 2, 3))


def ce(**options: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {"input": logits(), "target": index()} | options


def soft_ce(**options: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {"input": logits(), "target": torch.rand(4, 5)} | options


def bce(**options: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {"input": torch.full((4, 5), 0.5), "target": torch.full((4, 5), 0.25)} | options


CROSS_ENTROPY = [
    BadValue("index too large", ce(target=index(0, 1, 2, 5)), ("target", "5")),
    BadValue("index negative", ce(target=index(0, 1, 2, -1)), ("target", "-1")),
    BadValue("index -100 not ignored", ce(target=index(0, 1, 2, -100), ignore_index=1), ("target", "-100")),
    BadValue("uint8 index too large", ce(target=index(0, 1, 2, 200).to(torch.uint8)), ("target", "200")),
    BadValue(
        "index too large in an image",
        ce(input=logits(2, 5, 3), target=torch.full((2, 3), 7)),
        ("target", "7"),
    ),
    BadValue("index too large in one row", ce(input=logits(5), target=torch.tensor(7)), ("target", "7")),
    BadValue("index huge", ce(target=index(0, 1, 2, 2**62)), ("target", str(2**62))),
    Bad("fewer targets than rows", ce(target=index(0, 1, 2)), ("target", "3", "4")),
    Bad(
        "target of another image size",
        ce(input=logits(2, 5, 3), target=torch.zeros(2, 4).long()),
        ("target", "4"),
    ),
    Bad("target without image dimensions", ce(input=logits(2, 5, 3), target=index(0, 1)), ("target", "2")),
    Bad("target of one row too long", ce(input=logits(5), target=index(0, 1)), ("target", "2")),
    Bad("zero-dimensional input", ce(input=torch.tensor(1.0), target=torch.tensor(0)), ("input", "()")),
    BadValue("no classes", ce(input=logits(3, 0), target=index(0, 0, 0)), ("input", "0")),
    *(
        Bad(f"target {dtype}", ce(target=index().to(dtype)), ("target", str(dtype)))
        for dtype in (torch.int32, torch.int16, torch.int8, torch.bool, torch.float32, torch.complex64)
    ),
    *(
        Bad(f"input {dtype}", ce(input=logits().to(dtype)), ("input", str(dtype)))
        for dtype in (torch.int64, torch.bool, torch.complex64)
    ),
    Bad("probabilities of another shape", ce(target=torch.rand(4, 6)), ("target", "6")),
    Bad("integer probabilities", ce(target=torch.ones(4, 5).long()), ("target", "torch.int64")),
    Bad("reduction", ce(reduction="avg"), ("reduction", "avg")),
    Bad("reduction None", ce(reduction=None), ("reduction", "None")),
    Bad("reduction upper case", ce(reduction="MEAN"), ("reduction", "MEAN")),
    Bad("label_smoothing too large", ce(label_smoothing=1.5), ("label_smoothing", "1.5")),
    Bad("label_smoothing too large, soft", soft_ce(label_smoothing=1.5), ("label_smoothing", "1.5")),
    Bad("label_smoothing a string", ce(label_smoothing="a"), ("label_smoothing", "a")),
    Bad("weight too short", ce(weight=torch.ones(4)), ("weight", "4", "5")),
    Bad("weight too short, soft", soft_ce(weight=torch.ones(4)), ("weight", "4", "5")),
    Bad("weight in two dimensions", ce(weight=torch.ones(1, 5)), ("weight", "(1, 5)")),
    Bad("weight float64", ce(weight=torch.ones(5).double()), ("weight", "torch.float64")),
    Bad("weight int64", ce(weight=torch.ones(5).long()), ("weight", "torch.int64")),
    Bad("weight a list", ce(weight=[1.0] * 5), ("weight", "[1.0")),
    Bad("weight needs a gradient", ce(weight=torch.ones(5).requires_grad_()), ("weight",)),
    Bad("input a list", ce(input=[[1.0, 2.0]]), ("input", "list")),
    Bad("target an int", ce(target=3), ("target", "int")),
    Bad("target a list", ce(target=[0, 1, 2, 3]), ("target", "list")),
    Bad("target None", ce(target=None), ("target", "None")),
    Bad("ignore_index a float", ce(ignore_index=1.5), ("ignore_index",)),
    Bad("ignore_index with probabilities", soft_ce(ignore_index=2), ("ignore_index",)),
    Bad("unknown argument", ce(alpha=1), ("alpha",)),
]

WITH_LOGITS = [
    Bad("target of another shape", bce(target=torch.rand(4, 4)), ("target", "4", "5")),
    Bad("target to broadcast", bce(target=torch.rand(1, 5)), ("target", "1", "5")),
    Bad("weight of another shape", bce(weight=torch.ones(4)), ("weight", "4", "5")),
    Bad("weight of more dimensions", bce(weight=torch.ones(2, 4, 5)), ("weight", "2", "4", "5")),
    Bad("pos_weight of another shape", bce(pos_weight=torch.ones(4)), ("pos_weight", "4", "5")),
    Bad("pos_weight of more dimensions", bce(pos_weight=torch.ones(2, 4, 5)), ("pos_weight", "2", "4", "5")),
    Bad("weight a number", bce(weight=2.0), ("weight", "2.0")),
    Bad("pos_weight a number", bce(pos_weight=2.0), ("pos_weight", "2.0")),
    Bad("weight needs a gradient", bce(weight=torch.ones(5).requires_grad_()), ("weight",)),
    Bad("pos_weight needs a gradient", bce(pos_weight=torch.ones(5).requires_grad_()), ("pos_weight",)),
    *(
        Bad(f"target {dtype}", bce(target=torch.ones(4, 5).to(dtype)), ("target", str(dtype)))
        for dtype in (torch.int64, torch.bool, torch.uint8)
    ),
    *(
        Bad(f"input {dtype}", bce(input=torch.ones(4, 5).to(dtype)), ("input", str(dtype)))
        for dtype in (torch.int64, torch.bool, torch.complex64)
    ),
    Bad("reduction", bce(reduction="avg"), ("reduction", "avg")),
    Bad("target a list", bce(target=[1.0]), ("target", "list")),
    Bad("input a list", bce(input=[1.0]), ("input", "list")),
    Bad("target None", bce(target=None), ("target", "None")),
]

PROBABILITIES = [
    BadValue("input above 1", bce(input=torch.full((4, 5), 1.5)), ("input", "1.5")),
    BadValue("input below 0", bce(input=torch.full((4, 5), -0.25)), ("input", "-0.25")),
    BadValue("input nan", bce(input=torch.full((4, 5), float("nan"))), ("input", "nan")),
    BadValue("target above 1", bce(target=torch.full((4, 5), 1.5)), ("target", "1.5")),
    BadValue("target nan", bce(target=torch.full((4, 5), float("nan"))), ("target", "nan")),
    Bad("target of another shape", bce(target=torch.rand(1, 5)), ("target", "1", "5")),
    Bad("weight of another shape", bce(weight=torch.ones(4)), ("weight", "4", "5")),
    Bad("weight of more dimensions", bce(weight=torch.ones(2, 4, 5)), ("weight", "2", "4", "5")),
    Bad("weight a number", bce(weight=2.0), ("weight", "2.0")),
    Bad("weight needs a gradient", bce(weight=torch.ones(5).requires_grad_()), ("weight",)),
    *(
        Bad(f"target {dtype}", bce(target=torch.ones(4, 5).to(dtype)), ("target", str(dtype)))
        for dtype in (torch.int64, torch.float64, torch.bfloat16, torch.complex64)
    ),
    *(
        Bad(f"input {dtype}", bce(input=torch.ones(4, 5).to(dtype)), ("input", str(dtype)))
        for dtype in (torch.int64, torch.float64, torch.bfloat16, torch.complex64)
    ),
    Bad("reduction", bce(reduction="avg"), ("reduction", "avg")),
    Bad("target a list", bce(target=[1.0]), ("target", "list")),
    Bad("input a list", bce(input=[1.0]), ("input", "list")),
]


def focal(**options: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {"inputs": torch.zeros(4, 5), "targets": torch.zeros(4, 5)} | options


SIGMOID_FOCAL = [
    Bad("targets of another shape", focal(targets=torch.rand(4, 4)), ("targets", "4", "5")),
    Bad("reduction", focal(reduction="avg"), ("reduction", "avg")),
    Bad("inputs a list", focal(inputs=[1.0]), ("inputs", "list")),
    Bad("targets a list", focal(targets=[1.0]), ("targets", "list")),
]

SOFTMAX_FOCAL = [
    BadValue("index too large", ce(target=index(0, 1, 2, 5)), ("target", "5")),
    BadValue("index negative", ce(target=index(0, 1, 2, -1)), ("target", "-1")),
    Bad("fewer targets than rows", ce(target=index(0, 1, 2)), ("target", "3", "4")),
    Bad(
        "target of another image size",
        ce(input=logits(2, 5, 3), target=torch.zeros(2, 4).long()),
        ("target", "4"),
    ),
    Bad("target int32", ce(target=index().int()), ("target", "torch.int32")),
    Bad("input int64", ce(input=logits().long()), ("input", "torch.int64")),
    Bad("reduction", ce(reduction="avg"), ("reduction", "avg")),
    Bad("input a list", ce(input=[[1.0]]), ("input", "list")),
    Bad("target a list", ce(target=[0]), ("target", "list")),
]

Row = tuple[list[Bad], Callable[..., Any], Callable[..., Any]]


def rows(*tables: Row) -> Any:
    """A test's parameters `bad`, `ours` and `theirs`."""
    return pytest.mark.parametrize(
        ("bad", "ours", "theirs"),
        [
            pytest.param(
                *(bad, ours, theirs),
                id=f"{ours.__name__}: {bad.name}",
                marks=[pytest.mark.raises_on_the_cpu] * isinstance(bad, BadValue),
            )
            for table, ours, theirs in tables
            for bad in table
        ],
    )


every_row = rows(
    (CROSS_ENTROPY, F.cross_entropy, torch_functional.cross_entropy),
    (WITH_LOGITS, F.binary_cross_entropy_with_logits, torch_functional.binary_cross_entropy_with_logits),
    (PROBABILITIES, F.binary_cross_entropy, torch_functional.binary_cross_entropy),
)

# torch trips over these with an AttributeError about `.size`; a TypeError that names the argument says more.
NOT_A_TENSOR = (AttributeError, TypeError)


@pytest.mark.parametrize("gradient", [False, True])
@every_row
def test_same_error_as_torch(
    bad: Bad, ours: Callable[..., Any], theirs: Callable[..., Any], gradient: bool
) -> None:
    arguments = bad.make()
    differentiable = isinstance(arguments["input"], torch.Tensor) and (
        arguments["input"].is_floating_point() or arguments["input"].is_complex()
    )
    if gradient and differentiable:
        arguments["input"] = arguments["input"].clone().requires_grad_()
    with pytest.raises(Exception) as expected:  # noqa: PT011 - which one it is, torch decides
        theirs(**arguments)
    with pytest.raises(Exception) as raised:  # noqa: PT011
        ours(**arguments)
    types = NOT_A_TENSOR if expected.type is AttributeError else expected.type
    assert issubclass(raised.type, types), f"{raised.value!r} where torch has {expected.value!r}"
    for word in bad.words:
        assert word in str(raised.value), f"{word!r} is not in {raised.value}"


@rows(
    (SIGMOID_FOCAL, F.sigmoid_focal_loss, plain.sigmoid_focal_loss),
    (SOFTMAX_FOCAL, F.softmax_focal_loss, plain.softmax_focal_loss),
)
def test_focal_errors_name_the_argument(
    bad: Bad, ours: Callable[..., Any], theirs: Callable[..., Any]
) -> None:
    """The plain formula has errors of torch's many operations; of ours the message matters."""
    arguments = bad.make()
    with pytest.raises(
        (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError)
    ):
        theirs(**arguments)
    with pytest.raises((IndexError, NotImplementedError, RuntimeError, TypeError, ValueError)) as raised:
        ours(**arguments)
    for word in bad.words:
        assert word in str(raised.value), f"{word!r} is not in {raised.value}"


@pytest.mark.parametrize("gamma", [-0.5, float("nan"), -2])
def test_gamma(gamma: float) -> None:
    with pytest.raises(ValueError, match=f"gamma.*{gamma}"):
        F.sigmoid_focal_loss(torch.zeros(4, 5), torch.zeros(4, 5), gamma=gamma)
    with pytest.raises(ValueError, match=f"gamma.*{gamma}"):
        F.softmax_focal_loss(logits(), index(), gamma=gamma)


def test_numbers_that_are_none() -> None:
    logits, index = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    dense, trained = torch.rand(4, 3), torch.tensor(2.0, requires_grad=True)
    for argument, call in (
        ("gamma", lambda: F.sigmoid_focal_loss(logits, dense, gamma=trained)),
        ("gamma", lambda: F.softmax_focal_loss(logits, index, gamma=trained)),
        ("gamma", lambda: F.varifocal_loss(logits, dense, gamma=trained)),
        ("beta", lambda: F.quality_focal_loss(logits, dense, beta=trained)),
        ("alpha", lambda: F.sigmoid_focal_loss(logits, dense, alpha=[0.25] * 3)),
        ("alpha", lambda: F.softmax_focal_loss(logits, index, alpha=[0.25] * 3)),
        ("gamma", lambda: F.sigmoid_focal_loss(logits, dense, gamma="2")),
    ):
        with pytest.raises(TypeError, match=f"^{argument} .*expected a number"):
            call()


def test_softmax_focal_alpha() -> None:
    with pytest.raises(ValueError, match=r"alpha.*4.*5"):
        F.softmax_focal_loss(logits(), index(), alpha=torch.ones(4))


def test_focal_loss_wraps_a_criterion() -> None:
    for wrong in (None, torch.nn.MSELoss(), torch.nn.BCELoss()):
        with pytest.raises(TypeError, match="loss_fcn"):
            fused_losses.FocalLoss(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["CrossEntropyLoss", "BCEWithLogitsLoss", "BCELoss"])
@pytest.mark.parametrize(
    "arguments", [{"weight": 2.0}, {"weight": [1.0]}, {"unknown": 1}, {"reduction": "avg"}], ids=str
)
def test_criteria_refuse_what_torchs_refuse(name: str, arguments: dict[str, Any]) -> None:
    batch = (torch.full((4, 5), 0.5), torch.full((4, 5), 0.5))
    errors = []
    for module in (torch.nn, fused_losses):
        with pytest.raises(Exception) as raised:  # noqa: PT011 - which one it is, torch decides
            getattr(module, name)(**arguments)(*batch)
        errors.append(raised)
    theirs, ours = errors
    assert ours.type is theirs.type


@every_row
def test_nothing_is_written_by_a_call_that_fails(
    bad: Bad, ours: Callable[..., Any], theirs: Callable[..., Any]
) -> None:
    """inplace_backward must not destroy the logits of a call that raises."""
    arguments = bad.make()
    given = arguments["input"]
    if ours is F.binary_cross_entropy or not isinstance(given, torch.Tensor) or not given.is_floating_point():
        pytest.skip("no inplace_backward, or nothing to write to")
    arguments["input"] = given.clone().requires_grad_() * 1
    before = arguments["input"].detach().clone()
    with pytest.raises(Exception):  # noqa: B017, PT011
        ours(**arguments, inplace_backward=True)
    assert torch.equal(arguments["input"].detach(), before)
