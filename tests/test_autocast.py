"""Autocast: a float32 loss and a gradient in the logits' dtype, as torch's criteria; no float32 copy of the logits."""

from __future__ import annotations

from typing import Any

import plain
import pytest
import test_detection
import torch
import torch.nn.functional as torch_functional
from accuracy import LUCK, REDUCTIONS, assert_accurate, draw
from cases import CASES, IN_PLACE_CASES, Case, autocast
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fused_losses.functional as F
from fused_losses import IndexTarget

DEVICE = torch.get_default_device().type
ALLOWED = [case for case in CASES if case.name != "bce" or DEVICE == "cpu"]  # on CUDA torch refuses it
every_case = pytest.mark.parametrize("case", ALLOWED, ids=lambda case: case.name)
HALVES = [torch.bfloat16, torch.float16]
every_half = pytest.mark.parametrize("dtype", HALVES)


def exact(case: Case, logits: Tensor, options: dict[str, Any], reduction: str) -> tuple[Tensor, Tensor]:
    """The loss and gradient of the same numbers in fp64."""
    wide = {
        name: option.double() if isinstance(option, Tensor) and option.is_floating_point() else option
        for name, option in options.items()
    }
    leaf = logits.double().requires_grad_()
    loss = case.theirs(leaf, **wide, reduction=reduction)
    loss.sum().backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


@every_case
@every_half
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("wide_others", [False, True], ids=["halves", "float32 targets and weights"])
def test_a_float32_loss(case: Case, dtype: torch.dtype, reduction: str, wide_others: bool) -> None:
    logits, options = case.make(dtype)
    if wide_others:
        options = {
            name: o.float() if isinstance(o, Tensor) and o.is_floating_point() else o
            for name, o in options.items()
        }
    leaf = logits.clone().requires_grad_()
    with autocast():
        loss = case.ours(leaf, **options, reduction=reduction)
    loss.sum().backward()
    value, gradient = exact(case, logits, options, reduction)
    assert loss.dtype == torch.float32
    assert leaf.grad is not None
    assert leaf.grad.dtype == dtype
    torch.testing.assert_close(loss.detach().double(), value, rtol=2e-6, atol=1e-6)
    tolerance = torch.finfo(dtype).eps
    torch.testing.assert_close(leaf.grad.double(), gradient, rtol=tolerance, atol=tolerance / 16)


def soft(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape).double().softmax(1).to(dtype)


def targets(kind: str, logits: Tensor, index: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """Of a softmax loss, with floating tensors of `dtype`."""
    if kind == "index":
        return {"target": index}
    weight = torch.rand(logits.shape[1]).add(0.1).to(dtype)
    if kind == "options":
        index.view(-1)[::5] = -100
        return {"target": index, "weight": weight, "label_smoothing": 0.1}
    if kind == "probabilities":
        return {"target": soft(logits.shape, dtype), "weight": weight}
    return {"target": index, "alpha": weight, "gamma": float(kind)}


SHAPES = [(1100, 17), (1100, 40), (3, 1100), (70, 17, 5)]  # short rows, rows, long rows, columns
DENSE: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "bce_with_logits": (
        F.binary_cross_entropy_with_logits,
        torch_functional.binary_cross_entropy_with_logits,
        {"exact": test_detection.LOSSES["bce"][2]},
    ),
    "sigmoid_focal": (F.sigmoid_focal_loss, plain.sigmoid_focal_loss, {}),
    "quality_focal": (F.quality_focal_loss, plain.quality_focal_loss, {"value_cancels": True}),
    "varifocal": (F.varifocal_loss, plain.varifocal_loss, {}),
}


def widened(x: Any) -> Any:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return x
    return x.to(torch.promote_types(x.dtype, torch.float32))


RULE = ("exact", "cancels", "value_cancels")


