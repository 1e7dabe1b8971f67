from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as torch_functional
from accuracy import (
    DTYPES,
    LOW_DTYPES,
    REDUCTIONS,
    TWO_PATHS,
    arrange,
    assert_accurate,
    layouts_of,
    ulps,
)
from cases import autocast
from torch import Tensor

import fused_losses.functional as F
from fused_losses import reference

SHAPES = [(7,), (9, 17), (3, 17, 5), (2, 5, 4, 6)]
# 1 to 40 elements: every length of a vector loop's tail.
SIZES = [(1,), (2,), (3,), (15,), (16,), (17,), (31,), (33,), (127,), (5, 1000), (1, 50257)]


def exact_with_logits(input: Tensor, target: Tensor, **options: Any) -> Tensor:
    """The reference: torch's own cancels in fp64 too, if later. test_reference.py holds it to the formula."""
    weight, pos_weight = options.get("weight"), options.get("pos_weight")
    return reference.binary_cross_entropy_with_logits(
        input, target, weight, pos_weight, options.get("reduction", "mean")
    )


def check_with_logits(logits: Tensor, target: Tensor, **options: Any) -> None:
    assert_accurate(
        F.binary_cross_entropy_with_logits,
        torch_functional.binary_cross_entropy_with_logits,
        logits,
        exact=exact_with_logits,
        cancels=is_soft(target),
        target=target,
        **options,
    )


def check_probabilities(probabilities: Tensor, target: Tensor, **options: Any) -> None:
    assert_accurate(
        F.binary_cross_entropy,
        torch_functional.binary_cross_entropy,
        probabilities,
        cancels=is_soft(target),
        target=target,
        **options,
    )


def is_soft(target: Tensor) -> bool:
    return not ((target == 0) | (target == 1)).all()


