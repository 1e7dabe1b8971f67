from __future__ import annotations

import math
from typing import Any

import plain
import pytest
import torch
from accuracy import (
    CLASSES,
    DTYPES,
    KINDS,
    LOW_DTYPES,
    REDUCTIONS,
    TWO_PATHS,
    arrange,
    assert_accurate,
    draw,
    layouts_of,
    ulps,
)
from torch import Tensor, nn

import fused_losses
import fused_losses.functional as F
from fused_losses import reference

GAMMAS = [0, 0.5, 1.0, 1.5, 2.0, 3.7]
SHAPES = [(7,), (9, 17), (3, 17, 5), (2, 5, 4, 6)]


def exact_sigmoid(inputs: Tensor, targets: Tensor, alpha: float, gamma: float, reduction: str) -> Tensor:
    positive, negative = (alpha, 1 - alpha) if alpha >= 0 else (1, 1)
    return reference.sigmoid_focal_loss(inputs, targets, None, None, positive, negative, gamma, reduction)


def exact_softmax(input: Tensor, target: Tensor, **options: Any) -> Tensor:
    return reference.softmax_focal_loss(
        input,
        target,
        options.get("alpha"),
        options.get("gamma", 2.0),
        options.get("ignore_index", -100),
        options.get("reduction", "mean"),
    )


def check_sigmoid(logits: Tensor, targets: Tensor, alpha: float, gamma: float, reduction: str) -> None:
    soft = not ((targets == 0) | (targets == 1)).all()
    assert_accurate(
        F.sigmoid_focal_loss,
        plain.sigmoid_focal_loss,
        logits,
        exact=exact_sigmoid,
        cancels=bool(soft),
        targets=targets,
        alpha=alpha,
        gamma=gamma,
        reduction=reduction,
    )


def check_softmax(logits: Tensor, target: Tensor, **options: Any) -> None:
    assert_accurate(
        F.softmax_focal_loss, plain.softmax_focal_loss, logits, exact=exact_softmax, target=target, **options
    )


def soft_or_hard(shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> Tensor:
    soft = torch.rand(shape)
    return (soft.round() if kind == "hard" else soft).to(dtype)


@pytest.mark.parametrize("kind", ["hard", "soft"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("alpha", [-1, 0.25])
@pytest.mark.parametrize("gamma", GAMMAS)
def test_sigmoid(gamma: float, alpha: float, dtype: torch.dtype, reduction: str, kind: str) -> None:
    logits = (torch.randn(65, 33) * 2).to(dtype)
    logits.view(-1)[::11] = 0
    check_sigmoid(logits, soft_or_hard((65, 33), kind, dtype), alpha, gamma, reduction)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1,), (2,), (3,), (15,), (16,), (17,), (31,), (33,), (127,), (5, 1000), (3, 50257)]
)
def test_sigmoid_sizes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for reduction in REDUCTIONS:
        check_sigmoid(
            (torch.randn(shape) * 2).to(dtype), soft_or_hard(shape, "hard", dtype), 0.25, 2.0, reduction
        )