def check(ours: Any, theirs: Any, logits: Tensor, **options: Any) -> None:
    """Ours under autocast against torch's on logits widened beforehand: what its criteria do under autocast. And
    against ours on those, as torch's own error may be large."""

    def narrow(x: Tensor, **rest: Any) -> Tensor:
        with autocast():
            result: Tensor = ours(x, **rest)
        return result

    def wide(x: Tensor, **rest: Any) -> Tensor:
        result: Tensor = theirs(widened(x), **{key: widened(o) for key, o in rest.items()})
        return result

    assert_accurate(narrow, wide, logits, **options)
    arguments = {key: o for key, o in options.items() if key not in RULE}
    same = ours(widened(logits), **{key: widened(o) for key, o in arguments.items()})
    ulps = 64 if options.get("cancels") else LUCK if "gamma" in options else 2
    torch.testing.assert_close(narrow(logits, **arguments), same, rtol=ulps * 2.0**-23, atol=0)


def check_softmax(kind: str, shape: tuple[int, ...], dtype: torch.dtype, others: torch.dtype) -> None:
    for reduction in REDUCTIONS:
        for confident in ("ordinary", "confident"):
            logits, index = draw(shape, confident, dtype)
            options = targets(kind, logits, index, others)
            focal = "alpha" in options
            ours = F.softmax_focal_loss if focal else F.cross_entropy
            theirs = plain.softmax_focal_loss if focal else torch_functional.cross_entropy
            difference = kind in ("options", "probabilities")
            check(ours, theirs, logits, cancels=difference, reduction=reduction, **options)


def check_dense(name: str, dtype: torch.dtype, others: torch.dtype) -> None:
    ours, theirs, rule = DENSE[name]
    target = "targets" if name == "sigmoid_focal" else "target"
    for reduction in REDUCTIONS:
        for shape, hard in (((1100, 3), True), ((41, 33), False)):
            logits, values = (torch.randn(shape).double() * 3 - 1).to(dtype), torch.rand(shape).to(others)
            values = values.round() if hard else values.where(values > 0.5, 0)
            options = {target: values, "reduction": reduction}
            check(ours, theirs, logits, cancels=not hard, **options, **rule)


def check_index(name: str, dtype: torch.dtype, others: torch.dtype) -> None:
    for reduction in REDUCTIONS:
        for shape, class_dim in (((150, 17), -1), ((3, 17, 25), 1)):
            anchors = shape[:1] if class_dim == -1 else (3, 25)
            labels = test_detection.draw_labels(anchors, 17)
            logits = test_detection.logits_of(shape, dtype)
            for scores in (None, torch.rand(anchors).clamp(0.01).to(others)):
                target = IndexTarget(labels, scores)
                options: dict[str, Any] = {"reduction": reduction, "class_dim": class_dim}
                if reduction == "mean" and scores is not None:
                    options["avg_factor"] = torch.tensor(7.5)
                test_detection.check(name, logits, target, autocast=True, **options)


def check_distribution(shape: tuple[int, ...], dtype: torch.dtype, others: torch.dtype) -> None:
    for reduction in REDUCTIONS:
        logits = (torch.randn(shape).double() * 2).to(dtype)
        options = {
            "target": (torch.rand(shape[:-1]) * (shape[-1] - 1)).bfloat16().to(others),
            "weight": torch.rand(shape[:-1]).to(others),
            "reduction": reduction,
        }
        ours, theirs = F.distribution_focal_loss, plain.distribution_focal_loss
        check(ours, theirs, logits, cancels=True, value_cancels=True, **options)


def check_everything(dtype: torch.dtype, others: torch.dtype, shapes: list[tuple[int, ...]]) -> None:
    """Value and gradient of every loss under autocast, by the accuracy rule; targets and weights of dtype `others`."""
    for kind in ("index", "options", "probabilities", "1.5", "2.0"):
        for shape in shapes:
            check_softmax(kind, shape, dtype, others)
    for name in DENSE:
        check_dense(name, dtype, others)
    for name in test_detection.LOSSES:
        check_index(name, dtype, others)
    for shape in ((300, 16), (33, 4, 17)):
        check_distribution(shape, dtype, others)


