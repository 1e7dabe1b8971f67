"""What the kernels do not reach goes to torch's function and gives its result; a log line says why, once."""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import product
from typing import Any

import plain
import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as torch_functional
from cases import CASES, Case
from torch import Tensor
from torch._subclasses import FakeTensorMode

import fused_losses.functional as F
from fused_losses import _checks

FUNCTIONS = ["cross_entropy", "binary_cross_entropy", "binary_cross_entropy_with_logits"]
every_function = pytest.mark.parametrize("name", FUNCTIONS)
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


class Labelled(Tensor):
    """A subclass without ideas of its own: results are of its class."""


def outcome(call: Callable[[], Any]) -> Any:
    """The result, or the type of error."""
    try:
        return call()
    except Exception as error:
        return type(error)


def same(name: str, *args: Any, **options: Any) -> Any:
    """Asserts that ours does what torch's does, and returns it; with gradients, where the input wants one."""
    ours = outcome(lambda: getattr(F, name)(*args, **options))
    theirs = outcome(lambda: getattr(torch_functional, name)(*args, **options))
    if isinstance(theirs, type):
        assert ours is theirs
        return theirs
    assert (type(ours), ours.dtype, ours.shape, ours.device, ours.layout) == (
        type(theirs),
        theirs.dtype,
        theirs.shape,
        theirs.device,
        theirs.layout,
    )
    if not ours.is_meta and type(ours) in (Tensor, Labelled):
        torch.testing.assert_close(ours, theirs, equal_nan=True)
        if ours.requires_grad:
            torch.testing.assert_close(*(torch.autograd.grad(loss.sum(), args[0]) for loss in (ours, theirs)))
    return ours


def batch(name: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    input = torch.rand(6, 5, dtype=torch.float64).to(dtype)
    return input, torch.arange(6) % 5 if name == "cross_entropy" else torch.rand(6, 5).to(dtype)


@every_function
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_meta(name: str, reduction: str) -> None:
    input, target = batch(name)
    assert same(name, input.to("meta"), target.to("meta"), reduction=reduction).is_meta
    assert same(name, input.to("meta").requires_grad_(), target.to("meta"), reduction=reduction).is_meta


@every_case
def test_meta_of_every_loss(case: Case) -> None:
    logits, options = case.make(torch.float32)
    meta = {key: value.to("meta") if isinstance(value, Tensor) else value for key, value in options.items()}
    loss = case.ours(logits.to("meta").requires_grad_(), **meta)
    assert (loss.is_meta, loss.shape, loss.dtype) == (True, case.ours(logits, **options).shape, torch.float32)


@every_function
def test_devices_that_differ(name: str) -> None:
    input, target = batch(name)
    same(name, input, target.to("meta"))
    same(name, input.to("meta"), target)


@every_function
def test_sparse(name: str) -> None:
    input, target = batch(name)
    same(name, input.to_sparse(), target)
    same(name, input, target.to_sparse())
    same(name, input.to_sparse(), target.to_sparse())


@every_function
@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64, torch.bool, torch.float8_e5m2])
def test_other_dtypes(name: str, dtype: torch.dtype) -> None:
    input, target = batch(name)
    same(name, input.to(dtype), target)
    same(name, input, target.to(dtype))
    same(name, input.to(dtype), target.to(dtype))


@every_function
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    ("first", "second"), [pair for pair in product(FLOATS, FLOATS) if pair[0] != pair[1]]
)
def test_dtypes_that_differ(name: str, first: torch.dtype, second: torch.dtype, reduction: str) -> None:
    """torch takes some mixes and refuses others; which, only torch's function says."""
    input, target = batch(name, first)
    weight = torch.rand(5)
    input.requires_grad_()
    same(name, input, target, weight.to(second), reduction=reduction)
    if name == "cross_entropy":
        same(name, input, torch.rand(6, 5).softmax(1).to(second), reduction=reduction)
    else:
        same(name, input, target.to(second), reduction=reduction)
    if name == "binary_cross_entropy_with_logits":
        same(name, input, target, pos_weight=weight.to(second), reduction=reduction)
        same(name, input, target.to(second), weight.to(second), reduction=reduction)


def test_focal_losses_take_dtypes_that_differ() -> None:
    input, target = torch.randn(6, 5, requires_grad=True), torch.rand(6, 5)
    for other in (torch.float64, torch.bfloat16):
        mixed = target.to(other)
        loss = F.sigmoid_focal_loss(input, mixed, reduction="sum")
        assert loss.dtype == plain.sigmoid_focal_loss(input, mixed, reduction="sum").dtype
        exact = plain.sigmoid_focal_loss(input.double(), mixed.double(), reduction="sum")
        torch.testing.assert_close(loss, exact.to(loss.dtype))


@every_function
def test_subclass(name: str) -> None:
    input, target = batch(name)
    assert type(same(name, input.as_subclass(Labelled), target)) is Labelled
    same(name, input, target.as_subclass(Labelled))
    same(name, input, target, torch.rand(5).as_subclass(Labelled))
    same(name, input.as_subclass(Labelled).requires_grad_(), target)


