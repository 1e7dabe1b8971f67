"""Index targets and the losses of a detector's head."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import cases
import plain
import pytest
import torch
import torch.nn.functional as torch_functional
from accuracy import DTYPES, LOW_DTYPES, REDUCTIONS, arrange, assert_accurate
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

import fused_losses
import fused_losses.functional as F
from fused_losses import IndexTarget, reference

BACKGROUND, IGNORED = -1, -2


def plain_focal(
    input: Tensor, target: Tensor, alpha: Any = 0.25, reduction: str = "mean", **options: Any
) -> Tensor:
    """torchvision's with the factors that YOLOv5's wrapper adds, and a tensor alpha."""
    p = torch.sigmoid(input)
    weights = {name: options.get(name) for name in ("weight", "pos_weight")}
    ce = torch_functional.binary_cross_entropy_with_logits(input, target, reduction="none", **weights)
    p_t = p * target + (1 - p) * (1 - target)
    loss = (alpha * target + (1 - alpha) * (1 - target)) * (1 - p_t) ** options.get("gamma", 2.0) * ce
    return loss if reduction == "none" else getattr(loss, reduction)()


def exact_of(
    elementwise: reference.Elementwise, positive: float, negative: float, gamma: float
) -> Callable[..., Tensor]:
    """The formula in the readable form, for fp64."""

    def loss(input: Tensor, target: Tensor, reduction: str = "mean", **options: Any) -> Tensor:
        balance: Any = options.get("alpha", None)
        if isinstance(balance, Tensor):
            balance = (balance, 1 - balance)
        elif balance is not None and "gamma" not in options and elementwise is reference.focal_elements:
            balance = (balance, 1 - balance)
        else:
            balance = (positive, negative)
        values = elementwise(
            input, target, options.get("pos_weight"), *balance, gamma, options.get("detach_weight", False)
        )
        if options.get("weight") is not None:
            values = values * options["weight"]
        return values if reduction == "none" else getattr(values, reduction)()

    return loss


# name: ours, as people write it with a dense target, the same in fp64
LOSSES: dict[str, tuple[Callable[..., Any], Callable[..., Tensor], Callable[..., Tensor]]] = {
    "bce": (
        F.binary_cross_entropy_with_logits,
        torch_functional.binary_cross_entropy_with_logits,
        exact_of(reference.bce_elements, 1, 1, 0),
    ),
    "focal": (F.sigmoid_focal_loss, plain_focal, exact_of(reference.focal_elements, 0.25, 0.75, 2)),
    "quality": (
        F.quality_focal_loss,
        plain.quality_focal_loss,
        exact_of(reference.quality_focal_elements, 1, 1, 2),
    ),
    "varifocal": (F.varifocal_loss, plain.varifocal_loss, exact_of(reference.varifocal_elements, 1, 0.75, 2)),
}
every_loss = pytest.mark.parametrize("name", LOSSES)


def draw_labels(shape: tuple[int, ...], classes: int, *, ignored: bool = True) -> Tensor:
    """Labels with background of both kinds, and ignored ones: a third of each, few or no positives in some rows."""
    labels = torch.randint(classes, shape)
    kind = torch.rand(shape)
    labels[kind < 0.3] = BACKGROUND
    labels[(kind >= 0.3) & (kind < 0.5)] = classes
    if ignored:
        labels[kind > 0.8] = IGNORED
    return labels


def logits_of(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return (torch.randn(shape, dtype=torch.float64) * 3 - 1).to(dtype)


def check(
    name: str,
    logits: Tensor,
    target: IndexTarget,
    *,
    reduction: str = "mean",
    class_dim: int = -1,
    dense_options: dict[str, Any] | None = None,
    autocast: bool = False,
    **options: Any,
) -> None:
    """An index target and the dense one it stands for, by the accuracy rule. `dense_options`: `options` as they
    broadcast to the logits, where ours take them in another shape. `autocast`: ours under it, torch's in float32."""
    ours, theirs, exact = LOSSES[name]
    classes = logits.shape[class_dim]
    dense, kept = target.dense(classes, class_dim, torch.float64)
    given = options | (dense_options or {})
    factor = options.get("avg_factor")
    if factor is not None:
        del given["avg_factor"]
        divisor = max(float(factor), 1.0)
    else:
        divisor = kept.sum().item()

    def of_dense(loss: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        def call(input: Tensor) -> Tensor:
            input = input.float() if autocast and input.dtype != torch.float64 else input
            arguments = {
                key: value.to(input.dtype) if isinstance(value, Tensor) else value
                for key, value in given.items()
            }
            each = loss(input, dense.to(input.dtype), reduction="none", **arguments)
            each = torch.where(kept, each, 0)
            return each if reduction == "none" else each.sum() / (divisor if reduction == "mean" else 1)

        return call

    def indexed(input: Tensor) -> Tensor:
        with cases.autocast(enabled=autocast):
            result: Tensor = ours(input, target, reduction=reduction, class_dim=class_dim, **options)
        return result

    soft = target.scores is not None or target.positive != 1 or target.negative != 0
    close = soft and name == "quality"  # |t - s|^beta
    assert_accurate(
        indexed, of_dense(theirs), logits, exact=of_dense(exact), cancels=soft, value_cancels=close
    )


@pytest.mark.every_level
@every_loss
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [1, 3, 16, 80])
def test_index_target(classes: int, dtype: torch.dtype, reduction: str, name: str) -> None:
    shape = (4000 // classes + 3, classes)
    labels = draw_labels(shape[:1], classes)
    check(name, logits_of(shape, dtype), IndexTarget(labels), reduction=reduction)


@every_loss
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_and_label_smoothing(dtype: torch.dtype, reduction: str, name: str) -> None:
    labels = draw_labels((151,), 33)
    scores = torch.rand(151).clamp(0.01).bfloat16().to(torch.float16 if dtype == torch.float16 else dtype)
    logits = logits_of((151, 33), dtype)
    check(name, logits, IndexTarget(labels, scores), reduction=reduction)
    check(name, logits, IndexTarget(labels, scores, negative=0.125), reduction=reduction)
    check(name, logits, IndexTarget(labels, positive=0.9375, negative=0.0625), reduction=reduction)


@pytest.mark.every_level
@every_loss
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "misaligned", "sliced", "stepped"])
@pytest.mark.parametrize(
    ("shape", "class_dim"),
    [
        ((7,), 0),
        ((9, 17), -1),
        ((9, 17), 0),
        ((3, 17, 95), 1),
        ((2, 5, 4, 6), 1),
        ((2, 3, 5, 6, 19), -1),
        ((4, 1, 5), 1),
    ],
)
def test_layouts_and_class_dim(shape: tuple[int, ...], class_dim: int, layout: str, name: str) -> None:
    dim = class_dim % len(shape)
    anchors = shape[:dim] + shape[dim + 1 :]
    if len(shape) == 1 and layout == "transposed":
        pytest.skip("one dimension")
    for dtype, reduction in ((torch.float32, "mean"), (torch.bfloat16, "none")):
        labels = draw_labels(anchors, shape[dim])
        target = IndexTarget(labels, torch.rand(anchors).bfloat16().to(dtype))
        check(
            name, arrange(logits_of(shape, dtype), layout), target, reduction=reduction, class_dim=class_dim
        )
        if labels.dim() > 1:
            turned = labels.transpose(0, -1).contiguous().transpose(0, -1)
            check(
                name, logits_of(shape, dtype), IndexTarget(turned), reduction=reduction, class_dim=class_dim
            )


