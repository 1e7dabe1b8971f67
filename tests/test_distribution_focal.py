"""Distribution focal loss: a box's sides as distributions over bins."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import plain
import pytest
import torch
from accuracy import DTYPES, LOW_DTYPES, REDUCTIONS, arrange, assert_accurate, assert_gradient_of_any_size
from cases import autocast
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import fused_losses
import fused_losses.functional as F
from fused_losses import reference


def exact(input: Tensor, target: Tensor, weight: Tensor | None = None, reduction: str = "mean") -> Tensor:
    logits = input.movedim(-1, 1) if input.dim() > 2 else input
    return reference.distribution_focal_loss(logits, target, weight, None, 0.0, reduction)


def draw(shape: tuple[int, ...], dtype: torch.dtype, kind: str = "ordinary") -> tuple[Tensor, Tensor]:
    """Logits of `shape`, bins last, and targets: between bins, on them, and on the first and the last."""
    last = shape[-1] - 1
    target = torch.rand(shape[:-1], dtype=torch.float64) * last
    choice = torch.rand(shape[:-1])
    target = target.where(choice > 0.2, target.floor())
    target = target.where(choice > 0.1, 0).where(choice < 0.9, last).to(dtype).clamp(0, last)
    logits = torch.randn(shape, dtype=torch.float64) * 2
    if kind == "confident":
        logits.scatter_(-1, target.round().long().unsqueeze(-1), 12.0)
    if kind == "extreme":
        logits = logits.where(torch.rand(shape) < 0.8, 1e4 * torch.randint(-1, 2, shape))
    return logits.to(dtype), target


def check(logits: Tensor, **options: Any) -> None:
    assert_accurate(
        F.distribution_focal_loss,
        plain.distribution_focal_loss,
        logits,
        exact=exact,
        cancels=True,
        **options,
    )


@pytest.mark.every_level
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bins", [1, 2, 3, 8, 16, 17, 33, 100])
def test_bins(bins: int, dtype: torch.dtype, reduction: str) -> None:
    for positions in (1, 15, 64, 131):
        logits, target = draw((positions, bins), dtype)
        check(logits, target=target, reduction=reduction)
        check(logits, target=target, weight=torch.rand(positions).bfloat16().to(dtype), reduction=reduction)


@pytest.mark.every_level
@pytest.mark.parametrize("kind", ["ordinary", "confident", "extreme"])
@pytest.mark.parametrize("dtype", LOW_DTYPES)
def test_many_positions(dtype: torch.dtype, kind: str) -> None:
    logits, target = draw((5003, 16), dtype, kind)
    for reduction in ("mean", "none"):
        check(logits, target=target, reduction=reduction)


@pytest.mark.every_level
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bins", [1, 5, 16])
def test_rows_far_from_zero_among_others(bins: int, dtype: torch.dtype) -> None:
    for kind in ("ordinary", "confident"):
        logits, target = draw((300, bins), dtype, kind)
        far = torch.tensor([0.0, 0.0, 0.0, 100.0, -100.0, 1e4, -1e4], dtype=dtype)
        logits += far[torch.randint(7, (300, 1))]
        check(logits, target=target, reduction="none")


@pytest.mark.every_level
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row", [(50, -40, -40), (69, -20, -20), (60, -40, -41), (40, -41, -42), (88, 0, -3)])
def test_a_neighbour_far_below_the_largest(row: tuple[float, ...], dtype: torch.dtype) -> None:
    """exp of their distance is no number in fp32: 90, 89, 100, ..."""
    logits, target = torch.tensor([row], dtype=dtype), torch.tensor([1.25], dtype=dtype)
    for positions in (1, 64):
        check(logits.repeat(positions, 1), target=target.repeat(positions))


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "misaligned", "sliced", "stepped"])
@pytest.mark.parametrize("shape", [(16,), (33, 16), (9, 4, 16), (2, 5, 4, 17)])
def test_layouts(shape: tuple[int, ...], layout: str) -> None:
    if len(shape) == 1 and layout == "transposed":
        pytest.skip("one dimension")
    for dtype, reduction in ((torch.float32, "mean"), (torch.bfloat16, "none")):
        logits, target = draw(shape, dtype)
        check(arrange(logits, layout), target=target, reduction=reduction)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_expanded_logits(dtype: torch.dtype) -> None:
    logits, target = draw((131, 16), dtype)
    for expanded in (logits[:1].expand_as(logits), logits[:, :1].expand_as(logits)):
        check(expanded, target=target, reduction="none")


def test_sides_of_boxes() -> None:
    """(N, 4, bins) is (4 N, bins), and a weight an anchor goes with its four sides."""
    logits, target = draw((57, 4, 16), torch.float32)
    weight = torch.rand(57)
    boxes, flat = logits.clone().requires_grad_(), logits.view(-1, 16).clone().requires_grad_()
    loss = F.distribution_focal_loss(boxes, target, weight, "sum")
    same = F.distribution_focal_loss(flat, target.view(-1), weight.repeat_interleave(4), "sum")
    torch.testing.assert_close(loss, same)
    (loss + same).backward()
    torch.testing.assert_close(boxes.grad, flat.grad.view(57, 4, 16))
    each = F.distribution_focal_loss(logits, target, weight.unsqueeze(1), "none")
    torch.testing.assert_close(
        each, plain.distribution_focal_loss(logits, target, weight.unsqueeze(1), "none")
    )
    with_channels = logits.view(57, 64).T.contiguous().T  # a head's (4 bins, anchors)
    assert torch.equal(F.distribution_focal_loss(with_channels.view(57, 4, 16), target, weight, "none"), each)


def test_yolov8_box_loss() -> None:
    """Mean over the sides, times the alignment score of the anchor, summed, over the scores' sum."""
    pred_dist, target = draw((8 * 4, 16), torch.float32)
    target = target.clamp(0, 15 - 0.01).view(8, 4)
    weight = torch.rand(8, 1)
    target_scores_sum = torch.tensor(23.0)
    leaf, other = pred_dist.clone().requires_grad_(), pred_dist.clone().requires_grad_()
    theirs = plain.distribution_focal_loss(other.view(8, 4, 16), target, reduction="none").mean(
        -1, keepdim=True
    )
    theirs = (theirs * weight).sum() / target_scores_sum
    ours = F.distribution_focal_loss(leaf.view(8, 4, 16), target, weight, avg_factor=4 * target_scores_sum)
    ours.backward()
    theirs.backward()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(leaf.grad, other.grad)


