"""The CUDA kernels' own source, run on the CPU (tests/cuda_on_cpu/simt.h), by the accuracy rule."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import plain
import pytest
import test_autocast as autocast
import test_cross_entropy as cross_entropy
import test_distribution_focal as distribution_focal
import test_pairwise
import torch
import torch.nn.functional as torch_functional
from accuracy import arrange, assert_accurate, draw
from cuda_on_cpu import build
from cuda_on_cpu.emulated import emulated
from torch import Tensor

import fused_losses.functional as F
from fused_losses import IndexTarget
from fused_losses.detection import pairwise_bce_cost

ROOT = Path(__file__).parents[1]
SANITIZER = "FUSED_LOSSES_SIMT_SANITIZER"  # set in a child process that runs under one: build.SANITIZERS
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# Every kernel, and sizes around what it is cut at: lanes of a warp, 16 bytes, a block's threads.
CLASSES = [1, 2, 3, 15, 16, 17, 31, 33, 127, 1000, 1024, 1025, 1027, 4099]
# (compute capability, shared memory of a block): clusters and a staged row, a staged row alone, two reads.
DEVICES = {"cluster": ("9", "101376"), "staged": ("8", "101376"), "reread": ("8", "4096")}


@pytest.fixture(scope="module", autouse=True)
def kernels() -> Iterator[None]:
    sanitizer = os.environ.get(SANITIZER, "")
    folder = build.FOLDER.with_name(f"simt-{sanitizer}") if sanitizer else build.FOLDER
    with emulated(build.library(folder, sanitizer=sanitizer)):
        yield


@pytest.fixture(params=DEVICES)
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    capability, shared = DEVICES[request.param]
    monkeypatch.setenv("FUSED_LOSSES_SIMT_CAPABILITY", capability)
    monkeypatch.setenv("FUSED_LOSSES_SIMT_SHARED", shared)
    return request.param


def probabilities(logits: Tensor) -> Tensor:
    return torch.randn(logits.shape, dtype=torch.float64).softmax(min(1, logits.dim() - 1)).to(logits.dtype)


def softmax_options(kind: str, logits: Tensor, index: Tensor) -> dict[str, Any]:
    classes = logits.shape[1]
    weight = torch.rand(classes, dtype=torch.float64).add(0.1).to(logits.dtype)
    if kind == "index":
        return {"target": index}
    if kind == "all options":
        index.view(-1)[::3] = -100
        return {"target": index, "weight": weight, "label_smoothing": 0.2}
    return {"target": probabilities(logits), "weight": weight, "label_smoothing": 0.1}


def check_cross_entropy(logits: Tensor, **options: Any) -> None:
    soft = options["target"].is_floating_point() or "label_smoothing" in options
    assert_accurate(F.cross_entropy, torch_functional.cross_entropy, logits, cancels=soft, **options)


@pytest.mark.parametrize("kind", ["index", "all options", "probability"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", CLASSES)
def test_rows(classes: int, dtype: torch.dtype, kind: str) -> None:
    logits, index = draw((5, classes), "ordinary", dtype)
    for reduction in ("mean", "none"):
        check_cross_entropy(logits, reduction=reduction, **softmax_options(kind, logits, index.clone()))


@pytest.mark.parametrize("kind", ["index", "probability"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("classes", [1025, 16387, 50257])
def test_long_rows(classes: int, dtype: torch.dtype, kind: str, gpu: str) -> None:
    """Odd lengths: every row begins elsewhere between two 16-byte boundaries."""
    logits, index = draw((3, classes), "ordinary", dtype)
    check_cross_entropy(logits, **softmax_options(kind, logits, index))


@pytest.mark.parametrize("kind", ["index", "probability"])
def test_clusters_that_take_row_after_row(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_LOSSES_SIMT_MULTIPROCESSOR", "11400")  # room for 1100 floats in two blocks
    logits, index = draw((40, 1100), "ordinary", torch.float32)
    check_cross_entropy(logits, **softmax_options(kind, logits, index))


@pytest.mark.parametrize("kind", ["confident", "extreme", "minus infinity first"])
@pytest.mark.parametrize("shape", [(65, 33), (4, 1100), (3, 9, 5)])
def test_confident_and_extreme_logits(shape: tuple[int, ...], kind: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        logits, index = draw(shape, kind, dtype)
        check_cross_entropy(logits, target=index)
        assert_accurate(F.softmax_focal_loss, plain.softmax_focal_loss, logits, target=index, gamma=1.5)


def test_roundings_of_short_rows() -> None:
    cross_entropy.test_confident_rows_with_probabilities(10, "mean")
    cross_entropy.test_rows_a_wrong_class_has_all_of(10, "mean", weighted=True)
    distribution_focal.test_neighbours_are_rounded_as_seldom_as_the_other_bins("mean", 0)


@pytest.mark.parametrize("kind", ["index", "all options", "probability"])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "misaligned", "sliced", "stepped"])
@pytest.mark.parametrize("shape", [(7, 33, 5), (2, 5, 4, 6), (6, 40), (5, 1030)])
def test_layouts(shape: tuple[int, ...], layout: str, kind: str) -> None:
    for dtype, reduction in ((torch.float32, "mean"), (torch.bfloat16, "none")):
        logits, index = draw(shape, "ordinary", dtype)
        options = softmax_options(kind, logits, index)
        check_cross_entropy(arrange(logits, layout), reduction=reduction, **options)


@pytest.mark.parametrize("positions", [1024, 1025, 20000])
def test_many_targets_are_counted_apart(positions: int) -> None:
    logits, index = draw((positions, 3), "ordinary", torch.float32)
    index[::7] = -100
    check_cross_entropy(logits, target=index, weight=torch.tensor([0.5, 2.0, 1.0]))


@pytest.mark.parametrize("classes", [5, 1500])
def test_ignored_rows(classes: int, gpu: str) -> None:
    logits = torch.full((4, classes), math.nan)
    logits[1] = torch.randn(classes)
    leaf = logits.requires_grad_()
    loss = F.cross_entropy(leaf, torch.tensor([-100, 2, -100, -100]))
    loss.backward()
    assert leaf.grad is not None
    assert loss.isfinite()
    assert (leaf.grad[[0, 2, 3]] == 0).all()
    assert F.cross_entropy(logits.detach(), torch.full((4,), -100)).isnan()


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 3.7])
def test_softmax_focal(gamma: float) -> None:
    for shape in ((65, 33), (3, 1100), (2, 5, 4, 6)):
        logits, index = draw(shape, "ordinary", torch.float32)
        alpha = torch.rand(shape[1])
        for reduction in ("mean", "none"):
            options = {"target": index, "alpha": alpha, "gamma": gamma, "reduction": reduction}
            assert_accurate(F.softmax_focal_loss, plain.softmax_focal_loss, logits, **options)


def exact_bce(input: Tensor, target: Tensor, **options: Any) -> Tensor:
    from fused_losses import reference

    return reference.binary_cross_entropy_with_logits(
        input, target, options.get("weight"), options.get("pos_weight"), options.get("reduction", "mean")
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (3,), (17,), (9, 17), (3, 17, 5), (5, 1000)])
def test_bce_with_logits(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    ours, theirs = F.binary_cross_entropy_with_logits, torch_functional.binary_cross_entropy_with_logits
    logits, target = (torch.randn(shape).double() * 3).to(dtype), torch.rand(shape).to(dtype)
    last = torch.rand(shape[-1]).to(dtype)
    for reduction in ("mean", "sum", "none"):
        for weights in (
            {},
            {"pos_weight": last},
            {"pos_weight": last[:1]},
            {"weight": torch.rand(shape).to(dtype), "pos_weight": last},
        ):
            options = {"target": target, "reduction": reduction, **weights}
            assert_accurate(ours, theirs, logits, exact=exact_bce, cancels=True, **options)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "misaligned", "sliced", "stepped"])
@pytest.mark.parametrize("shape", [(9, 17), (3, 17, 5), (2, 5, 4, 6), (40, 80)])
def test_element_wise_layouts(shape: tuple[int, ...], layout: str) -> None:
    for dtype, reduction in ((torch.float32, "mean"), (torch.bfloat16, "none")):
        logits, target = torch.randn(shape).to(dtype), torch.rand(shape).round().to(dtype)
        for pos_weight in (None, torch.rand(shape[-1]).to(dtype), torch.rand(shape[-2], 1).to(dtype)):
            assert_accurate(
                F.binary_cross_entropy_with_logits,
                torch_functional.binary_cross_entropy_with_logits,
                arrange(logits, layout),
                exact=exact_bce,
                target=target,
                pos_weight=pos_weight,
                reduction=reduction,
            )


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 1.5, 2.0, 3.7])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sigmoid_focal(dtype: torch.dtype, gamma: float) -> None:
    logits, targets = (torch.randn(65, 33).double() * 3).to(dtype), torch.rand(65, 33).round().to(dtype)
    for alpha, reduction in ((0.25, "mean"), (-1, "none")):
        options = {"targets": targets, "alpha": alpha, "gamma": gamma, "reduction": reduction}
        assert_accurate(F.sigmoid_focal_loss, plain.sigmoid_focal_loss, logits, **options)


def test_bce_on_probabilities() -> None:
    probability, target = torch.rand(33, 17).clamp(0.01, 0.99), torch.rand(33, 17)
    for dtype in (torch.float32, torch.bfloat16):
        assert_accurate(
            F.binary_cross_entropy,
            torch_functional.binary_cross_entropy,
            probability.to(dtype),
            cancels=True,
            target=target.to(dtype),
        )


def check_in_place(loss: Any, logits: Tensor, target: Any) -> None:
    leaf, other = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    for reduction in ("mean", "none"):
        upstream = torch.rand_like(loss(logits, target, reduction=reduction))
        loss(leaf * 1, target, reduction=reduction, inplace_backward=True).backward(upstream)
        loss(other, target, reduction=reduction).backward(upstream)
    torch.testing.assert_close(leaf.grad, other.grad, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(6, 40), (3, 1100), (3, 9, 5)])
def test_in_place(shape: tuple[int, ...], gpu: str) -> None:
    check_in_place(F.cross_entropy, *draw(shape, "ordinary", torch.float32))


def test_in_place_in_a_detector() -> None:
    check_in_place(F.distribution_focal_loss, torch.randn(300, 17), torch.rand(300) * 16)
    labels = IndexTarget(torch.randint(-2, 17, (300,)))
    for loss in detection_losses():
        check_in_place(loss, torch.randn(300, 17), torch.rand(300, 17))
        check_in_place(loss, torch.randn(300, 17), labels)


@pytest.mark.parametrize("product", [False, True], ids=["sigmoid", "product"])
@pytest.mark.parametrize("kind", ["ordinary", "confident", "extreme"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 33, 31), (9, 70, 80), (3, 40, 33)])
def test_pairwise_cost(shape: tuple[int, int, int], dtype: torch.dtype, kind: str, product: bool) -> None:
    logits, gt_classes, objectness = test_pairwise.draw(shape, dtype, kind)
    test_pairwise.check(logits, gt_classes, objectness if product else None)


@pytest.mark.parametrize("layout", ["transposed", "misaligned", "sliced", "stepped"])
def test_pairwise_cost_layouts(layout: str) -> None:
    logits, gt_classes, objectness = test_pairwise.draw((5, 70, 20), torch.bfloat16)
    expected = pairwise_bce_cost(logits, gt_classes, objectness)
    head = torch.cat([logits, objectness.unsqueeze(1)], 1)
    assert torch.equal(pairwise_bce_cost(arrange(logits, layout), gt_classes, head[:, -1:]), expected)


def test_pairwise_cost_edges() -> None:
    for truths, anchors in ((0, 5), (4, 0)):
        cost = pairwise_bce_cost(torch.empty(anchors, 3), torch.zeros(truths, dtype=torch.long))
        assert cost.shape == (truths, anchors)
    for wrong in (-1, 3):
        with pytest.raises(RuntimeError, match=f"target {wrong} is out of bounds: input has 3 classes"):
            pairwise_bce_cost(torch.zeros(5, 3), torch.tensor([0, wrong]))


def test_empty_input() -> None:
    logits = torch.empty(0, 5).requires_grad_()
    target = torch.empty(0, dtype=torch.long)
    assert F.cross_entropy(logits, target).isnan()
    assert F.cross_entropy(logits, target, reduction="sum") == 0
    assert F.binary_cross_entropy_with_logits(logits, torch.empty(0, 5)).isnan()
    F.cross_entropy(logits, target, reduction="none").sum().backward()
    assert logits.grad is not None
    assert logits.grad.shape == (0, 5)


@pytest.mark.parametrize("target", [-1, 7, 2**40])
@pytest.mark.parametrize("positions", [3, 9000])
@pytest.mark.parametrize("shape", [(7,), (7, 2)])
def test_a_target_out_of_range_stops_the_kernel(shape: tuple[int, ...], positions: int, target: int) -> None:
    logits = torch.randn(positions, *shape)
    index = torch.zeros(positions, *shape[1:], dtype=torch.long)
    index.view(-1)[-2] = target
    for weight in (None, torch.rand(7)):
        with pytest.raises(RuntimeError, match=f"target {target} is out of bounds: input has 7 classes"):
            F.cross_entropy(logits, index, weight)


def test_the_same_bits_in_any_order_of_threads(gpu: str) -> None:
    """Between barriers the emulation runs the threads in a different order each time."""
    logits, index = draw((50, 2050), "ordinary", torch.float32)
    targets = torch.rand(50, 2050)
    runs = []
    for _ in range(3):
        leaf = logits.clone().requires_grad_()
        loss = F.cross_entropy(leaf, index, label_smoothing=0.1) + F.sigmoid_focal_loss(
            leaf, targets, reduction="mean"
        )
        loss.backward()
        runs.append((loss.detach(), leaf.grad))
    for loss, gradient in runs[1:]:
        assert torch.equal(loss, runs[0][0])
        assert torch.equal(gradient, runs[0][1])


def detection_losses() -> list[Any]:
    return [
        F.binary_cross_entropy_with_logits,
        F.sigmoid_focal_loss,
        F.quality_focal_loss,
        F.varifocal_loss,
    ]


def in_plain_torch(loss: Any, logits: Tensor, target: IndexTarget, **options: Any) -> tuple[Tensor, Tensor]:
    """Value and gradient in fp64 by reference.py, where a functorch transformation sends the call."""
    wide = {key: o.double() if isinstance(o, Tensor) else o for key, o in options.items()}
    scores = None if target.scores is None else target.scores.double()
    exact = dataclasses.replace(target, scores=scores)
    gradient, value = torch.func.grad_and_value(lambda x: loss(x, exact, **wide).sum())(logits.double())
    return value, gradient


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "class_dim", "layout"),
    [
        ((33, 17), -1, "contiguous"),
        ((33, 80), -1, "contiguous"),
        ((33, 80), -1, "misaligned"),
        ((5, 9, 20), -1, "sliced"),
        ((3, 17, 95), 1, "contiguous"),
        ((3, 16, 4, 8), 1, "contiguous"),
        ((3, 16, 4, 8), 1, "stepped"),
        ((7,), 0, "contiguous"),
        ((40, 1), -1, "contiguous"),
    ],
)
def test_index_targets(shape: tuple[int, ...], class_dim: int, layout: str, dtype: torch.dtype) -> None:
    dim = class_dim % len(shape)
    anchors, classes = shape[:dim] + shape[dim + 1 :], shape[dim]
    labels = torch.randint(-2, classes + 1, anchors)
    scores = torch.rand(anchors).bfloat16().double().clamp(0.01).to(dtype)
    logits = arrange((torch.randn(shape, dtype=torch.float64) * 2).to(dtype), layout)
    weight = (torch.rand(anchors) + 0.1).bfloat16().to(dtype)
    targets = [
        IndexTarget(labels),
        IndexTarget(labels, scores),
        IndexTarget(labels, positive=0.9, negative=0.05),
    ]
    for loss in detection_losses():
        for target, options in (
            (targets[0], {"reduction": "mean"}),
            (targets[1], {"reduction": "mean", "avg_factor": torch.tensor(3.5), "weight": weight}),
            (targets[1], {"reduction": "sum"}),
            (targets[2], {"reduction": "none"}),
            (targets[2], {"reduction": "mean", "avg_factor": 0}),
        ):
            leaf = logits.detach().requires_grad_()
            value = loss(leaf, target, class_dim=class_dim, **options).sum()
            (gradient,) = torch.autograd.grad(value, leaf)
            expected = in_plain_torch(loss, logits, target, class_dim=class_dim, **options)
            tolerance = 16 * torch.finfo(dtype).eps
            torch.testing.assert_close(value.double(), expected[0], rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(gradient.double(), expected[1], rtol=tolerance, atol=tolerance)
            ignored = (labels == -2).unsqueeze(dim).expand(shape)
            assert (gradient[ignored] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(700, 91), (3, 210, 80), (5601, 9), (6201, 8), (2, 7)])
def test_nearly_all_background(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """As in a detector. Packs that hold no positive have a formula of their own: packs of one anchor and packs that
    reach the next, several to a thread, and a tail."""
    anchors, classes = shape[:-1], shape[-1]
    labels = torch.randint(classes, anchors).where(torch.rand(anchors) < 0.05, -1)
    labels.view(-1)[-1] = classes - 1
    scores = torch.rand(anchors).bfloat16().double().clamp(0.01).to(dtype)
    logits = (torch.randn(shape, dtype=torch.float64) * 2).to(dtype)
    ignoring = labels.masked_fill(torch.rand(anchors) < 0.05, -2)
    focal = [functools.partial(F.sigmoid_focal_loss, gamma=gamma) for gamma in (0, 0.5, 1.5, 3.7)]
    autocasts = [False, True] if dtype in autocast.HALVES else [False]
    pos_weight = (torch.rand(classes) + 0.5).bfloat16().to(dtype)
    cases: list[tuple[IndexTarget, dict[str, Any]]] = [
        (IndexTarget(labels), {"reduction": "mean"}),
        (IndexTarget(ignoring, scores), {"reduction": "sum"}),
        (IndexTarget(labels, scores), {"reduction": "mean", "avg_factor": torch.tensor(3.5)}),
        (IndexTarget(labels, scores), {"reduction": "mean", "pos_weight": pos_weight}),
        (IndexTarget(labels), {"reduction": "mean", "pos_weight": pos_weight[:1]}),
    ]
    for loss, half in itertools.product([*detection_losses(), *focal], autocasts):
        for target, options in cases:
            if "pos_weight" in options and loss in (F.quality_focal_loss, F.varifocal_loss):
                continue
            expected = in_plain_torch(loss, logits, target, **options)
            for given in (target, target.dense(classes, dtype=dtype)[0]):
                if given is not target and (target.labels == -2).any():
                    continue
                leaf = logits.detach().requires_grad_()
                with torch.autocast("cpu", dtype if half else torch.bfloat16, enabled=half):
                    value = loss(leaf, given, **options)
                upstream = torch.tensor(-1.5, dtype=value.dtype)
                (gradient,) = torch.autograd.grad(value, leaf, upstream)
                torch.testing.assert_close(
                    value.double(), expected[0], rtol=4 * torch.finfo(value.dtype).eps, atol=0
                )
                error = (gradient.double() - upstream * expected[1]).abs()
                size = (upstream * expected[1]).abs()
                # A positive's gradient may be the difference of two numbers, a negative's has all its digits.
                positive = torch.zeros(shape, dtype=torch.bool)
                rows = (target.labels >= 0).nonzero(as_tuple=True)
                positive[(*rows, target.labels[rows])] = True
                size[positive] = size.max()
                info = torch.finfo(dtype)
                floor = max(size.max().item() * info.eps, info.smallest_normal)
                worst = (error / (info.eps * size.clamp_min(floor))).max()
                assert worst <= (32 if dtype == torch.float64 else 16), (loss, half, target, worst)
                ignored = (target.labels == -2).unsqueeze(-1).expand(shape)
                assert (gradient[ignored] == 0).all()


@pytest.mark.parametrize("repeats", [1, 5])
def test_ignored_anchors_and_nobody(repeats: int) -> None:
    labels = torch.tensor([-2, 1, -2])
    logits = torch.tensor([[math.nan, math.inf], [0.5, -1.0], [-math.inf, math.nan]])
    logits = logits.repeat(1, repeats).requires_grad_()
    for loss in detection_losses():
        value = loss(logits, IndexTarget(labels), reduction="mean")
        (gradient,) = torch.autograd.grad(value, logits)
        assert value.isfinite()
        assert (gradient[[0, 2]] == 0).all()
        all_ignored = IndexTarget(torch.full((3,), -2))
        value = loss(logits, all_ignored, reduction="mean")
        assert value.isnan()
        assert (torch.autograd.grad(value, logits)[0] == 0).all()
        assert loss(logits, all_ignored, reduction="mean", avg_factor=torch.tensor(0)) == 0


def test_many_labels_and_a_class_of_its_own_weight() -> None:
    """More labels than one block counts, per-class alpha, probabilities from the same read."""
    labels = torch.randint(-2, 4, (5003,))
    logits, alpha = torch.randn(5003, 3), torch.rand(3)
    options = {"alpha": alpha, "pos_weight": alpha + 1, "reduction": "mean"}
    leaf = logits.clone().requires_grad_()
    value, probabilities = F.sigmoid_focal_loss(
        leaf, IndexTarget(labels), return_probabilities=True, **options
    )
    value.backward()
    expected = in_plain_torch(F.sigmoid_focal_loss, logits, IndexTarget(labels), **options)
    torch.testing.assert_close(value.double(), expected[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(leaf.grad.double(), expected[1], rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(probabilities, torch.sigmoid(logits))


@pytest.mark.parametrize("label", [-3, 4, 2**40])
def test_a_label_out_of_range_stops_the_kernel(label: int) -> None:
    labels = torch.zeros(300, dtype=torch.long)
    labels[-2] = label
    with pytest.raises(RuntimeError, match=f"target {label} is out of bounds: input has 3 classes"):
        F.sigmoid_focal_loss(torch.randn(300, 3), IndexTarget(labels))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 3.7])
def test_quality_focal_and_varifocal(gamma: float, dtype: torch.dtype) -> None:
    logits, target = (torch.randn(65, 33).double() * 3).to(dtype), torch.rand(65, 33).to(dtype)
    target[target < 0.5] = 0
    for ours, theirs, options in (
        (F.quality_focal_loss, plain.quality_focal_loss, {"beta": gamma}),
        (F.varifocal_loss, plain.varifocal_loss, {"gamma": gamma}),
        (F.varifocal_loss, plain.varifocal_loss, {"gamma": gamma, "detach_weight": True}),
    ):
        for reduction in ("mean", "none"):
            options["reduction"] = reduction
            assert_accurate(ours, theirs, logits, cancels=True, value_cancels=True, target=target, **options)
            assert_accurate(ours, theirs, logits, target=target.round(), **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "misaligned", "stepped"])
@pytest.mark.parametrize("shape", [(300, 16), (33, 17), (9, 4, 16), (5, 100), (7, 1)])
def test_distribution_focal(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    target = (torch.rand(shape[:-1]) * (shape[-1] - 1)).bfloat16().to(dtype)
    target.view(-1)[0] = shape[-1] - 1
    logits = arrange((torch.randn(shape, dtype=torch.float64) * 2).to(dtype), layout)
    weight = torch.rand(shape[:-1]).bfloat16().to(dtype)
    for reduction in ("mean", "none"):
        assert_accurate(
            F.distribution_focal_loss,
            plain.distribution_focal_loss,
            logits,
            cancels=True,
            value_cancels=True,
            target=target,
            weight=weight,
            reduction=reduction,
        )
    leaf = logits.detach().requires_grad_()
    by_factor = F.distribution_focal_loss(leaf, target, avg_factor=torch.tensor(2.5))
    total = F.distribution_focal_loss(leaf, target, reduction="sum")
    torch.testing.assert_close(by_factor, total / 2.5, rtol=2 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("dtype", autocast.HALVES)
@pytest.mark.parametrize("others", ["own", "float32"])
def test_autocast(dtype: torch.dtype, others: str) -> None:
    shapes = [(1100, 9), (3, 1100), (70, 17, 5)]  # a kernel's each
    autocast.check_everything(dtype, torch.float32 if others == "float32" else dtype, shapes)
    if others == "own":
        autocast.check_loss_scale(dtype)


@pytest.mark.parametrize("wrong", [15.5, -0.5, math.nan])
def test_a_bin_out_of_range_stops_the_kernel(wrong: float) -> None:
    target = torch.rand(300)
    target[-2] = wrong
    with pytest.raises(RuntimeError, match="out of bounds: input has 16 classes"):
        F.distribution_focal_loss(torch.randn(300, 16), target)


# What each is asked to look at, for the sake of time: every kernel, its ends and tails. -k "" instead runs all.
LAYOUTS = "layouts and (5-index or 1030)"
CHOSEN = {
    "address": f"{LAYOUTS} or long_rows and 16387-bfloat16 or in_place and 1100 or empty or stops and 3"
    " or cost_layouts or edges",
    "thread": f"{LAYOUTS} or long_rows and 16387-bfloat16 or in_place or pairwise and 31 or many_targets"
    " or row_after_row and index",
}


@pytest.mark.skipif(SANITIZER in os.environ, reason="this is the child")
@pytest.mark.parametrize("sanitizer", CHOSEN)
def test_under_sanitizers(sanitizer: str) -> None:
    """Shared memory and tensors end where they end; no misaligned access, no undefined arithmetic ("address"). What a
    thread reads or overwrites of another's has a barrier before it ("thread")."""
    names = {"address": "libasan.so", "thread": "libtsan.so"}
    found = [
        subprocess.run(
            [build.compiler(), f"-print-file-name={name}"], capture_output=True, text=True
        ).stdout.strip()
        for name in (names[sanitizer], "libstdc++.so")  # the latter, or it finds nothing that throws
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {
        SANITIZER: sanitizer,
        "LD_PRELOAD": " ".join(found),
        "ASAN_OPTIONS": "detect_leaks=0",
        "TSAN_OPTIONS": "ignore_noninstrumented_modules=1 halt_on_error=1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", "pass"]
    if subprocess.run(command, env=environment, capture_output=True, text=True).stderr:
        pytest.skip(f"{names[sanitizer]} of {build.compiler()} does not work here")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-s", "--tb=short", "-p", "no:cacheprovider"]
    result = subprocess.run(
        [*command, "-k", CHOSEN[sanitizer], Path(__file__).name],
        cwd=Path(__file__).parent,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-8000:]