def targets(shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> Tensor:
    soft = torch.rand(shape)
    return (soft.round() if kind == "hard" else soft).to(dtype)


def logits_of(shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> Tensor:
    scale = {"ordinary": 2.0, "confident": 7.0, "saturated": 60.0, "extreme": 1e4}[kind]
    logits = torch.randn(shape, dtype=torch.float64) * scale
    logits.view(-1)[::11] = 0
    return logits.to(dtype)


@pytest.mark.every_level
@pytest.mark.parametrize("name", ["binary_cross_entropy", "binary_cross_entropy_with_logits"])
def test_layout_of_the_elements(name: str) -> None:
    """torch's, so that who takes a view of the loss still may."""
    ours, theirs = getattr(F, name), getattr(torch_functional, name)
    straight, across = torch.rand(2, 50, 80), torch.rand(2, 80, 50).permute(0, 2, 1)
    for input in (straight, across, straight[:, :1].expand(2, 50, 80)):
        for target in (straight, across, straight[:1].expand(2, 50, 80)):
            loss = ours(input, target, reduction="none")
            expected = theirs(input, target, reduction="none")
            assert loss.stride() == expected.stride()
            torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SIZES)
def test_sizes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for reduction in REDUCTIONS:
        for kind in ("hard", "soft"):
            target = targets(shape, kind, dtype)
            check_with_logits(logits_of(shape, "ordinary", dtype), target, reduction=reduction)
            check_probabilities(torch.rand(shape).to(dtype), target, reduction=reduction)


@pytest.mark.every_level
@pytest.mark.parametrize("target", ["hard", "soft"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["ordinary", "confident", "saturated", "extreme"])
def test_confident_and_extreme_logits(kind: str, dtype: torch.dtype, reduction: str, target: str) -> None:
    shape = (65, 33)
    pos_weight = (torch.rand(33) * 3).to(dtype)
    logits = logits_of(shape, kind, dtype)
    check_with_logits(logits, targets(shape, target, dtype), reduction=reduction)
    check_with_logits(logits, targets(shape, target, dtype), reduction=reduction, pos_weight=pos_weight)


@pytest.mark.every_level
@pytest.mark.parametrize("dtype", LOW_DTYPES)
@pytest.mark.parametrize("positive", [0.0, 1.0])
def test_no_cancellation_where_torch_has_it(positive: float, dtype: torch.dtype) -> None:
    """torch writes the loss as (1 - t) x - log sigmoid(x): two large terms that cancel at x << 0, t = 0, the
    background of every detector. In fp32 that is 1e-3 off at -8 and 4% at -11.5."""
    logits = torch.linspace(-80, 80, 3201).to(dtype)
    target = torch.full_like(logits, positive)
    exact = exact_with_logits(logits.double(), target.double(), reduction="none")
    ours = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    theirs = torch_functional.binary_cross_entropy_with_logits(logits, target, reduction="none")

    def relative_error(loss: Tensor) -> Tensor:
        normal = exact > torch.finfo(dtype).smallest_normal
        return ((loss.double() - exact).abs() / exact)[normal].max()

    assert relative_error(ours) <= 4 * torch.finfo(dtype).eps
    if dtype == torch.float32 and positive == 0:
        assert relative_error(theirs) > 0.01

    leaf, exact_leaf = logits.clone().requires_grad_(), logits.double().requires_grad_()
    F.binary_cross_entropy_with_logits(leaf, target, reduction="sum").backward()
    exact_with_logits(exact_leaf, target.double(), reduction="sum").backward()
    assert leaf.grad is not None
    assert exact_leaf.grad is not None
    exact = exact_leaf.grad.abs()
    assert relative_error(leaf.grad.abs()) <= 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize(("dtype", "reduction"), TWO_PATHS)
@pytest.mark.parametrize(
    "weight", [None, (), (1,), (6,), (5, 1), (1, 6), (5, 6), (4, 1, 1), (4, 5, 6)], ids=str
)
@pytest.mark.parametrize("pos_weight", [None, (), (1,), (6,), (5, 1), (4, 1, 6), (4, 5, 6)], ids=str)
def test_weights_broadcast(weight: Any, pos_weight: Any, dtype: torch.dtype, reduction: str) -> None:
    shape = (4, 5, 6)
    options = {
        "weight": None if weight is None else torch.rand(weight).to(dtype),
        "pos_weight": None if pos_weight is None else (torch.rand(pos_weight) * 3).to(dtype),
        "reduction": reduction,
    }
    check_with_logits(logits_of(shape, "ordinary", dtype), targets(shape, "soft", dtype), **options)
    if pos_weight is None:
        del options["pos_weight"]
        check_probabilities(torch.rand(shape).to(dtype), targets(shape, "soft", dtype), **options)


@pytest.mark.every_level
@pytest.mark.parametrize(("dtype", "reduction"), TWO_PATHS)
@pytest.mark.parametrize("target_layout", ["contiguous", "sliced"])
@pytest.mark.parametrize(("shape", "layout"), layouts_of(*SHAPES, (3, 40, 80)))
def test_layouts(
    shape: tuple[int, ...], layout: str, target_layout: str, dtype: torch.dtype, reduction: str
) -> None:
    logits = arrange(logits_of(shape, "ordinary", dtype), layout)
    target = arrange(targets(shape, "soft", dtype), target_layout)
    weight = arrange(torch.rand(shape).to(dtype), "sliced")
    pos_weight = arrange(torch.rand(shape[-1:]).to(dtype), "stepped")
    check_with_logits(logits, target, weight=weight, pos_weight=pos_weight, reduction=reduction)
    check_probabilities(
        arrange(torch.rand(shape).to(dtype), layout), target, weight=weight, reduction=reduction
    )


def test_stride_85_views() -> None:
    """Objectness as YOLO trains on it: one channel of a (B, 3, H, W, 85) tensor."""
    prediction = torch.randn(2, 3, 8, 8, 85, requires_grad=True)
    target = torch.rand(2, 3, 8, 8)
    loss = F.binary_cross_entropy_with_logits(prediction[..., 4], target)
    expected = torch_functional.binary_cross_entropy_with_logits(prediction[..., 4], target)
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss, prediction)
    (expected_gradient,) = torch.autograd.grad(expected, prediction)
    torch.testing.assert_close(gradient, expected_gradient)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", LOW_DTYPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_gradient_of_soft_targets(weighted: bool, dtype: torch.dtype, reduction: str) -> None:
    shape = (33, 17)
    weight = torch.rand(17).to(dtype) if weighted else None
    target = targets(shape, "soft", dtype).requires_grad_()
    check_with_logits(
        logits_of(shape, "ordinary", dtype), target, weight=weight, pos_weight=weight, reduction=reduction
    )
    check_probabilities(
        torch.rand(shape).clamp(0.01, 0.99).to(dtype), target, weight=weight, reduction=reduction
    )


@pytest.mark.every_level
@pytest.mark.parametrize("dtype", DTYPES)
def test_probabilities_of_zero_and_one(dtype: torch.dtype) -> None:
    """torch's clamp of the logarithm at -100, and of p (1 - p) at 1e-12 in the gradient."""
    corners = torch.tensor([0.0, 1.0, 1e-38, 1e-7, 1e-4, 0.5, 1 - 1e-7]).to(dtype)
    probabilities, target = corners.repeat(7), corners.repeat_interleave(7)
    for reduction in REDUCTIONS:
        results = []
        for loss_of in (F.binary_cross_entropy, torch_functional.binary_cross_entropy):
            leaf = probabilities.clone().requires_grad_()
            loss = loss_of(leaf, target, reduction=reduction)
            (gradient,) = torch.autograd.grad(loss.sum(), leaf)
            results.append((loss.detach(), gradient))
        # torch's 1e-12 is a float, whatever the dtype; in fp16 it is 0, and torch divides by that.
        tolerance = max(8 * torch.finfo(dtype).eps, 1e-8)
        for ours, theirs in zip(*results, strict=True):
            assert not ours.isnan().any()
            held = theirs.isfinite() if dtype == torch.float16 else ~theirs.isnan()
            torch.testing.assert_close(ours[held], theirs[held], rtol=tolerance, atol=0)


@pytest.mark.every_level
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity(dtype: torch.dtype) -> None:
    """nan stays where it is; at an infinite logit the loss is torch's wherever torch has a number."""
    logits = torch.randn(40).to(dtype)
    logits[[3, 20, 39]] = math.nan
    logits[[5, 17]] = math.inf
    logits[[6, 18]] = -math.inf
    target = torch.rand(40).round().to(dtype)
    results = []
    for loss_of in (F.binary_cross_entropy_with_logits, torch_functional.binary_cross_entropy_with_logits):
        leaf = logits.clone().requires_grad_()
        loss = loss_of(leaf, target, reduction="none")
        (gradient,) = torch.autograd.grad(loss.sum(), leaf)
        results.append((loss.detach(), gradient))
    for ours, theirs in zip(*results, strict=True):
        assert ours[[3, 20, 39]].isnan().all()
        number = ~theirs.isnan()
        tolerance = 16 * torch.finfo(dtype).eps
        torch.testing.assert_close(ours[number], theirs[number], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (2, 0, 3)])