@every_case
def test_subclass_of_every_loss(case: Case) -> None:
    logits, options = case.make(torch.float64)
    plain_loss = case.ours(logits, **options)
    torch.testing.assert_close(
        case.ours(logits.as_subclass(Labelled), **options).as_subclass(Tensor), plain_loss
    )


@every_function
def test_fake_tensors(name: str) -> None:
    with FakeTensorMode() as mode:
        input, target = (mode.from_tensor(tensor) for tensor in batch(name))
        loss = getattr(F, name)(input.requires_grad_(), target)
        expected = getattr(torch_functional, name)(input, target)
        loss.backward()
    assert (type(loss), loss.shape, loss.dtype) == (type(expected), expected.shape, expected.dtype)
    assert input.grad.shape == input.shape


@every_function
def test_dual_tensors(name: str) -> None:
    input, target = batch(name, torch.float64)
    tangents = []
    for function in (getattr(F, name), getattr(torch_functional, name)):
        with forward_ad.dual_level():
            loss = function(forward_ad.make_dual(input, torch.full_like(input, 0.5)), target)
            tangents.append(forward_ad.unpack_dual(loss).tangent)
    torch.testing.assert_close(*tangents)


@every_function
def test_targets_and_weights_that_require_a_gradient(name: str) -> None:
    input, target = batch(name, torch.float64)
    if name == "cross_entropy":
        target = torch.rand(6, 5, dtype=torch.float64).softmax(1)
    gradients = []
    for function in (getattr(F, name), getattr(torch_functional, name)):
        leaves = [input.clone().requires_grad_(), target.clone().requires_grad_()]
        gradients.append(torch.autograd.grad(function(*leaves), leaves))
    torch.testing.assert_close(*gradients)


@every_function
def test_symbolic_trace(name: str) -> None:
    """The criteria of torch.nn are leaves to torch.fx, ours are traced through: to torch's function."""
    input, target = batch(name)
    traced = torch.fx.symbolic_trace(lambda input, target: getattr(F, name)(input, target, reduction="sum"))
    torch.testing.assert_close(
        traced(input, target), getattr(torch_functional, name)(input, target, reduction="sum")
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@every_function
def test_jit_trace(name: str) -> None:
    input, target = batch(name)
    traced = torch.jit.trace(getattr(F, name), (input.requires_grad_(), target))
    other, target = batch(name)
    torch.testing.assert_close(traced(other, target), getattr(torch_functional, name)(other, target))


# The log


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    monkeypatch.setattr(_checks, "_logged", set())
    caplog.set_level(logging.DEBUG, logger="fused_losses")

    def lines() -> list[str]:
        assert all(record.levelno == logging.DEBUG for record in caplog.records)
        found = [record.getMessage() for record in caplog.records if record.name == "fused_losses"]
        caplog.clear()
        return found

    return lines


CAUSES: dict[str, Callable[[Tensor, Tensor], tuple[Any, ...]]] = {
    "Labelled": lambda input, target: (input.as_subclass(Labelled), target),
    "target or weight is a": lambda input, target: (input, target.as_subclass(Labelled)),
    "requires a gradient": lambda input, target: (input, target.clone().requires_grad_()),
    "weight has dtype torch.float64": lambda input, target: (
        input,
        target,
        torch.rand(5, dtype=torch.float64),
    ),
    "target has dtype torch.bfloat16": lambda input, target: (input, target.bfloat16()),
}


@pytest.mark.parametrize("words", CAUSES)
def test_a_cause_is_logged_once(log: Callable[[], list[str]], words: str) -> None:
    arguments = CAUSES[words](torch.randn(6, 5), torch.rand(6, 5))
    for _ in range(3):
        F.binary_cross_entropy_with_logits(*arguments)
    (line,) = log()
    assert line.startswith("not fused: ")
    assert words in line
    F.binary_cross_entropy_with_logits(
        torch.randn(6, 5), torch.rand(6, 5, requires_grad=True, dtype=torch.float64)
    )
    assert len(log()) == (words != "requires a gradient")  # another cause is another line


@every_case
def test_every_loss_logs(log: Callable[[], list[str]], case: Case) -> None:
    logits, options = case.make(torch.float32)
    case.ours(logits, **options)
    assert log() == []
    case.ours(logits.as_subclass(Labelled), **options)
    (line,) = log()
    assert "Labelled" in line


def test_dtypes_that_differ_are_logged_for_focal_losses(log: Callable[[], list[str]]) -> None:
    F.sigmoid_focal_loss(torch.randn(6, 5), torch.rand(6, 5).double())
    assert log() == ["not fused: targets has dtype torch.float64; expected the input's, torch.float32"]


def test_errors_are_not_logged(log: Callable[[], list[str]]) -> None:
    with pytest.raises(ValueError, match="target"):
        F.binary_cross_entropy_with_logits(torch.randn(6, 5), torch.rand(6, 4))
    assert log() == []


def test_nothing_is_logged_or_kept_unless_asked_for(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_checks, "_logged", set())
    caplog.set_level(logging.INFO, logger="fused_losses")
    F.cross_entropy(torch.randn(6, 5).as_subclass(Labelled), torch.arange(6) % 5)
    assert not caplog.records
    assert not _checks._logged