@pytest.mark.every_level
@pytest.mark.parametrize("dtype", LOW_DTYPES)
@pytest.mark.parametrize("target", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("gamma", [0, 0.01, *GAMMAS[1:]])
def test_sigmoid_at_every_logit(gamma: float, target: float, dtype: torch.dtype) -> None:
    """A few ulp from -80 to 80, and finite beyond: no pole of u^(gamma - 1), no cancellation."""
    logits = torch.linspace(-80, 80, 3201).to(dtype)
    logits = torch.cat([logits, torch.tensor([-1e4, -500, -104, -95, -88, 88, 95, 104, 500, 1e4]).to(dtype)])
    targets = torch.full_like(logits, target)
    leaf, exact_leaf = logits.clone().requires_grad_(), logits.double().requires_grad_()
    value = F.sigmoid_focal_loss(leaf, targets, gamma=gamma)
    exact = exact_sigmoid(exact_leaf, targets.double(), 0.25, gamma, "none")
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    (exact_gradient,) = torch.autograd.grad(exact.sum(), exact_leaf)
    assert value.isfinite().all()
    assert gradient.isfinite().all()
    for ours, right in ((value, exact), (gradient, exact_gradient)):
        near_zero = right.abs() < torch.finfo(dtype).smallest_normal * 2
        if target == 0.3:  # with a soft target the gradient crosses zero
            near_zero |= right.abs() < 5e-2
        relative = ((ours.double() - right) / right)[~near_zero].abs()
        # u carries its own rounding into u^gamma, gamma times over.
        assert relative.max() <= (8 + 3 * gamma) * torch.finfo(dtype).eps


@pytest.mark.parametrize(("dtype", "reduction"), TWO_PATHS)
@pytest.mark.parametrize(("shape", "layout"), layouts_of(*SHAPES, (3, 40, 80)))
def test_layouts(shape: tuple[int, ...], layout: str, dtype: torch.dtype, reduction: str) -> None:
    logits, index = draw(shape, "ordinary", dtype)
    logits = arrange(logits, layout)
    for target_layout in ("contiguous", "sliced"):
        targets = arrange(soft_or_hard(shape, "hard", dtype), target_layout)
        check_sigmoid(logits, targets, 0.25, 1.5, reduction)
    check_softmax(logits, index, gamma=1.5, reduction=reduction)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradient_of_soft_targets(reduction: str) -> None:
    for gamma in GAMMAS:
        targets = soft_or_hard((33, 17), "soft", torch.float64).clamp(0.01, 0.99).requires_grad_()
        check_sigmoid(torch.randn(33, 17, dtype=torch.float64), targets, 0.25, gamma, reduction)


@pytest.mark.parametrize("dtype", LOW_DTYPES)
def test_sum_over_many_elements(dtype: torch.dtype) -> None:
    logits, targets = torch.randn(1_000_003).to(dtype), torch.rand(1_000_003).round().to(dtype)
    for reduction in ("mean", "sum"):
        exact = exact_sigmoid(logits.double(), targets.double(), 0.25, 2.0, reduction)
        assert ulps(F.sigmoid_focal_loss(logits, targets, reduction=reduction), exact, dtype) <= 1


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("alpha", ["none", "scalar", "per class"])
@pytest.mark.parametrize("gamma", GAMMAS)
def test_softmax(gamma: float, alpha: str, dtype: torch.dtype, reduction: str) -> None:
    logits, index = draw((65, 33), "ordinary", dtype)
    index[::5] = 3
    alphas = {"none": None, "scalar": 0.3, "per class": (torch.rand(33) + 0.1).to(dtype)}
    check_softmax(logits, index, gamma=gamma, alpha=alphas[alpha], ignore_index=3, reduction=reduction)


@pytest.mark.parametrize("dtype", LOW_DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gamma", GAMMAS)
def test_softmax_many_rows(gamma: float, kind: str, dtype: torch.dtype) -> None:
    logits, index = draw((2501, 10), kind, dtype)
    for reduction in ("mean", "none"):
        check_softmax(logits, index, gamma=gamma, reduction=reduction)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", LOW_DTYPES)
@pytest.mark.parametrize("classes", CLASSES)
def test_softmax_class_counts(classes: int, dtype: torch.dtype, reduction: str) -> None:
    logits, index = draw((5 if classes > 1000 else 33, classes), "ordinary", dtype)
    check_softmax(logits, index, reduction=reduction)


@pytest.mark.every_level
@pytest.mark.parametrize("dtype", LOW_DTYPES)
@pytest.mark.parametrize("kind", ["confident", "extreme", "minus infinity first"])
@pytest.mark.parametrize("gamma", [0, 0.01, *GAMMAS[1:]])
def test_softmax_confident_and_extreme(gamma: float, kind: str, dtype: torch.dtype) -> None:
    logits, index = draw((33, 127), kind, dtype)
    check_softmax(logits, index, gamma=gamma, reduction="none")


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5,), (7, 33), (7, 33, 5), (3, 17, 4, 6)])
def test_softmax_shapes(shape: tuple[int, ...], dtype: torch.dtype, reduction: str) -> None:
    logits, index = draw(shape, "ordinary", dtype)
    alpha = torch.rand(shape[min(1, len(shape) - 1)]).to(dtype)
    check_softmax(logits, index, gamma=1.5, alpha=alpha, reduction=reduction)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gamma", [0, 0.5, 2.0])
