"""The reference held to torch's own functions, to the formulas in mpmath, and to gradcheck."""

from __future__ import annotations

import math
from collections.abc import Callable

import mpmath
import plain
import pytest
import torch
import torch.nn.functional as torch_functional
from accuracy import DTYPES, LOW_DTYPES, REDUCTIONS, draw
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from fused_losses import reference

GAMMAS = [0.0, 0.5, 1.0, 1.5, 2.0, 3.7]
LOGITS = [-1e4, -700.0, -95.0, -40.0, -17.0, -3.0, -1e-3, 0.0, 0.5, 2.0, 8.0, 19.0, 36.0, 41.0, 300.0, 1e4]


def focal_formula(x: mpmath.mpf, t: float, gamma: float) -> mpmath.mpf:
    s = 1 / (1 + mpmath.exp(-x))
    cross_entropy = -t * mpmath.log(s) - (1 - t) * mpmath.log(1 / (1 + mpmath.exp(x)))
    wrongness = t / (1 + mpmath.exp(x)) + (1 - t) * s
    return wrongness**gamma * cross_entropy


@pytest.mark.parametrize("target", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("gamma", GAMMAS)
def test_sigmoid_losses_are_the_formula(gamma: float, target: float) -> None:
    x = torch.tensor(LOGITS, dtype=torch.float64, requires_grad=True)
    loss = reference.sigmoid_focal_loss(x, torch.full_like(x, target), None, None, 1, 1, gamma, "none")
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    with mpmath.workdps(400):
        points = [mpmath.mpf(value) for value in LOGITS]
        values = [float(focal_formula(point, target, gamma)) for point in points]
        slopes = [float(mpmath.diff(lambda y: focal_formula(y, target, gamma), point)) for point in points]
    # Below 1e-150 the reference's bound on (1 - p)^gamma takes over.
    torch.testing.assert_close(loss, torch.tensor(values, dtype=torch.float64), rtol=1e-13, atol=1e-150)
    torch.testing.assert_close(gradient, torch.tensor(slopes, dtype=torch.float64), rtol=1e-12, atol=1e-150)
    if gamma == 0:
        cross_entropy = reference.binary_cross_entropy_with_logits(
            x, torch.full_like(x, target), None, None, "none"
        )
        torch.testing.assert_close(loss, cross_entropy, rtol=1e-15, atol=0)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_softmax_focal_is_the_formula(gamma: float) -> None:
    logits = torch.tensor([[2.0, -1.0, 0.5], [-1.0, 0.25, 3.0], [0.0, 9.0, -4.0]], dtype=torch.float64)
    index = torch.tensor([0, 1, 1])
    loss = reference.softmax_focal_loss(logits, index, None, gamma, -100, "none")
    with mpmath.workdps(40):
        for row, label, value in zip(logits.tolist(), index.tolist(), loss.tolist(), strict=True):
            p = mpmath.exp(row[label]) / sum(mpmath.exp(x) for x in row)
            assert value == pytest.approx(float(-((1 - p) ** gamma) * mpmath.log(p)), rel=1e-12)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_as_torch_where_torch_is_accurate(dtype: torch.dtype, reduction: str) -> None:
    logits, index = draw((20, 7), "ordinary", dtype)
    soft, weight, pos_weight = torch.rand(20, 7).to(dtype), torch.rand(7).to(dtype), torch.rand(7).to(dtype)
    probabilities = soft.softmax(1)
    pairs = [
        (
            reference.cross_entropy(logits, goal, weight, 3, reduction, 0.1),
            torch_functional.cross_entropy(
                logits, goal, weight, label_smoothing=0.1, reduction=reduction, ignore_index=ignored
            ),
        )
        for goal, ignored in ((index, 3), (probabilities, -100))
        if goal is index
    ] + [
        (
            reference.cross_entropy(logits, probabilities, weight, -100, reduction, 0.1),
            torch_functional.cross_entropy(
                logits, probabilities, weight, label_smoothing=0.1, reduction=reduction
            ),
        ),
        (
            reference.binary_cross_entropy_with_logits(logits, soft, weight, pos_weight, reduction),
            torch_functional.binary_cross_entropy_with_logits(
                logits, soft, weight, pos_weight=pos_weight, reduction=reduction
            ),
        ),
        (
            reference.binary_cross_entropy(soft, soft.flip(0), weight, reduction),
            torch_functional.binary_cross_entropy(soft, soft.flip(0), weight, reduction=reduction),
        ),
        (
            reference.sigmoid_focal_loss(logits, soft, None, None, 0.25, 0.75, 2.0, reduction),
            plain.sigmoid_focal_loss(logits, soft, reduction=reduction),
        ),
        (
            reference.softmax_focal_loss(logits, index, weight, 1.5, 3, reduction),
            plain.softmax_focal_loss(logits, index, 1.5, weight, 3, reduction),
        ),
    ]
    tolerance = 16 * torch.finfo(dtype).eps
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, *LOW_DTYPES])
@pytest.mark.parametrize("gamma", [0.0, 0.01, *GAMMAS])
def test_derivatives_are_finite_at_saturated_logits(gamma: float, dtype: torch.dtype) -> None:
    x = torch.tensor(LOGITS).to(dtype).requires_grad_()
    rows = torch.stack([x.detach(), torch.zeros_like(x)], 1).requires_grad_()
    losses = [
        (x, reference.sigmoid_focal_loss(x, torch.full_like(x, target), None, None, 1, 1, gamma, "none"))
        for target in (0.0, 0.3, 1.0)
    ] + [
        (rows, reference.softmax_focal_loss(rows, torch.full((len(x),), label), None, gamma, -100, "none"))
        for label in (0, 1)
    ]
    for leaf, loss in losses:
        (gradient,) = torch.autograd.grad(loss.sum(), leaf, create_graph=True)
        (second,) = torch.autograd.grad(gradient.sum(), leaf)
        assert loss.isfinite().all()
        assert gradient.isfinite().all()
        assert second.isfinite().all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("gamma", GAMMAS)
def test_focal_losses_differentiate_twice(gamma: float, reduction: str) -> None:
    logits = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    soft = torch.rand(4, 3, dtype=torch.float64, requires_grad=True)
    index, weight = torch.tensor([0, 2, -100, 1]), torch.rand(3, dtype=torch.float64)

    def sigmoid_focal(x: Tensor, t: Tensor) -> Tensor:
        return reference.sigmoid_focal_loss(x, t, weight, weight, 0.3, 0.7, gamma, reduction)

    def softmax_focal(x: Tensor) -> Tensor:
        return reference.softmax_focal_loss(x, index, weight, gamma, -100, reduction)

    checks: list[tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = [
        (sigmoid_focal, (logits, soft)),
        (softmax_focal, (logits,)),
    ]
    for loss, leaves in checks:
        assert gradcheck(loss, leaves)
        assert gradgradcheck(loss, leaves)


def test_ignored_rows_let_nothing_through() -> None:
    logits = torch.tensor([[math.nan, math.inf], [1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    index = torch.tensor([-100, 0])
    for loss in (
        reference.cross_entropy(logits, index, None, -100, "mean", 0.1),
        reference.softmax_focal_loss(logits, index, None, 2.0, -100, "mean"),
    ):
        (gradient,) = torch.autograd.grad(loss, logits)
        assert (gradient[0] == 0).all()
        assert (gradient[1] != 0).all()
        assert loss.isfinite()