@every_loss
def test_expanded_labels_and_logits(name: str) -> None:
    labels = draw_labels((1, 9), 17)
    check(name, logits_of((5, 9, 17), torch.float32), IndexTarget(labels.expand(5, 9)))
    check(name, logits_of((1, 9, 17), torch.float32).expand(5, 9, 17), IndexTarget(draw_labels((5, 9), 17)))


@pytest.mark.parametrize("kind", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_labels_of_any_integer_type(kind: torch.dtype) -> None:
    labels = torch.tensor([0, 4, 5, 2])
    logits = torch.randn(4, 5)
    assert torch.equal(
        F.binary_cross_entropy_with_logits(logits, IndexTarget(labels.to(kind))),
        F.binary_cross_entropy_with_logits(logits, IndexTarget(labels)),
    )


def test_background_and_ignore_index_are_the_callers() -> None:
    logits = logits_of((6, 5), torch.float32)
    target = IndexTarget(torch.tensor([0, 255, 3, 5, 7, 2]), background=7, ignore_index=255)
    check("focal", logits, target)
    same = IndexTarget(torch.tensor([0, -2, 3, -1, -1, 2]))
    assert torch.equal(F.sigmoid_focal_loss(logits, target), F.sigmoid_focal_loss(logits, same))
    assert torch.equal(  # class 0 may be the background
        F.sigmoid_focal_loss(logits, IndexTarget(torch.tensor([0, 1, 2, 3, 4, 0]), background=0)),
        F.sigmoid_focal_loss(logits, IndexTarget(torch.tensor([-1, 1, 2, 3, 4, -1]))),
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "class_dim"), [((101, 17), -1), ((3, 17, 40), 1)])
@pytest.mark.parametrize("name", ["bce", "focal"])
def test_all_weights_together(
    name: str, shape: tuple[int, ...], class_dim: int, dtype: torch.dtype, reduction: str
) -> None:
    dim = class_dim % len(shape)
    anchors, classes = shape[:dim] + shape[dim + 1 :], shape[dim]

    def per_class(values: Tensor) -> Tensor:
        return values.view(-1, *(1,) * (len(shape) - 1 - dim))

    weight, pos_weight, alpha = (
        torch.rand(size).bfloat16().add(0.1).to(dtype) for size in (anchors, (classes,), (classes,))
    )
    target = IndexTarget(draw_labels(anchors, classes))
    dense_options = {"weight": weight.unsqueeze(dim), "pos_weight": per_class(pos_weight)}
    options: dict[str, Any] = {"weight": weight, "pos_weight": pos_weight, "reduction": reduction}
    if name == "focal":
        options["alpha"], dense_options["alpha"] = alpha, per_class(alpha)
    if reduction == "mean":
        options["avg_factor"] = torch.tensor(37.5)
    logits = logits_of(shape, dtype)
    check(name, logits, target, class_dim=class_dim, dense_options=dense_options, **options)
    options["weight"] = weight.unsqueeze(dim)  # (N, 1)
    check(name, logits, target, class_dim=class_dim, dense_options=dense_options, **options)