def test_softmax_ignored_rows(gamma: float, dtype: torch.dtype) -> None:
    logits, index = draw((9, 33), "ordinary", dtype)
    index[::3] = -100
    logits[0], logits[3, ::2], logits[6] = math.nan, math.inf, -math.inf
    leaf = logits.requires_grad_()
    for reduction in REDUCTIONS:
        loss = F.softmax_focal_loss(leaf, index, gamma, reduction=reduction)
        kept = F.softmax_focal_loss(leaf[index != -100], index[index != -100], gamma, reduction="none")
        expected = {"mean": kept.mean(), "sum": kept.sum(), "none": kept.sum()}[reduction]
        torch.testing.assert_close(loss.sum(), expected)
        (gradient,) = torch.autograd.grad(loss.sum(), leaf)
        assert (gradient[::3] == 0).all()
        assert gradient.isfinite().all()
    everything = torch.full((9,), -100)
    assert F.softmax_focal_loss(leaf, everything).isnan()
    assert F.softmax_focal_loss(leaf, everything, reduction="sum") == 0


def test_softmax_alpha_of_no_dimension() -> None:
    logits, target, alpha = torch.randn(6, 5), torch.randint(5, (6,)), torch.tensor(0.25)
    one = F.softmax_focal_loss(logits, target, alpha=0.25)
    for call in (lambda f: f, torch.func.functionalize):
        torch.testing.assert_close(call(lambda x: F.softmax_focal_loss(x, target, alpha=alpha))(logits), one)


def test_softmax_with_gamma_zero_is_cross_entropy() -> None:
    for dtype in DTYPES:
        logits, index = draw((65, 33), "ordinary", dtype)
        for reduction in REDUCTIONS:
            torch.testing.assert_close(
                F.softmax_focal_loss(logits, index, 0.0, reduction=reduction),
                F.cross_entropy(logits, index, reduction=reduction),
            )


def test_sigmoid_with_gamma_zero_is_bce() -> None:
    logits, targets = torch.randn(33, 17), torch.rand(33, 17)
    for reduction in REDUCTIONS:
        torch.testing.assert_close(
            F.sigmoid_focal_loss(logits, targets, alpha=-1, gamma=0, reduction=reduction),
            F.binary_cross_entropy_with_logits(logits, targets, reduction=reduction),
        )


def test_softmax_uint8_targets() -> None:
    logits, index = draw((50, 200), "ordinary", torch.float32)
    index[0], index[1] = 199, 128
    assert torch.equal(
        F.softmax_focal_loss(logits, index.to(torch.uint8)), F.softmax_focal_loss(logits, index)
    )


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (2, 0, 3)])
def test_sigmoid_zero_size(shape: tuple[int, ...]) -> None:
    for reduction in REDUCTIONS:
        leaf = torch.zeros(shape, requires_grad=True)
        loss = F.sigmoid_focal_loss(leaf, torch.zeros(shape), reduction=reduction)
        expected = plain.sigmoid_focal_loss(leaf, torch.zeros(shape), reduction=reduction)
        torch.testing.assert_close(loss, expected, equal_nan=True)
        assert torch.autograd.grad(loss.sum(), leaf)[0].shape == shape


@pytest.mark.parametrize("shape", [(0, 5), (3, 5, 0), (0, 5, 4)])
def test_softmax_zero_size(shape: tuple[int, ...]) -> None:
    index = torch.zeros(shape[:1] + shape[2:]).long()
    for reduction in REDUCTIONS:
        leaf = torch.zeros(shape, requires_grad=True)
        loss = F.softmax_focal_loss(leaf, index, reduction=reduction)
        expected = plain.softmax_focal_loss(leaf, index, reduction=reduction)
        torch.testing.assert_close(loss, expected, equal_nan=True)
        assert torch.autograd.grad(loss.sum(), leaf)[0].shape == shape


