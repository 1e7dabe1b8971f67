from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as torch_functional
from accuracy import (
    CLASSES,
    DTYPES,
    KINDS,
    LOW_DTYPES,
    REDUCTIONS,
    TWO_PATHS,
    arrange,
    assert_accurate,
    assert_gradient_of_any_size,
    draw,
    layouts_of,
    ulps,
)
from cases import autocast
from torch import Tensor

import fused_losses.functional as F

SHAPES = [(5,), (7, 33), (7, 33, 5), (3, 17, 4, 6)]


def check(logits: Tensor, target: Tensor, **options: Any) -> None:
    assert_accurate(
        F.cross_entropy,
        torch_functional.cross_entropy,
        logits,
        cancels=target.is_floating_point() or bool(options.get("label_smoothing")),
        target=target,
        **options,
    )


def probabilities(logits: Tensor) -> Tensor:
    class_dim = min(1, logits.dim() - 1)
    return torch.randn(logits.shape).softmax(class_dim).to(logits.dtype)


@pytest.mark.every_level
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", CLASSES)
def test_class_counts(classes: int, dtype: torch.dtype, reduction: str) -> None:
    rows = max(5, min(129, 33_000 // classes))
    logits, index = draw((rows, classes), "ordinary", dtype)
    check(logits, index, reduction=reduction)


@pytest.mark.every_level
@pytest.mark.parametrize("target", ["index", "probability"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", LOW_DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_many_rows(kind: str, dtype: torch.dtype, reduction: str, target: str) -> None:
    logits, index = draw((2501, 10), kind, dtype)
    if kind == "minus infinity first" and target == "probability":
        logits = logits.nan_to_num(neginf=-1e4)
    check(logits, index if target == "index" else probabilities(logits), reduction=reduction)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_confident_and_extreme_logits(
    kind: str, dtype: torch.dtype, reduction: str, smoothing: float
) -> None:
    logits, index = draw((33, 1000), kind, dtype)
    check(logits, index, reduction=reduction, label_smoothing=smoothing)


@pytest.mark.every_level
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "target", ["index", "ignored -100", "ignored class", "all of a class", "probability"]
)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
def test_options(weighted: bool, smoothing: float, target: str, dtype: torch.dtype, reduction: str) -> None:
    logits, index = draw((65, 33), "ordinary", dtype)
    options: dict[str, Any] = {"label_smoothing": smoothing, "reduction": reduction}
    if weighted:
        options["weight"] = (torch.rand(33) + 0.1).to(dtype)
        options["weight"][::7] = 0
    if target == "ignored -100":
        index[::3] = -100
    elif target == "ignored class":
        options["ignore_index"] = 4
        index[::3] = 4
    elif target == "all of a class":
        index[:] = 5
    check(logits, probabilities(logits) if target == "probability" else index, **options)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("target", ["index", "probability"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(
    shape: tuple[int, ...], weighted: bool, target: str, dtype: torch.dtype, reduction: str
) -> None:
    logits, index = draw(shape, "ordinary", dtype)
    weight = (torch.rand(logits.shape[min(1, logits.dim() - 1)]) + 0.1).to(dtype) if weighted else None
    check(
        logits,
        index if target == "index" else probabilities(logits),
        reduction=reduction,
        weight=weight,
        label_smoothing=0.1,
    )


@pytest.mark.every_level
@pytest.mark.parametrize(("dtype", "reduction"), TWO_PATHS)
@pytest.mark.parametrize("target", ["index", "probability"])
@pytest.mark.parametrize(("shape", "layout"), layouts_of(*SHAPES, (85, 80)))
def test_layouts(
    shape: tuple[int, ...], layout: str, target: str, dtype: torch.dtype, reduction: str
) -> None:
    logits, index = draw(shape, "ordinary", dtype)
    logits = arrange(logits, layout)
    if target == "index":
        index = arrange(index.double(), layout).long() if layout == "expanded" else index
        index = index.t().contiguous().t() if layout == "transposed" and index.dim() == 2 else index
        check(logits, index, reduction=reduction)
    else:
        check(logits, arrange(probabilities(logits), layout), reduction=reduction)


@pytest.mark.parametrize("weighted", [False, True])
def test_one_class_has_nothing_to_learn(weighted: bool) -> None:
    logits, target = torch.randn(9, 1, requires_grad=True), torch.zeros(9, dtype=torch.int64)
    weight = torch.rand(1) if weighted else None
    for reduction in REDUCTIONS:
        loss = F.cross_entropy(logits, target, weight, reduction=reduction, label_smoothing=0.1)
        assert (loss == 0).all()
        assert (torch.autograd.grad(loss.sum(), logits)[0] == 0).all()


def test_strided_class_indices() -> None:
    logits, index = draw((50, 17), "ordinary", torch.float32)
    strided = torch.stack([index, torch.full_like(index, 99)], 1)[:, 0]
    assert F.cross_entropy(logits, strided) == F.cross_entropy(logits, index)
    assert F.cross_entropy(logits, index[:1].expand(50)) == F.cross_entropy(logits, index[:1].repeat(50))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", LOW_DTYPES)
def test_gradients_of_soft_targets_and_weight(
    dtype: torch.dtype, reduction: str, smoothing: float, weighted: bool
) -> None:
    logits, _ = draw((33, 17), "ordinary", dtype)
    weight = torch.rand(17).to(dtype).requires_grad_() if weighted else None
    check(
        logits,
        probabilities(logits).requires_grad_(),
        weight=weight,
        reduction=reduction,
        label_smoothing=smoothing,
    )


@pytest.mark.every_level
@pytest.mark.parametrize("shape", [(6,), (9, 33), (9, 33, 5)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_ignored_rows_have_zero_gradient_whatever_they_hold(
    smoothing: float, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    logits, index = draw(shape, "ordinary", dtype)
    if len(shape) == 1:
        ignored: Tensor = torch.tensor(True)
    else:
        ignored = torch.arange(index.numel()).reshape(index.shape) % 3 == 0
    index = index.masked_fill(ignored, -100)
    class_dim = min(1, len(shape) - 1)
    ignored_logits = ignored.unsqueeze(class_dim).expand(shape)
    poison = torch.tensor([math.inf, -math.inf, math.nan]).to(dtype).repeat(math.prod(shape))
    dirty = logits.where(~ignored_logits, poison[: logits.numel()].view(shape)).requires_grad_()
    clean = logits.clone().requires_grad_()
    for reduction in REDUCTIONS:
        loss = F.cross_entropy(dirty, index, reduction=reduction, label_smoothing=smoothing)
        expected = F.cross_entropy(clean, index, reduction=reduction, label_smoothing=smoothing)
        assert torch.equal(loss.nan_to_num(7), expected.nan_to_num(7))
        (gradient,) = torch.autograd.grad(loss.sum(), dirty)
        assert (gradient[ignored_logits] == 0).all()
        if not ignored.all():
            (expected_gradient,) = torch.autograd.grad(expected.sum(), clean)
            assert torch.equal(gradient, expected_gradient)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_all_rows_ignored(weighted: bool, smoothing: float, dtype: torch.dtype) -> None:
    logits = torch.randn(5, 7).to(dtype).requires_grad_()
    index = torch.full((5,), 3)
    weight = torch.rand(7).to(dtype) if weighted else None

    def loss(reduction: str) -> Tensor:
        return F.cross_entropy(
            logits, index, weight, ignore_index=3, reduction=reduction, label_smoothing=smoothing
        )

    assert loss("mean").isnan()
    assert loss("sum") == 0
    assert (loss("none") == 0).all()
    (gradient,) = torch.autograd.grad(loss("sum"), logits)
    assert (gradient == 0).all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_weights_that_sum_to_zero(reduction: str) -> None:
    logits, index = draw((5, 7), "ordinary", torch.float32)
    index = index.clamp(max=5)
    for weight, label_smoothing in ((torch.zeros(7), 0.0), (torch.arange(7).float() // 6, 0.1)):
        arguments: dict[str, Any] = {"target": index, "weight": weight, "reduction": reduction}
        arguments["label_smoothing"] = label_smoothing
        torch.testing.assert_close(
            F.cross_entropy(logits, **arguments),
            torch_functional.cross_entropy(logits, **arguments),
            equal_nan=True,
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("classes", [5, 1000])
@pytest.mark.parametrize("target", ["index", "probability"])
@pytest.mark.parametrize(
    "poison", [[math.nan], [math.inf], [math.inf, math.inf], [-math.inf], [math.inf, -math.inf], "all -inf"]
)
def test_rows_with_nan_and_infinity(poison: Any, target: str, classes: int, dtype: torch.dtype) -> None:
    """nan and infinity come out where torch has them, and stay in their row."""
    logits, index = draw((9, classes), "ordinary", dtype)
    for row in (2, 7):
        if poison == "all -inf":
            logits[row] = -math.inf
        for column, value in enumerate(poison if isinstance(poison, list) else []):
            logits[row, (row * 31 + column) % classes] = value
        if row == 7:
            index[row] = (row * 31) % classes
    goal = index if target == "index" else probabilities(logits)
    results = []
    for cross_entropy in (F.cross_entropy, torch_functional.cross_entropy):
        leaf = logits.clone().requires_grad_()
        loss = cross_entropy(leaf, goal, reduction="none")
        (gradient,) = torch.autograd.grad(loss.sum(), leaf)
        results.append((loss.detach(), gradient))
    (loss, gradient), (their_loss, their_gradient) = results
    tolerance = {torch.bfloat16: 2e-2, torch.float16: 2e-3}.get(dtype, 1e-5)
    torch.testing.assert_close(loss, their_loss, equal_nan=True, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(gradient, their_gradient, equal_nan=True, rtol=tolerance, atol=tolerance)


# What the rows of one call may be away from 0, in an order in which none is like the one before.
OFFSETS = [0.0, 1000.0, -1000.0, 20.0, 60.0, -40.0, 1e4, 45.0, -1e4, 90.0, 3e6, 0.0, -3e6, 5.0, 1e30]


@pytest.mark.every_level
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("alike", [1, 40])
@pytest.mark.parametrize("shape", [(301, 10), (301, 40), (301, 1100), (2, 19, 13, 24)])
def test_rows_far_from_zero_and_from_each_other(
    shape: tuple[int, ...], alike: int, dtype: torch.dtype, reduction: str, smoothing: float
) -> None:
    logits, index = draw(shape, "ordinary", dtype)
    offset = torch.tensor(OFFSETS, dtype=torch.float64).repeat_interleave(alike)
    offset = offset.repeat(index.numel() // len(offset) + 1)[: index.numel()].view(index.shape)
    logits = (logits.double() + offset.unsqueeze(1)).to(dtype)
    check(logits, index, reduction=reduction, label_smoothing=smoothing)
    if reduction != "none" and dtype == torch.float32:
        leaf = logits.clone().requires_grad_()
        loss = F.cross_entropy(leaf, index, reduction=reduction, label_smoothing=smoothing)
        (gradient,) = torch.autograd.grad(loss, leaf)
        leaf = logits.clone().requires_grad_()
        again = F.cross_entropy(
            leaf * 1, index, reduction=reduction, label_smoothing=smoothing, inplace_backward=True
        )
        (overwriting,) = torch.autograd.grad(again, leaf)
        torch.testing.assert_close(overwriting, gradient, rtol=2e-6, atol=gradient.abs().max().item() * 1e-6)
        torch.testing.assert_close(again, loss, rtol=1e-6, atol=0)


@pytest.mark.every_level
@pytest.mark.parametrize("target_logit", [30.0, 51.0, 59.0, 61.0, 80.0, -30.0, -100.0, -1e5])
@pytest.mark.parametrize("classes", [10, 40])
def test_a_target_far_from_the_others(classes: int, target_logit: float) -> None:
    """Relative to the row's own tiny loss, which torch's double rounds to 0."""
    logits, index = draw((130, classes), "ordinary", torch.float32)
    goal = index.unsqueeze(1)
    logits.scatter_(1, goal, target_logit)
    leaf = logits.clone().requires_grad_()
    loss = F.cross_entropy(leaf, index, reduction="none")
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)

    exact = logits.double()
    own = exact.gather(1, goal)
    others = exact.scatter(1, goal, -math.inf).logsumexp(1, keepdim=True)
    expected = (exact - torch.logaddexp(others, own)).exp().scatter(1, goal, -torch.sigmoid(others - own))
    nll = torch_functional.softplus(others - own).squeeze(1)
    torch.testing.assert_close(loss.double(), nll, rtol=8e-6, atol=0)
    torch.testing.assert_close(gradient.double(), expected, rtol=8e-6, atol=1e-37)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("target", ["index", "probability"])
@pytest.mark.parametrize("shape", [(0, 5), (3, 5, 0), (0, 5, 4), (0, 0), (2, 3, 0, 7)])
def test_zero_size(shape: tuple[int, ...], target: str, reduction: str) -> None:
    logits = torch.zeros(shape, requires_grad=True)
    goal = torch.zeros(shape) if target == "probability" else torch.zeros(shape[:1] + shape[2:]).long()
    loss = F.cross_entropy(logits, goal, reduction=reduction)
    expected = torch_functional.cross_entropy(logits, goal, reduction=reduction)
    torch.testing.assert_close(loss, expected, equal_nan=True)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert gradient.shape == logits.shape


def test_no_classes_and_probabilities() -> None:
    logits = torch.zeros(3, 0)
    for reduction in REDUCTIONS:
        torch.testing.assert_close(
            F.cross_entropy(logits, logits, reduction=reduction),
            torch_functional.cross_entropy(logits, logits, reduction=reduction),
            equal_nan=True,
        )


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_uint8_class_indices(reduction: str) -> None:
    logits, index = draw((50, 200), "ordinary", torch.float32)
    index[0], index[1] = 199, 128
    check(logits, index.to(torch.uint8), reduction=reduction)
    assert torch.equal(
        F.cross_entropy(logits, index.to(torch.uint8), reduction=reduction),
        F.cross_entropy(logits, index, reduction=reduction),
    )


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_float16_with_a_loss_scale(reduction: str) -> None:
    """A gradient that is too small for fp16 until the loss scale multiplies it must not be rounded before."""
    logits, index = draw((4096, 10), "ordinary", torch.float16)
    scale = 32768.0 if reduction == "mean" else 1024.0
    leaf, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    F.cross_entropy(leaf, index, reduction=reduction).backward(torch.tensor(scale).half())
    (torch_functional.cross_entropy(exact, index, reduction=reduction) * scale).backward()
    assert leaf.grad is not None
    assert exact.grad is not None
    assert ulps(leaf.grad, exact.grad, torch.float16).max() <= 1


@pytest.mark.every_level
@pytest.mark.parametrize("dtype", LOW_DTYPES)
@pytest.mark.parametrize("margin", [3, 7, 12, 15])
def test_confident_gradients_keep_their_digits(margin: float, dtype: torch.dtype) -> None:
    """1 subtracted from a rounded p_y costs the gradient all of its digits at the target."""
    logits = (torch.randn(40, 64) * 0.1).to(dtype)
    index = torch.randint(64, (40,))
    logits[torch.arange(40), index] = margin
    leaf, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    F.cross_entropy(leaf, index, reduction="none").sum().backward()
    torch_functional.cross_entropy(exact, index, reduction="none").sum().backward()
    assert leaf.grad is not None
    assert exact.grad is not None
    # The difference to the row's maximum is rounded before its exponential is taken: an ulp for each unit.
    assert ulps(leaf.grad, exact.grad, dtype).max() <= 4 + margin


@pytest.mark.parametrize("dtype", LOW_DTYPES)
def test_sum_over_many_rows(dtype: torch.dtype) -> None:
    """The error of the sum does not grow with the number of rows."""
    logits, index = draw((200_001, 3), "ordinary", dtype)
    for reduction in ("mean", "sum"):
        exact = torch_functional.cross_entropy(logits.double(), index, reduction=reduction)
        assert ulps(F.cross_entropy(logits, index, reduction=reduction), exact, dtype) <= 1


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_autocast(reduction: str) -> None:
    layer = torch.nn.Linear(8, 5)
    data, index = torch.randn(16, 8), torch.randint(5, (16,))
    with autocast():
        ours = F.cross_entropy(layer(data), index, reduction=reduction)
        theirs = torch_functional.cross_entropy(layer(data), index, reduction=reduction)
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("target_dtype", "weight_dtype"), [(torch.float64, None), (torch.float32, torch.float64)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_mixed_dtypes_as_torch(dtype: torch.dtype, target_dtype: torch.dtype, weight_dtype: Any) -> None:
    logits = torch.randn(5, 7).to(dtype)
    target = probabilities(logits).to(target_dtype)
    weight = torch.rand(7, dtype=weight_dtype) if weight_dtype else None
    torch.testing.assert_close(
        F.cross_entropy(logits, target, weight), torch_functional.cross_entropy(logits, target, weight)
    )


@pytest.mark.every_level
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("classes", [40, 81, 1000, 8192, 8193])
def test_in_place_where_rows_are_far_from_zero(classes: int, label_smoothing: float) -> None:
    """Rows whose exponentials need another shift than the row before them: it is found after the first try."""
    torch.manual_seed(classes)
    logits = torch.randn(24, classes) + torch.tensor([0.0, 300, -300]).repeat(8)[:, None]
    logits[5, : classes // 2] = -math.inf
    target = torch.randint(classes // 2, classes, (24,))
    upstream = torch.randn(())
    results = []
    for inplace in (False, True):
        leaf = logits.clone().requires_grad_()
        loss = F.cross_entropy(leaf * 1, target, label_smoothing=label_smoothing, inplace_backward=inplace)
        loss.backward(upstream)
        results.append((loss.detach(), leaf.grad))
    (loss, grad), (loss_in_place, grad_in_place) = results
    torch.testing.assert_close(loss_in_place, loss, rtol=1e-6, atol=0, equal_nan=True)
    torch.testing.assert_close(grad_in_place, grad, rtol=1e-5, atol=1e-9)


@pytest.mark.every_level
@pytest.mark.parametrize("classes", [10, 64])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("weighted", [False, True])
def test_rows_a_wrong_class_has_all_of(classes: int, reduction: str, weighted: bool) -> None:
    """Their gradient is the scale itself: nothing hides how often it has been rounded."""
    rows = torch.arange(2000)
    target = torch.randint(classes, (2000,))
    logits = torch.randn(2000, classes) * 2
    logits[rows, (target + 1) % classes] = 30.0
    weight = torch.rand(classes) * 3 if weighted else None
    check(logits, target, weight=weight, reduction=reduction)


@pytest.mark.every_level
@pytest.mark.parametrize("classes", [2, 5, 10, 20])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_confident_rows_with_probabilities(classes: int, reduction: str) -> None:
    """The loss is what the sum of the terms has above 1, and no target says which term is the 1."""
    target = torch.randint(classes, (4000,))
    logits = torch.randn(4000, classes) * 0.5
    logits[torch.arange(4000), target] += 10
    check(logits, torch_functional.one_hot(target, classes).to(logits.dtype), reduction=reduction)


@pytest.mark.every_level
@pytest.mark.parametrize("loss_of", [F.cross_entropy, F.softmax_focal_loss])
@pytest.mark.parametrize("classes", [10, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("logits_near", "size"),
    [(45.0, 1e-20), (45.0, 1e-25), (50.0, 1e-12), (-25.0, 1e30), (-10.0, 1e36), (0.0, 0.0)],
)
def test_scales_and_sums_of_any_size(
    loss_of: Any, classes: int, dtype: torch.dtype, logits_near: float, size: float
) -> None:
    """exp(x - 0) may be as far from 1 as the upstream gradient or a weight: their quotient is none that overflows."""
    data, target = torch.randn(8, classes) + logits_near, torch.randint(classes, (8,))
    keyword = "weight" if loss_of is F.cross_entropy else "alpha"
    for upstream, weight in ((size, 1.0), (1.0, size)):

        def weighted(logits: Tensor, weight: float = weight) -> Tensor:
            weights = torch.full((classes,), weight, dtype=logits.dtype)
            loss: Tensor = loss_of(logits, target, **{keyword: weights}, reduction="none")
            return loss

        assert_gradient_of_any_size(weighted, data.to(dtype), upstream)


@pytest.mark.every_level
@pytest.mark.parametrize("classes", [10, 40])
@pytest.mark.parametrize("label_smoothing", [0.1, 1.0])
@pytest.mark.parametrize(("logits_near", "upstream"), [(45.0, 1e-25), (-25.0, 1e30)])
def test_scales_of_smoothed_rows(
    classes: int, label_smoothing: float, logits_near: float, upstream: float
) -> None:
    data, target = torch.randn(8, classes) + logits_near, torch.randint(classes, (8,))

    def smoothed(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits, target, label_smoothing=label_smoothing, reduction="none")

    assert_gradient_of_any_size(smoothed, data, upstream)