@every_loss
def test_weights_of_the_arithmetics_dtype(name: str) -> None:
    """A float32 weight beside bfloat16 logits loses none of its digits."""
    weight = torch.rand(31) + 0.1
    logits, labels = logits_of((31, 9), torch.bfloat16), draw_labels((31,), 9)
    ours = LOSSES[name][0]
    wide = ours(logits.float(), IndexTarget(labels), weight=weight, reduction="sum")
    torch.testing.assert_close(
        ours(logits, IndexTarget(labels), weight=weight, reduction="sum"), wide.bfloat16(), rtol=0, atol=0
    )


@every_loss
@pytest.mark.parametrize("dtype", DTYPES)
def test_ignored_anchors_let_nothing_through(dtype: torch.dtype, name: str) -> None:
    ours = LOSSES[name][0]
    for shape, class_dim in (((24, 19), -1), ((2, 19, 12), 1)):
        logits = logits_of(shape, dtype)
        labels = draw_labels((24,) if class_dim == -1 else (2, 12), 19, ignored=False)
        labels.view(-1)[::3] = IGNORED
        kept = (labels != IGNORED).unsqueeze(class_dim).expand(shape)
        clean, dirty = logits.clone().requires_grad_(), logits.clone()
        dirty[~kept] = torch.tensor([math.nan, math.inf, -math.inf] * 1000)[: int((~kept).sum())].to(dtype)
        dirty.requires_grad_()
        weight = torch.ones_like(labels, dtype=dtype)
        weight[labels == IGNORED] = math.nan
        for reduction in REDUCTIONS:
            values = [
                ours(leaf, IndexTarget(labels), reduction=reduction, class_dim=class_dim, weight=w)
                for leaf, w in ((clean, None), (dirty, weight))
            ]
            assert torch.equal(*values)
            gradients = [
                torch.autograd.grad(value.sum(), leaf)[0]
                for value, leaf in zip(values, (clean, dirty), strict=True)
            ]
            assert torch.equal(*gradients)
            assert (gradients[1][~kept] == 0).all()
            assert (gradients[1][kept] != 0).any()


@every_loss
@pytest.mark.parametrize("dtype", DTYPES)
def test_avg_factor(dtype: torch.dtype, name: str) -> None:
    ours = LOSSES[name][0]
    logits, labels = logits_of((40, 17), dtype), draw_labels((40,), 17)
    dense, kept = IndexTarget(labels).dense(17, dtype=dtype)
    for factor in (0, 0.25, 1, 7.5, 1e9):
        for given in (factor, torch.tensor(factor), torch.tensor([factor]).to(dtype)):
            divisor = max(float(given), 1)
            check(name, logits, IndexTarget(labels), avg_factor=given)
            for target in (IndexTarget(labels), dense):
                leaf = logits.clone().requires_grad_()
                loss = ours(leaf, target, avg_factor=given, reduction="mean")
                loss.backward()
                other = logits.double().clone().requires_grad_()
                total = ours(other, dense.double(), reduction="none")
                if target is not dense:
                    total = torch.where(kept, total, 0)
                (total.sum() / divisor).backward()
                torch.testing.assert_close(
                    loss.double(), total.sum() / divisor, rtol=2 * torch.finfo(dtype).eps + 1e-12, atol=1e-7
                )
                assert leaf.grad is not None
                assert other.grad is not None
                tolerance = 4 * torch.finfo(dtype).eps
                torch.testing.assert_close(
                    leaf.grad.double(), other.grad, rtol=tolerance, atol=tolerance / 10
                )


@every_loss
def test_avg_factor_of_one_element_leaves_a_number(name: str) -> None:
    logits, target, factor = torch.randn(6, 5, dtype=torch.float64), torch.rand(6, 5), torch.tensor([3.0])

    def loss(x: Tensor) -> Tensor:
        value: Tensor = LOSSES[name][0](x, target.to(x.dtype), avg_factor=factor, reduction="mean")
        assert value.shape == ()
        return value

    leaf = logits.clone().requires_grad_()
    gradients = torch.autograd.grad(loss(leaf), leaf)[0]
    assert torch.autograd.gradgradcheck(loss, leaf)
    torch.testing.assert_close(torch.func.grad(loss)(logits), gradients)


@every_loss
def test_avg_factor_of_the_host_beside_logits_of_a_device(name: str) -> None:
    logits, target = torch.randn(4, 5, device="meta"), torch.rand(4, 5, device="meta")
    for factor in (torch.tensor(3), torch.tensor([3.0])):
        loss = LOSSES[name][0](logits, target, avg_factor=factor, reduction="mean")
        assert loss.is_meta
        assert loss.shape == ()


@every_loss
@pytest.mark.parametrize("anchors", [4, 5, 6])
def test_a_weight_of_one_dimension_is_one_an_anchor(name: str, anchors: int) -> None:
    """Also where there are as many anchors as classes."""
    ours = LOSSES[name][0]
    logits, target = torch.randn(anchors, 5), IndexTarget(torch.randint(5, (anchors,)))
    each = ours(logits, target, reduction="none")
    of_anchors, of_classes = torch.rand(anchors), torch.rand(1, 5)
    torch.testing.assert_close(
        ours(logits, target, weight=of_anchors, reduction="none"), each * of_anchors.view(-1, 1)
    )
    torch.testing.assert_close(ours(logits, target, weight=of_classes, reduction="none"), each * of_classes)
    if anchors != 5:
        with pytest.raises(ValueError, match=r"weight.*\(5,\).*\(1, 5\)"):
            ours(logits, target, weight=of_classes[0])