@pytest.mark.parametrize("dtype", DTYPES)
def test_avg_factor(dtype: torch.dtype) -> None:
    logits, target = draw((33, 16), dtype)
    total = F.distribution_focal_loss(logits.double(), target.double(), reduction="sum")
    for factor in (
        0,
        0.5,
        7,
        np.float32(7),
        np.int64(7),
        torch.tensor(7),
        torch.tensor(0.5),
        torch.tensor([9.0]),
    ):
        leaf = logits.clone().requires_grad_()
        loss = F.distribution_focal_loss(leaf, target, avg_factor=factor)
        expected = total / max(float(factor), 1)
        torch.testing.assert_close(loss.double(), expected, rtol=2 * torch.finfo(dtype).eps + 1e-12, atol=0)
        (gradient,) = torch.autograd.grad(loss, leaf)
        other = logits.double().clone().requires_grad_()
        exact(other, target.double(), reduction="sum").backward()
        tolerance = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(
            gradient.double(), other.grad / max(float(factor), 1), rtol=tolerance, atol=tolerance
        )
    empty = torch.empty(0, 16, requires_grad=True)
    nobody = torch.empty(0)
    assert F.distribution_focal_loss(empty, nobody).isnan()
    loss = F.distribution_focal_loss(empty, nobody, avg_factor=torch.tensor(0.0))
    assert loss == 0
    loss.backward()


def test_a_bin_of_minus_infinity_beside_the_target() -> None:
    logits, target = draw((20, 16), torch.float32)
    logits[:, ::5] = -math.inf
    target = (target / 5).floor().clamp(max=2) * 5 + 1.5
    check(logits, target=target, reduction="none")


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_differentiates_twice(reduction: str) -> None:
    logits = torch.randn(3, 4, 7, dtype=torch.float64, requires_grad=True)
    target = torch.rand(3, 4, dtype=torch.float64) * 5.9 + 0.05
    weight = torch.rand(3, dtype=torch.float64)
    assert gradcheck(lambda x: F.distribution_focal_loss(x, target, weight, reduction), logits)
    assert gradgradcheck(lambda x: F.distribution_focal_loss(x, target, weight, reduction), logits)
    needs = (target.floor() + 0.3).requires_grad_()
    assert gradcheck(lambda x, t: F.distribution_focal_loss(x, t, weight, reduction), (logits, needs))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(33, 16), (9, 4, 17)])
def test_in_place(shape: tuple[int, ...], dtype: torch.dtype, reduction: str) -> None:
    logits, target = draw(shape, dtype)
    leaf, other = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    upstream = torch.rand_like(F.distribution_focal_loss(other, target, reduction=reduction))
    F.distribution_focal_loss(other, target, reduction=reduction).backward(upstream)
    F.distribution_focal_loss(leaf * 1, target, reduction=reduction, inplace_backward=True).backward(upstream)
    assert torch.equal(leaf.grad, other.grad)