def check_loss_scale(dtype: torch.dtype) -> None:
    """An upstream gradient of 65536, which is no number of fp16, on gradients that are none either, or nearly."""
    classes, anchors, bins = (128, 9000), (300, 33), (300, 16)
    index = torch.randint(9000, (128,))
    dense = torch.rand(anchors).where(torch.rand(anchors) > 0.9, 0).to(dtype)
    labels = IndexTarget(test_detection.draw_labels((300,), 33), torch.rand(300).clamp(0.01).to(dtype))
    places = (torch.rand(300) * 15).bfloat16()
    few: dict[str, Any] = {"reduction": "mean", "avg_factor": 1e6}
    calls = [
        (F.cross_entropy, classes, index, {}),
        (F.cross_entropy, classes, index, {"label_smoothing": 0.1}),
        (F.softmax_focal_loss, classes, index, {"alpha": torch.rand(9000)}),
        (F.binary_cross_entropy_with_logits, anchors, dense * 0, {}),
        (F.sigmoid_focal_loss, anchors, dense * 0, {"reduction": "mean"}),
        (F.distribution_focal_loss, bins, places, few),
        *[(loss, anchors, target, few) for loss, _, _ in test_detection.LOSSES.values() for target in (dense, labels)],
    ]  # fmt: skip
    for loss_of, shape, target, options in calls:
        logits = (torch.randn(shape) - (0 if "avg_factor" in options else 8)).to(dtype).requires_grad_()
        with autocast():
            loss = loss_of(logits, target, **options)
        (loss * 65536).backward()
        assert logits.grad is not None
        reference = logits.detach().double().requires_grad_()
        exact = target
        if isinstance(target, IndexTarget):
            assert target.scores is not None
            exact = IndexTarget(target.labels, target.scores.double())
        elif target.is_floating_point():
            exact = target.double()
        wide = {key: o.double() if isinstance(o, Tensor) else o for key, o in options.items()}
        expected = torch.func.grad(lambda x, f=loss_of, t=exact, o=wide: f(x, t, **o))(reference.detach())
        assert expected.abs().median() < 2**-20  # less than 16 steps of fp16
        unscaled = logits.grad.double() / 65536
        tolerance = torch.finfo(dtype).eps
        torch.testing.assert_close(unscaled, expected, rtol=tolerance, atol=2.0**-40)


@every_half
def test_loss_scale(dtype: torch.dtype) -> None:
    check_loss_scale(dtype)


@pytest.mark.every_level
@every_half
@pytest.mark.parametrize("others", ["own", "float32"])
def test_accuracy(dtype: torch.dtype, others: str) -> None:
    check_everything(dtype, torch.float32 if others == "float32" else dtype, SHAPES)


@every_case
def test_second_derivatives(case: Case) -> None:
    logits, options = case.make(torch.bfloat16)
    results = []
    for loss_of in (case.ours, case.theirs):
        leaf = logits.clone().requires_grad_()
        with autocast():
            loss = loss_of(leaf, **options, reduction="mean")
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
        results.append(torch.autograd.grad(gradient.float().square().sum(), leaf)[0])
    torch.testing.assert_close(*results, rtol=0.05, atol=1e-3)