@every_loss
def test_a_weight_that_would_be_one_an_anchor_and_one_a_class_is_refused(name: str) -> None:
    ours = LOSSES[name][0]
    logits, target = torch.randn(3, 3, 3), IndexTarget(torch.randint(3, (3, 3)))
    weight, each = torch.rand(3, 3), ours(logits, target, reduction="none")
    with pytest.raises(ValueError, match=r"weight.*\(3, 3, 1\).*\(1, 3, 3\)"):
        ours(logits, target, weight=weight)
    for shape in ((3, 3, 1), (1, 3, 3)):
        explicit = weight.view(shape)
        weighted = ours(logits, target, weight=explicit, reduction="none")
        torch.testing.assert_close(weighted, each * explicit)
    of_classes = torch.rand(3)
    torch.testing.assert_close(ours(logits, target, weight=of_classes, reduction="none"), each * of_classes)


@pytest.mark.parametrize("anchors", [4, 5, 6])
@pytest.mark.parametrize("class_dim", [-1, 0])
@pytest.mark.parametrize("focal", [False, True])
def test_a_criterions_weight_is_one_a_class(anchors: int, class_dim: int, focal: bool) -> None:
    weight = torch.rand(5)
    logits, labels = torch.randn(anchors, 5), torch.randint(5, (anchors,))
    dense = torch_functional.one_hot(labels, 5).float()
    criterion: Any = fused_losses.BCEWithLogitsLoss(weight, class_dim=class_dim)
    expected = torch_functional.binary_cross_entropy_with_logits(logits, dense, weight)
    if focal:
        criterion = fused_losses.FocalLoss(criterion, gamma=0.0, alpha=0.5)
        expected = expected / 2
    given = logits if class_dim == -1 else logits.T
    torch.testing.assert_close(criterion(given, IndexTarget(labels)), expected)


@every_loss
def test_nothing_to_average(name: str) -> None:
    ours = LOSSES[name][0]
    all_ignored = IndexTarget(torch.full((4,), IGNORED))
    nobody = IndexTarget(torch.empty(0, dtype=torch.int64))
    elements = F.sigmoid_focal_loss(torch.randn(0, 5), nobody, reduction="none")
    assert elements.shape == (0, 5)
    assert elements.dtype == torch.float32
    for logits, target in ((torch.randn(4, 5), all_ignored), (torch.randn(0, 5), nobody)):
        leaf = logits.requires_grad_()
        nothing = ours(leaf, target, reduction="mean")
        assert nothing.isnan()
        assert (torch.autograd.grad(nothing, leaf)[0] == 0).all()
        assert ours(leaf, target, reduction="sum") == 0
        loss = ours(leaf, target, avg_factor=torch.tensor(0), reduction="mean")
        loss.backward()
        assert loss == 0
        assert leaf.grad is not None
        assert (leaf.grad == 0).all()
    assert ours(
        torch.randn(3, 5), IndexTarget(torch.tensor([0, 1, 2])), avg_factor=math.nan, reduction="mean"
    ).isnan()