@pytest.mark.raises_on_the_cpu
@pytest.mark.parametrize("wrong", [15.5, 16.0, -0.001, math.nan, math.inf, -math.inf])
def test_targets_out_of_range(wrong: float) -> None:
    logits, target = draw((70, 16), torch.float32)
    target[66] = wrong
    for dtype in DTYPES:
        for leaf in (logits.to(dtype), logits.to(dtype).requires_grad_()):
            with pytest.raises(IndexError, match=r"Target .* 16 bins"):
                F.distribution_focal_loss(leaf, target)
    with pytest.raises(IndexError, match=r"Target .* 16 bins"):
        F.distribution_focal_loss(logits, target.requires_grad_())
    assert F.distribution_focal_loss(logits, target.detach().nan_to_num(0).clamp(0, 15)).isfinite()


def test_errors() -> None:
    logits, target = draw((6, 16), torch.float32)
    calls: list[tuple[type[Exception], str, Callable[[], Any]]] = [
        (ValueError, "target.*5.*6, 16", lambda: F.distribution_focal_loss(logits, target[:5])),
        (ValueError, "target.*int64", lambda: F.distribution_focal_loss(logits, target.long())),
        (ValueError, "input.*int64", lambda: F.distribution_focal_loss(logits.long(), target)),
        (ValueError, "bins", lambda: F.distribution_focal_loss(torch.empty(6, 0), target)),
        (ValueError, "bins", lambda: F.distribution_focal_loss(torch.tensor(1.0), torch.tensor(1.0))),
        (ValueError, "weight.*5.*6", lambda: F.distribution_focal_loss(logits, target, torch.ones(5))),
        (TypeError, "weight.*2.0", lambda: F.distribution_focal_loss(logits, target, 2.0)),  # type: ignore[arg-type]
        (TypeError, "target.*None", lambda: F.distribution_focal_loss(logits, None)),  # type: ignore[arg-type]
        (ValueError, "reduction.*avg", lambda: F.distribution_focal_loss(logits, target, reduction="avg")),
        (
            ValueError,
            "avg_factor",
            lambda: F.distribution_focal_loss(logits, target, None, "sum", avg_factor=1),
        ),
    ]
    for error, words, call in calls:
        with pytest.raises(error, match=words):
            call()


def test_the_criterion_is_the_function() -> None:
    logits, target = draw((6, 4, 16), torch.float32)
    weight = torch.rand(6)
    for reduction in REDUCTIONS:
        criterion = fused_losses.DistributionFocalLoss(reduction)
        expected = F.distribution_focal_loss(logits, target, weight, reduction)
        assert torch.equal(criterion(logits, target, weight), expected)
        assert reduction in repr(criterion)
    by_factor = fused_losses.DistributionFocalLoss()(logits, target, weight, avg_factor=5)
    assert torch.equal(by_factor, F.distribution_focal_loss(logits, target, weight, avg_factor=5))


def test_what_the_kernels_do_not_reach() -> None:
    logits, target = draw((6, 4, 16), torch.float32)
    expected = F.distribution_focal_loss(logits, target)
    with autocast():
        torch.testing.assert_close(F.distribution_focal_loss(logits, target), expected)
    compiled = torch.compile(lambda x: F.distribution_focal_loss(x, target), backend="eager")
    torch.testing.assert_close(compiled(logits), expected)
    gradient = torch.func.grad(lambda x: F.distribution_focal_loss(x, target))(logits)
    leaf = logits.clone().requires_grad_()
    F.distribution_focal_loss(leaf, target).backward()
    torch.testing.assert_close(gradient, leaf.grad)
    assert F.distribution_focal_loss(logits.to("meta"), target.to("meta")).shape == ()


@pytest.mark.every_level
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("seed", range(5))
def test_neighbours_are_rounded_as_seldom_as_the_other_bins(reduction: str, seed: int) -> None:
    torch.manual_seed(seed)
    logits, target = torch.randn(2000, 16), torch.rand(2000) * 15
    check(logits, target=target, reduction=reduction)


@pytest.mark.every_level
@pytest.mark.parametrize(("logits_near", "upstream"), [(-25.0, 1e32), (25.0, 1e-30)])
def test_upstream_gradients_of_any_size(logits_near: float, upstream: float) -> None:
    data, target = torch.randn(50, 16) + logits_near, torch.rand(50) * 15

    def unreduced(logits: Tensor) -> Tensor:
        return F.distribution_focal_loss(logits, target.to(logits.dtype), reduction="none")

    assert_gradient_of_any_size(unreduced, data, upstream)