def test_mixed_dtypes_promote_as_in_torch() -> None:
    for dtype in DTYPES:
        for target_dtype in DTYPES:
            logits, targets = torch.randn(5, 7).to(dtype), torch.rand(5, 7).round().to(target_dtype)
            ours = F.sigmoid_focal_loss(logits, targets)
            theirs = plain.sigmoid_focal_loss(logits, targets)
            assert ours.dtype == theirs.dtype
            tolerance = 16 * max(torch.finfo(dtype).eps, torch.finfo(target_dtype).eps)
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("base", [nn.BCEWithLogitsLoss, fused_losses.BCEWithLogitsLoss])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", ["none", "pos_weight", "weight", "both"])
@pytest.mark.parametrize("gamma", [0.0, 1.5])
def test_yolo_wrapper(gamma: float, weights: str, dtype: torch.dtype, reduction: str, base: Any) -> None:
    options = {
        "none": {},
        "pos_weight": {"pos_weight": torch.tensor([3.0]).to(dtype)},
        "weight": {"weight": torch.rand(17).to(dtype)},
        "both": {"pos_weight": 3 * torch.rand(17).to(dtype), "weight": torch.rand(33, 1).to(dtype)},
    }[weights]
    criterion = base(reduction=reduction, **options)
    ours = fused_losses.FocalLoss(criterion, gamma, 0.3)
    theirs = plain.FocalLoss(nn.BCEWithLogitsLoss(reduction=reduction, **options), gamma, 0.3)
    assert (ours.reduction, ours.gamma, ours.alpha) == (reduction, gamma, 0.3)
    assert ours.loss_fcn is criterion
    assert criterion.reduction == "none"

    def exact(pred: Tensor, true: Tensor) -> Tensor:
        weight, pos_weight = (
            None if options.get(name) is None else options[name].double() for name in ("weight", "pos_weight")
        )
        return reference.sigmoid_focal_loss(pred, true, weight, pos_weight, 0.3, 0.7, gamma, reduction)

    for kind in ("hard", "soft"):
        assert_accurate(
            ours,
            theirs,
            (torch.randn(33, 17) * 2).to(dtype),
            exact=exact,
            cancels=kind == "soft",
            true=soft_or_hard((33, 17), kind, dtype),
        )


def test_yolo_wrapper_follows_its_attributes() -> None:
    """Programs change gamma, pos_weight and reduction after they have built the wrapper."""
    logits, true = torch.randn(33, 17), torch.rand(33, 17)
    ours = fused_losses.FocalLoss(nn.BCEWithLogitsLoss())
    theirs = plain.FocalLoss(nn.BCEWithLogitsLoss(), gamma=2.0)
    for focal in (ours, theirs):
        focal.gamma, focal.alpha, focal.reduction = 1.0, 0.6, "sum"
        focal.loss_fcn.pos_weight = torch.tensor(2.0)
    torch.testing.assert_close(ours(logits, true), theirs(logits, true))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_yolo_wrapper_with_an_alpha_for_each_class(reduction: str) -> None:
    logits, true, alpha = torch.randn(33, 17), torch.rand(33, 17), torch.rand(17)
    ours = fused_losses.FocalLoss(nn.BCEWithLogitsLoss(reduction=reduction), alpha=alpha)
    theirs = plain.FocalLoss(nn.BCEWithLogitsLoss(reduction=reduction), 2.0, alpha)
    assert_accurate(ours, theirs, logits, true=true, cancels=True)


@pytest.mark.parametrize("kind", ["forward", "its own forward", "hook", "reduction"])
def test_yolo_wrapper_calls_a_criterion_that_is_more_than_its_class(kind: str) -> None:
    class Clipped(nn.BCEWithLogitsLoss):
        def forward(self, input: Tensor, target: Tensor) -> Tensor:
            return super().forward(input.clamp(-1, 1), target)

    def criterion() -> nn.BCEWithLogitsLoss:
        return Clipped() if kind == "forward" else nn.BCEWithLogitsLoss()

    logits, true = torch.randn(33, 17) * 3, torch.rand(33, 17)
    ours, theirs = fused_losses.FocalLoss(criterion()), plain.FocalLoss(criterion(), 2.0, 0.25)
    for focal in (ours, theirs):
        if kind == "its own forward":
            focal.loss_fcn.forward = lambda pred, true: pred * true
        elif kind == "hook":
            focal.loss_fcn.register_forward_hook(lambda module, arguments, output: 2 * output)
        elif kind == "reduction":
            focal.loss_fcn.reduction = "mean"
    torch.testing.assert_close(ours(logits, true), theirs(logits, true))
    with pytest.raises(TypeError, match="no IndexTarget and no avg_factor"):
        ours(logits, true, avg_factor=3)
    with pytest.raises(TypeError, match="no IndexTarget and no avg_factor"):
        ours(logits, fused_losses.IndexTarget(torch.zeros(33, dtype=torch.long)))


def test_float16_with_a_loss_scale() -> None:
    logits, targets = torch.randn(4096, 10).half(), torch.rand(4096, 10).round().half()
    leaf, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    F.sigmoid_focal_loss(leaf, targets, reduction="mean").backward(torch.tensor(32768.0).half())
    (exact_sigmoid(exact, targets.double(), 0.25, 2.0, "mean") * 32768).backward()
    assert leaf.grad is not None
    assert exact.grad is not None
    assert ulps(leaf.grad, exact.grad, torch.float16).max() <= 1