@pytest.mark.every_level
@pytest.mark.parametrize("dtype", LOW_DTYPES)
@pytest.mark.parametrize("name", ["quality", "varifocal"])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 1.5, 2.0, 3.7])
@pytest.mark.parametrize("kind", ["hard", "soft", "sparse"])
def test_dense_targets(kind: str, gamma: float, name: str, dtype: torch.dtype) -> None:
    key = "beta" if name == "quality" else "gamma"
    ours, theirs, _ = LOSSES[name]
    elementwise = {"quality": reference.quality_focal_elements, "varifocal": reference.varifocal_elements}[
        name
    ]
    exact = exact_of(elementwise, 1, 0.75, gamma)
    logits, target = logits_of((65, 33), dtype), torch.rand(65, 33).bfloat16().to(dtype)
    if kind == "hard":
        target = target.round()
    if kind == "sparse":
        target[torch.rand(65, 33) < 0.9] = 0
    for reduction in ("mean", "none"):
        assert_accurate(
            lambda x, reduction=reduction, **o: ours(x, o["target"], reduction=reduction, **{key: gamma}),
            lambda x, reduction=reduction, **o: theirs(x, o["target"], reduction=reduction, **{key: gamma}),
            logits,
            exact=lambda x, reduction=reduction, **o: exact(x, o["target"], reduction=reduction, gamma=gamma),
            cancels=kind != "hard",
            value_cancels=kind != "hard" and name == "quality",
            target=target,
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_varifocal_options(dtype: torch.dtype) -> None:
    logits, target = logits_of((65, 33), dtype), torch.rand(65, 33).bfloat16().to(dtype)
    target[torch.rand(65, 33) < 0.7] = 0
    for iou_weighted in (True, False):
        for detach_weight in (True, False):
            options: dict[str, Any] = {
                "iou_weighted": iou_weighted,
                "detach_weight": detach_weight,
                "alpha": 0.4,
            }
            exact = exact_of(reference.varifocal_elements, float(iou_weighted), 0.4, 1.5)
            assert_accurate(
                F.varifocal_loss,
                plain.varifocal_loss,
                logits,
                exact=lambda x, exact=exact, **o: exact(
                    x, o["target"], gamma=1.5, detach_weight=o["detach_weight"]
                ),
                cancels=True,
                target=target,
                gamma=1.5,
                **options,
            )


@pytest.mark.every_level
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gamma", [0.0, 0.01, 0.5, 1.0, 2.0, 3.7])
def test_gradients_are_finite_at_every_logit(gamma: float, dtype: torch.dtype) -> None:
    extreme = torch.tensor([-1e4, -500, -104, -95, -88, 88, 95, 104, 500, 1e4])
    logits = torch.cat([torch.linspace(-80, 80, 3201), extreme]).to(dtype)
    for target in (0.0, 0.3, 0.5, 1.0):
        dense = torch.full_like(logits, target)
        index = IndexTarget(torch.zeros(len(logits), dtype=torch.int64), dense)
        for goal, x in ((dense, logits), (index, logits.unsqueeze(1))):
            for loss in (
                lambda leaf, goal=goal: F.quality_focal_loss(leaf, goal, gamma, reduction="sum"),
                lambda leaf, goal=goal: F.varifocal_loss(leaf, goal, 0.75, gamma, reduction="sum"),
                lambda leaf, goal=goal: F.sigmoid_focal_loss(leaf, goal, gamma=gamma, reduction="sum"),
            ):
                leaf = x.clone().requires_grad_()
                value = loss(leaf)
                (gradient,) = torch.autograd.grad(value, leaf)
                assert value.double().isfinite() or dtype == torch.float16
                assert gradient.isfinite().all()


def test_quality_focal_where_the_prediction_is_right() -> None:
    """u = 0, and the pole of u^(beta - 1)."""
    for beta in (0.0, 0.3, 0.5, 1.0, 2.0):
        leaf = torch.zeros(5, requires_grad=True)
        F.quality_focal_loss(leaf, torch.full((5,), 0.5), beta, reduction="sum").backward()
        assert leaf.grad is not None
        assert (leaf.grad == 0).all()


@every_loss
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("upstream_dtype", [torch.float64])
def test_differentiates_twice(name: str, reduction: str, upstream_dtype: torch.dtype) -> None:
    ours = LOSSES[name][0]
    logits = torch.randn(2, 3, 5, dtype=upstream_dtype, requires_grad=True)
    labels = torch.tensor([[0, 4, -1], [-2, 2, 5]])
    scores = torch.rand(2, 3, dtype=upstream_dtype).clamp(0.1, 0.9)
    weight, alpha = torch.rand(2, 3, dtype=upstream_dtype), torch.rand(5, dtype=upstream_dtype)
    options: dict[str, Any] = {"weight": weight, "reduction": reduction}
    if reduction == "mean":
        options["avg_factor"] = torch.tensor(2.5)
    if name == "focal":
        options["alpha"] = alpha
    targets = [
        IndexTarget(labels),
        IndexTarget(labels, scores),
        IndexTarget(labels, positive=0.9, negative=0.1),
    ]
    for target in targets:
        assert gradcheck(lambda x, target=target: ours(x, target, **options), logits)
        assert gradgradcheck(lambda x, target=target: ours(x, target, **options), logits)


@every_loss
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradient_of_the_scores(name: str, reduction: str) -> None:
    ours = LOSSES[name][0]
    logits = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    scores = torch.rand(4, dtype=torch.float64).clamp(0.1, 0.9).requires_grad_()
    labels = torch.tensor([0, 4, -1, -2])

    def loss(x: Tensor, y: Tensor) -> Tensor:
        result: Tensor = ours(x, IndexTarget(labels, y), reduction=reduction)
        return result

    assert gradcheck(loss, (logits, scores))
    leaf, other = logits.detach().requires_grad_(), scores.detach()
    with_gradient = torch.autograd.grad(loss(leaf, scores).sum(), leaf)[0]
    torch.testing.assert_close(torch.autograd.grad(loss(leaf, other).sum(), leaf)[0], with_gradient)


@every_loss
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place(dtype: torch.dtype, reduction: str, name: str) -> None:
    ours = LOSSES[name][0]
    for shape, class_dim in (((33, 17), -1), ((3, 17, 20), 1)):
        logits = logits_of(shape, dtype)
        labels = draw_labels((33,) if class_dim == -1 else (3, 20), 17)
        options = {"reduction": reduction, "class_dim": class_dim}
        leaf, other = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        upstream = torch.rand_like(ours(other, IndexTarget(labels), **options))
        ours(other, IndexTarget(labels), **options).backward(upstream)
        ours(leaf * 1, IndexTarget(labels), inplace_backward=True, **options).backward(upstream)
        assert torch.equal(leaf.grad, other.grad)


@every_loss
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_return_probabilities(dtype: torch.dtype, reduction: str, name: str, device: str) -> None:
    ours = LOSSES[name][0]
    units = 2 if device == "cpu" else 4  # a GPU's exponential is 2 ulp off itself
    labels = draw_labels((33,), 17)
    for logits in (logits_of((33, 17), dtype), arrange(logits_of((33, 17), dtype), "sliced")):
        leaf = logits.requires_grad_()
        for target in (IndexTarget(labels), IndexTarget(labels).dense(17, dtype=dtype)[0]):
            loss, probabilities = ours(leaf, target, reduction=reduction, return_probabilities=True)
            assert not probabilities.requires_grad
            exact = torch.sigmoid(logits.detach().double())
            torch.testing.assert_close(
                probabilities.double(),
                exact,
                rtol=units * torch.finfo(dtype).eps,
                atol=1e-7 if dtype == torch.float16 else 0,
            )
            assert probabilities.dtype == dtype
            # A kernel of its own on CUDA, where the compiler may fuse other multiplications and additions.
            alone = ours(leaf, target, reduction=reduction, avg_factor=None)
            torch.testing.assert_close(loss, alone, rtol=4 * torch.finfo(dtype).eps, atol=0)
            before = probabilities.clone()
            loss.sum().backward()
            assert torch.equal(probabilities, before)
        with torch.no_grad():
            assert torch.equal(
                ours(leaf, target, reduction=reduction, return_probabilities=True)[1], probabilities
            )


class LargeTensors(TorchDispatchMode):
    """The sizes of the new tensors of `elements` and more that operations return."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements = elements
        self.found: list[int] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        results = result if isinstance(result, tuple | list) else [result]
        if not function.is_view:
            self.found += [r.numel() for r in results if isinstance(r, Tensor) and r.numel() >= self.elements]
        return result


@every_loss
def test_nothing_of_the_logits_size_but_the_gradient(name: str) -> None:
    ours = LOSSES[name][0]
    logits, labels = torch.randn(50, 80, requires_grad=True), draw_labels((50,), 80)
    options = {"weight": torch.rand(50), "avg_factor": torch.tensor(3.0), "reduction": "mean"}
    with LargeTensors(500) as large:
        loss = ours(logits, IndexTarget(labels, torch.rand(50)), **options)
        loss.backward()
    assert large.found == [50 * 80]


@every_loss
@pytest.mark.raises_on_the_cpu
def test_labels_out_of_range(name: str) -> None:
    ours = LOSSES[name][0]
    logits, labels = torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    for wrong in (6, -3, 2**40, -(2**40)):
        for shape, class_dim in (((4, 5), -1), ((5, 4), 0)):
            bad = labels.clone()
            bad[2] = wrong
            for leaf in (torch.randn(shape), torch.randn(shape, requires_grad=True)):
                with pytest.raises(IndexError, match=f"{wrong}.*5 classes"):
                    ours(leaf, IndexTarget(bad), class_dim=class_dim)
        scores = torch.rand(4, requires_grad=True)  # in plain torch
        with pytest.raises(IndexError, match=f"{wrong}.*5 classes"):
            ours(logits, IndexTarget(bad, scores))


@every_loss
def test_errors(name: str) -> None:
    ours = LOSSES[name][0]
    logits, labels = torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    target = IndexTarget(labels)
    for error, words, call in (
        (ValueError, "labels.*3.*4, 5", lambda: ours(logits, IndexTarget(labels[:3]))),
        (ValueError, "labels.*4, 5", lambda: ours(logits, target, class_dim=0)),
        (IndexError, "class_dim.*2", lambda: ours(logits, target, class_dim=2)),
        (ValueError, "avg_factor.*sum", lambda: ours(logits, target, avg_factor=3, reduction="sum")),
        (ValueError, "avg_factor.*none", lambda: ours(logits, target, avg_factor=3, reduction="none")),
        (
            ValueError,
            "avg_factor.*2",
            lambda: ours(logits, target, avg_factor=torch.ones(2), reduction="mean"),
        ),
        (TypeError, "avg_factor.*'3'", lambda: ours(logits, target, avg_factor="3", reduction="mean")),
        (ValueError, "reduction.*avg", lambda: ours(logits, target, reduction="avg")),
        (ValueError, r"weight.*3.*\(4,\).*\(1, 5\)", lambda: ours(logits, target, weight=torch.ones(3))),
        (TypeError, "weight.*2.0", lambda: ours(logits, target, weight=2.0)),
        (TypeError, "input.*list", lambda: ours([1.0], target)),
        (ValueError, "input.*int64", lambda: ours(logits.long(), target)),
        (ValueError, "labels", lambda: ours(torch.tensor(1.0), IndexTarget(torch.tensor(0)))),
    ):
        with pytest.raises(error, match=words):
            call()


def test_index_target_errors() -> None:
    labels = torch.tensor([0, 1])
    for error, words, arguments in (
        (TypeError, "labels.*float32", (labels.float(),)),
        (TypeError, "labels.*bool", (labels.bool(),)),
        (TypeError, "labels.*\\[0, 1\\]", ([0, 1],)),
        (TypeError, "scores.*int64", (labels, labels)),
        (TypeError, "scores.*0.5", (labels, 0.5)),
        (ValueError, "scores.*3.*2", (labels, torch.rand(3))),
    ):
        with pytest.raises(error, match=words):
            IndexTarget(*arguments)
    with pytest.raises(TypeError):
        IndexTarget(labels, None, 1.0)  # type: ignore[misc]


@pytest.mark.parametrize("value", [-0.5, float("nan")])
def test_exponents(value: float) -> None:
    with pytest.raises(ValueError, match=f"beta.*{value}"):
        F.quality_focal_loss(torch.zeros(4), torch.zeros(4), value)
    for loss in (F.varifocal_loss, F.sigmoid_focal_loss):
        with pytest.raises(ValueError, match=f"gamma.*{value}"):
            loss(torch.zeros(4, 1), IndexTarget(torch.zeros(4).long()), gamma=value)


# ---- heads as they are written today ----------------------------------------------------------------------------


def test_yolov5_levels() -> None:
    """Three levels, (B, 3, H, W, 85): class loss on the matched anchors, objectness on a stride-85 view."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(7)
    classes, smoothing = 80, 0.1
    positive, negative = 1 - 0.5 * smoothing, 0.5 * smoothing
    weights = {"pos_weight": torch.tensor([1.5])}
    theirs = nn.BCEWithLogitsLoss(**weights)
    ours = fused_losses.BCEWithLogitsLoss(**weights)
    for size in (20, 10, 5):
        head = torch.randn(2, 3, size, size, 5 + classes, generator=generator) * 2
        b, a, gj, gi = (torch.randint(n, (37,), generator=generator) for n in (2, 3, size, size))
        tcls = torch.randint(classes, (37,), generator=generator)
        tobj = torch.rand(2, 3, size, size, generator=generator)
        results = []
        for fused in (False, True):
            pi = head.clone().requires_grad_()
            pcls = pi[b, a, gj, gi][:, 5:]
            if fused:
                lcls = ours(pcls, IndexTarget(tcls, positive=positive, negative=negative))
                lobj = ours(pi[..., 4], tobj)
            else:
                t = torch.full_like(pcls, negative)
                t[range(37), tcls] = positive
                lcls = theirs(pcls, t)
                lobj = theirs(pi[..., 4], tobj)
            (0.5 * lcls + 4.0 * lobj).backward()
            results.append((lcls.detach(), lobj.detach(), pi.grad))
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other)