class Made(TorchDispatchMode):
    """The dtypes of what is made of the logits' shape, and our ops."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape, self.dtypes, self.ops = shape, set[torch.dtype](), set[str]()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        if op.namespace == "fused_losses":
            self.ops.add(op._schema.name)
        for tensor in result if isinstance(result, tuple) else (result,):
            if isinstance(tensor, Tensor) and tensor.shape == self.shape:
                self.dtypes.add(tensor.dtype)
        return result


@every_case
@every_half
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_copy_of_the_logits(case: Case, dtype: torch.dtype, reduction: str) -> None:
    logits, options = case.make(dtype)
    leaf = logits.requires_grad_()
    with Made(logits.shape) as made:
        with autocast():
            loss = case.ours(leaf, **options, reduction=reduction)
    assert made.dtypes <= ({torch.float32} if loss.shape == logits.shape else {dtype})  # the loss itself
    upstream = torch.ones_like(loss)
    with Made(logits.shape) as made_in_backward:
        loss.backward(upstream)
    assert made_in_backward.dtypes <= {dtype}
    assert made.ops


@every_case
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_autocast_switched_off_inside(case: Case, dtype: torch.dtype, reduction: str) -> None:
    logits, options = case.make(dtype)
    expected = case.ours(logits, **options, reduction=reduction)
    with autocast(), autocast(enabled=False):
        loss = case.ours(logits, **options, reduction=reduction)
    assert loss.dtype == dtype
    assert torch.equal(loss, expected)


@every_case
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_logits_stay_what_they_are(case: Case, dtype: torch.dtype, reduction: str) -> None:
    logits, options = case.make(dtype)
    with autocast():
        loss = case.ours(logits, **options, reduction=reduction)
        theirs = case.theirs(logits, **options, reduction=reduction)
    assert loss.dtype == theirs.dtype == dtype
    torch.testing.assert_close(loss, theirs)


@every_case
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_logits_reach_the_kernels(case: Case, dtype: torch.dtype, reduction: str) -> None:
    """As of a network that ends in `logits.float()`."""
    logits, options = case.make(dtype)
    gradients = []
    for enabled in (False, True):
        leaf = logits.clone().requires_grad_()
        with Made(logits.shape) as made, autocast(enabled=enabled):
            loss = case.ours(leaf, **options, reduction=reduction)
        gradients.append(torch.autograd.grad(loss.sum() * 3, leaf)[0])
        assert made.ops
    assert torch.equal(*gradients)


@pytest.mark.parametrize("case", IN_PLACE_CASES, ids=lambda case: case.name)
def test_in_place(case: Case) -> None:
    data, options = case.make(torch.bfloat16)
    gradients = []
    for keyword in ({}, {"inplace_backward": True}):
        leaf = data.clone().requires_grad_()
        with autocast():
            loss = case.ours(leaf * 1.5, **options, reduction="mean", **keyword)
        gradients.append(torch.autograd.grad(loss, leaf)[0])
    assert torch.equal(*gradients)


def test_grad_scaler() -> None:
    """1 / (N V) is no number of fp16; the loss scale has to come in before the gradient is rounded."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(16, 9000)
    x, target = torch.randn(128, 16), torch.randint(9000, (128,))
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**16)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    with autocast(torch.float16):
        logits = layer(x)
        loss = F.cross_entropy(logits, target)
    logits.retain_grad()
    scaler.scale(loss).backward()
    assert logits.grad is not None
    unscaled = logits.grad.double() / 2**16
    reference = logits.detach().double().requires_grad_()
    torch.nn.functional.cross_entropy(reference, target).backward()
    assert reference.grad is not None
    assert reference.grad.abs().median() < 2**-20  # less than 16 steps of fp16
    torch.testing.assert_close(unscaled, reference.grad, rtol=1e-3, atol=2.0**-40)
    weights = layer.weight.detach().clone()
    scaler.step(optimizer)
    scaler.update()
    assert not torch.equal(layer.weight, weights)
    assert scaler.get_scale() == 2.0**16


def test_a_weight_in_float64() -> None:
    """torch refuses it beside class indices, and has a float64 loss beside soft targets."""
    logits, weight = torch.randn(4, 5).bfloat16(), torch.rand(5, dtype=torch.float64)
    with autocast():
        with pytest.raises(RuntimeError, match="Double"):
            F.cross_entropy(logits, torch.arange(4), weight)
        loss = F.cross_entropy(logits, torch.rand(4, 5).softmax(1).bfloat16(), weight)
    assert loss.dtype == torch.float64