def test_zero_size(shape: tuple[int, ...], reduction: str) -> None:
    for ours, theirs in (
        (F.binary_cross_entropy_with_logits, torch_functional.binary_cross_entropy_with_logits),
        (F.binary_cross_entropy, torch_functional.binary_cross_entropy),
    ):
        leaf = torch.zeros(shape, requires_grad=True)
        loss = ours(leaf, torch.zeros(shape), reduction=reduction)
        expected = theirs(leaf, torch.zeros(shape), reduction=reduction)
        torch.testing.assert_close(loss, expected, equal_nan=True)
        (gradient,) = torch.autograd.grad(loss.sum(), leaf)
        assert gradient.shape == shape


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_zero_size_of_another_dtype(reduction: str) -> None:
    input, target = torch.rand(0, 5), torch.rand(0, 5, dtype=torch.float64)
    assert F.binary_cross_entropy_with_logits(input, target, reduction=reduction).dtype == torch.float64
    with pytest.raises(RuntimeError, match="float64"):
        F.binary_cross_entropy(input, target, reduction=reduction)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_zero_dimensional(reduction: str) -> None:
    for dtype in DTYPES:
        half = torch.tensor(0.5, dtype=dtype)
        check_with_logits(torch.tensor(-3.0, dtype=dtype), half, weight=half, reduction=reduction)
        check_probabilities(torch.tensor(0.25, dtype=dtype), half, reduction=reduction)


def test_targets_outside_zero_and_one() -> None:
    """torch allows them with logits (the loss is linear in the target), and so do we."""
    logits, target = logits_of((9, 17), "ordinary", torch.float32), torch.randn(9, 17) * 3
    check_with_logits(logits, target, reduction="none", pos_weight=torch.rand(17))


@pytest.mark.parametrize("dtype", LOW_DTYPES)
def test_sum_over_many_elements(dtype: torch.dtype) -> None:
    """The error of the sum does not grow with the number of elements."""
    logits, target = torch.randn(1_000_003).to(dtype), torch.rand(1_000_003).to(dtype)
    for reduction in ("mean", "sum"):
        exact = exact_with_logits(logits.double(), target.double(), reduction=reduction)
        loss = F.binary_cross_entropy_with_logits(logits, target, reduction=reduction)
        assert ulps(loss, exact, dtype) <= 1
        exact = torch_functional.binary_cross_entropy(target.double(), target.double(), reduction=reduction)
        assert ulps(F.binary_cross_entropy(target, target, reduction=reduction), exact, dtype) <= 1


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_float16_with_a_loss_scale(reduction: str) -> None:
    logits = torch.randn(4096, 10).half()
    target = torch.rand(4096, 10).half()
    scale = 32768.0 if reduction == "mean" else 64.0
    leaf, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    loss = F.binary_cross_entropy_with_logits(leaf, target, reduction=reduction)
    loss.backward(torch.tensor(scale).half())
    (exact_with_logits(exact, target.double(), reduction=reduction) * scale).backward()
    assert leaf.grad is not None
    assert exact.grad is not None
    assert ulps(leaf.grad, exact.grad, torch.float16).max() <= 1


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("target_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_mixed_dtypes_as_torch(dtype: torch.dtype, target_dtype: torch.dtype, reduction: str) -> None:
    logits = logits_of((5, 7), "ordinary", dtype)
    target = targets((5, 7), "soft", target_dtype)
    for weight_dtype in (None, *DTYPES):
        weight = None if weight_dtype is None else torch.rand(7).to(weight_dtype)
        options: dict[str, Any] = {"weight": weight, "pos_weight": weight, "reduction": reduction}
        tolerance = 8 * max(torch.finfo(dtype).eps, torch.finfo(target_dtype).eps)
        torch.testing.assert_close(
            F.binary_cross_entropy_with_logits(logits, target, **options),
            torch_functional.binary_cross_entropy_with_logits(logits, target, **options),
            rtol=tolerance,
            atol=tolerance,
        )


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_autocast(reduction: str) -> None:
    layer = torch.nn.Linear(8, 5)
    data, target = torch.randn(16, 8), torch.rand(16, 5)
    with autocast():
        ours = F.binary_cross_entropy_with_logits(layer(data), target, reduction=reduction)
        theirs = torch_functional.binary_cross_entropy_with_logits(layer(data), target, reduction=reduction)
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