def test_a_heads_slice_is_read_in_place() -> None:
    """(B, A, H, W, 5 + C): every anchor's classes, a stride-85 view; the gradient comes out dense."""
    head = torch.randn(2, 3, 6, 6, 85)
    labels = draw_labels((2, 3, 6, 6), 80)
    leaf, other = head.clone().requires_grad_(), head.clone().requires_grad_()
    F.sigmoid_focal_loss(leaf[..., 5:], IndexTarget(labels), reduction="mean").backward()
    dense, kept = IndexTarget(labels).dense(80)
    each = torch.where(kept, plain_focal(other[..., 5:], dense, reduction="none"), 0)
    (each.sum() / kept.sum()).backward()
    torch.testing.assert_close(leaf.grad, other.grad)
    with LargeTensors(2 * 3 * 6 * 6 * 80) as large:
        F.sigmoid_focal_loss(head[..., 5:].requires_grad_(), IndexTarget(labels), reduction="mean")
    assert large.found == [2 * 3 * 6 * 6 * 80]


def test_yolov8_head() -> None:
    """(B, 8400, nc), at most one class an anchor, its target the alignment score; summed, over the scores' sum."""
    batch, anchors, classes = 2, 8400, 20
    logits = torch.randn(batch, anchors, classes) * 2 - 3
    labels = torch.randint(classes, (batch, anchors))
    foreground = torch.rand(batch, anchors) < 0.02
    scores = torch.rand(batch, anchors) * foreground
    target_scores = torch.zeros_like(logits)
    target_scores.scatter_(-1, labels.unsqueeze(-1), scores.unsqueeze(-1))
    for empty in (False, True):
        if empty:
            foreground, scores, target_scores = foreground & False, scores * 0, target_scores * 0
        leaf, other = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        target_scores_sum = max(target_scores.sum(), torch.tensor(1.0))
        theirs = nn.BCEWithLogitsLoss(reduction="none")(other, target_scores).sum() / target_scores_sum
        target = IndexTarget(labels.where(foreground, -1), scores)
        ours = F.binary_cross_entropy_with_logits(leaf, target, avg_factor=scores.sum())
        (theirs * 0.5).backward()
        (ours * 0.5).backward()
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(leaf.grad, other.grad)


def test_yolox_head() -> None:
    """(foreground, nc) one-hot times IoU, 'none', summed, over the foreground."""
    logits, classes = torch.randn(57, 80) * 2, torch.randint(80, (57,))
    iou = torch.rand(57)
    leaf, other = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    target = torch_functional.one_hot(classes, 80) * iou.unsqueeze(-1)
    theirs = nn.BCEWithLogitsLoss(reduction="none")(other, target).sum() / max(57, 1)
    bce = fused_losses.BCEWithLogitsLoss(reduction="none")
    same = bce(leaf, IndexTarget(classes, iou)).sum() / max(57, 1)
    theirs.backward()
    same.backward()
    torch.testing.assert_close(same, theirs)
    torch.testing.assert_close(leaf.grad, other.grad)
    at_once = F.binary_cross_entropy_with_logits(leaf, IndexTarget(classes, iou), avg_factor=57)
    torch.testing.assert_close(at_once, theirs)


def test_rt_detr_head() -> None:
    """(B, Q, nc) with IoU targets; the weight is detached; mean(1) and sum, over the boxes."""
    batch, queries, classes, boxes = 2, 300, 80, 11
    logits = torch.randn(batch, queries, classes) * 2 - 2
    labels = torch.full((batch, queries), classes)
    scores = torch.zeros(batch, queries)
    matched = torch.randperm(batch * queries)[:boxes]
    labels.view(-1)[matched] = torch.randint(classes, (boxes,))
    scores.view(-1)[matched] = torch.rand(boxes)
    leaf, other = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    target = torch_functional.one_hot(labels, classes + 1)[..., :-1]
    target_score = scores.unsqueeze(-1) * target
    pred_score = torch.sigmoid(other).detach()
    weight = 0.75 * pred_score.pow(2.0) * (1 - target) + target_score
    loss = torch_functional.binary_cross_entropy_with_logits(
        other, target_score, weight=weight, reduction="none"
    )
    theirs = loss.mean(1).sum() * queries / boxes
    criterion = fused_losses.VarifocalLoss(detach_weight=True)
    ours = criterion(leaf, IndexTarget(labels, scores), avg_factor=boxes)
    theirs.backward()
    ours.backward()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(leaf.grad, other.grad)


def test_yolov5s_focal_wrapper_takes_an_index_target() -> None:
    logits, labels = torch.randn(33, 17), draw_labels((33,), 17)
    dense, kept = IndexTarget(labels).dense(17)
    for reduction in REDUCTIONS:
        options = {"pos_weight": 3 * torch.rand(17), "weight": torch.rand(33, 1), "reduction": reduction}
        ours = fused_losses.FocalLoss(fused_losses.BCEWithLogitsLoss(**options), 1.5, 0.3)
        theirs = plain.FocalLoss(nn.BCEWithLogitsLoss(**{**options, "reduction": "none"}), 1.5, 0.3)
        each = torch.where(kept, theirs(logits, dense), 0)
        expected = {"none": each, "sum": each.sum(), "mean": each.sum() / kept.sum()}[reduction]
        torch.testing.assert_close(ours(logits, IndexTarget(labels)), expected)
    by_factor = fused_losses.FocalLoss(fused_losses.BCEWithLogitsLoss())
    torch.testing.assert_close(
        by_factor(logits, IndexTarget(labels), avg_factor=5),
        F.sigmoid_focal_loss(logits, IndexTarget(labels), reduction="sum") / 5,
    )


def test_criteria_are_the_functions() -> None:
    logits, target, weight = (
        torch.randn(33, 17),
        IndexTarget(draw_labels((33,), 17), torch.rand(33)),
        torch.rand(33),
    )
    flipped = logits.T.contiguous()
    for criterion, function, options in (
        (fused_losses.QualityFocalLoss, F.quality_focal_loss, {"beta": 1.5}),
        (fused_losses.VarifocalLoss, F.varifocal_loss, {"alpha": 0.3, "gamma": 1.0, "iou_weighted": False}),
        (fused_losses.SigmoidFocalLoss, F.sigmoid_focal_loss, {"alpha": torch.rand(17), "gamma": 1.0}),
    ):
        module = criterion(**options, class_dim=0)
        expected = function(logits, target, weight=weight, avg_factor=3, reduction="mean", **options)
        torch.testing.assert_close(module(flipped, target, weight, avg_factor=3), expected)
        assert "reduction='mean'" in repr(module)
    ours = fused_losses.BCEWithLogitsLoss(class_dim=0, pos_weight=torch.rand(17))
    expected = F.binary_cross_entropy_with_logits(logits, target, pos_weight=ours.pos_weight, avg_factor=3)
    torch.testing.assert_close(ours(flipped, target, avg_factor=3), expected)


def test_what_the_kernels_do_not_reach() -> None:
    logits, labels = torch.randn(33, 17), draw_labels((33,), 17)
    target = IndexTarget(labels, torch.rand(33))
    for function in (f for f, _, _ in LOSSES.values()):
        expected = function(logits, target, reduction="mean")
        with cases.autocast():
            torch.testing.assert_close(function(logits, target, reduction="mean"), expected)
        compiled = torch.compile(lambda x, f=function: f(x, target, reduction="mean"), backend="eager")
        torch.testing.assert_close(compiled(logits), expected)
        meta = function(logits.to("meta"), IndexTarget(labels.to("meta")), reduction="none")
        assert meta.shape == logits.shape
        gradient = torch.func.grad(lambda x, f=function: f(x, target, reduction="mean"))(logits)
        leaf = logits.clone().requires_grad_()
        function(leaf, target, reduction="mean").backward()
        torch.testing.assert_close(gradient, leaf.grad)


@every_loss
def test_autocast(name: str) -> None:
    """float32 as torch's own under autocast, and still no dense target."""
    ours = LOSSES[name][0]
    logits, labels = torch.randn(50, 80).bfloat16().requires_grad_(), draw_labels((50,), 80)
    wide = logits.detach().float().requires_grad_()
    with cases.autocast(), LargeTensors(50 * 80) as large:
        loss = ours(logits, IndexTarget(labels), reduction="mean")
    assert large.found == [50 * 80]  # the gradient
    expected = ours(wide, IndexTarget(labels), reduction="mean")
    loss.backward()
    expected.backward()
    assert torch.equal(loss, expected)
    assert logits.grad is not None
    assert wide.grad is not None
    assert torch.equal(logits.grad, wide.grad.bfloat16())
