"""Criteria of other libraries: recognised, the same numbers, and everything else as it was."""

from __future__ import annotations

import copy
import io
import pickle
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import autocast
from third_party import timm, ultralytics, yolov5
from torch import Tensor, nn

import fused_losses
import fused_losses.functional as F
from fused_losses import adapters, replace_criterion


def soft(*shape: int) -> Tensor:
    return torch.rand(shape, dtype=torch.float64)


def hard(*shape: int) -> Tensor:
    return soft(*shape).round()


def scores(*shape: int) -> tuple[Tensor, Tensor]:
    """One class a row, its score (0 for one of them), and the labels."""
    label = nn.functional.one_hot(torch.randint(shape[-1], shape[:-1]), shape[-1]).double()
    score = soft(*shape) * label
    score[..., 0, :] = 0
    return score, label


def index(rows: int, classes: int) -> Tensor:
    return torch.randint(classes, (rows,))


def bce(**options: Any) -> nn.BCEWithLogitsLoss:
    return nn.BCEWithLogitsLoss(**options)


CASES: dict[str, Callable[[], tuple[Any, ...]]] = {
    # name: the criterion, the logits' shape, the other arguments
    "yolov5 FocalLoss": lambda: (yolov5.FocalLoss(bce()), (6, 5), hard(6, 5)),
    "yolov5 FocalLoss sum": lambda: (yolov5.FocalLoss(bce(reduction="sum"), 2.0, 0.6), (6, 5), soft(6, 5)),
    "yolov5 FocalLoss none": lambda: (
        yolov5.FocalLoss(bce(reduction="none"), 0.5),
        (2, 3, 4, 4),
        hard(2, 3, 4, 4),
    ),
    "yolov5 FocalLoss pos_weight": lambda: (
        yolov5.FocalLoss(bce(pos_weight=torch.rand(5))),
        (6, 5),
        soft(6, 5),
    ),
    "yolov5 FocalLoss one pos_weight": lambda: (
        yolov5.FocalLoss(bce(pos_weight=torch.tensor([1.5]))),
        (2, 3, 4),
        soft(2, 3, 4),
    ),
    "yolov5 FocalLoss weight": lambda: (
        yolov5.FocalLoss(bce(weight=torch.rand(3, 1), pos_weight=torch.rand(2, 3, 5))),
        (2, 3, 5),
        soft(2, 3, 5),
    ),
    "yolov5 QFocalLoss": lambda: (yolov5.QFocalLoss(bce()), (6, 5), soft(6, 5)),
    "yolov5 QFocalLoss sum": lambda: (yolov5.QFocalLoss(bce(reduction="sum"), 2.0, 0.6), (6, 5), hard(6, 5)),
    "yolov5 QFocalLoss weights": lambda: (
        yolov5.QFocalLoss(bce(weight=torch.rand(5), pos_weight=torch.tensor([1.0]), reduction="none")),
        (2, 3, 5),
        soft(2, 3, 5),
    ),
    "ultralytics VarifocalLoss": lambda: (ultralytics.VarifocalLoss(), (6, 5), *scores(6, 5)),
    "ultralytics VarifocalLoss 3d": lambda: (
        ultralytics.VarifocalLoss(1.5, 0.6),
        (2, 6, 5),
        *scores(2, 6, 5),
    ),
    "ultralytics DFLoss": lambda: (ultralytics.DFLoss(), (12, 16), 15 * soft(3, 4) - 1),
    "ultralytics DFLoss of 9 bins": lambda: (ultralytics.DFLoss(9), (20, 9), 7 * soft(5, 4)),
    "ultralytics FocalLoss": lambda: (ultralytics.FocalLoss(), (6, 5), hard(6, 5)),
    "ultralytics FocalLoss 3d": lambda: (ultralytics.FocalLoss(2.0, 0.4), (2, 6, 5), soft(2, 6, 5)),
    "ultralytics FocalLoss no alpha": lambda: (ultralytics.FocalLoss(1.5, 0.0), (6, 5), soft(6, 5)),
    "ultralytics FocalLoss alpha a class": lambda: (
        ultralytics.FocalLoss(1.5, [0.1, 0.2, 0.0, 0.5, 0.9]),
        (6, 5),
        soft(6, 5),
    ),
    "ultralytics FocalLoss no alpha a class": lambda: (
        ultralytics.FocalLoss(1.5, [0.0, 0.0, -1.0, 0.0, 0.0]),
        (6, 5),
        soft(6, 5),
    ),
    "timm LabelSmoothingCrossEntropy": lambda: (timm.LabelSmoothingCrossEntropy(), (6, 5), index(6, 5)),
    "timm LabelSmoothingCrossEntropy 0.3": lambda: (
        timm.LabelSmoothingCrossEntropy(0.3),
        (9, 17),
        index(9, 17),
    ),
    "timm SoftTargetCrossEntropy": lambda: (timm.SoftTargetCrossEntropy(), (6, 5), soft(6, 5).softmax(1)),
    "timm SoftTargetCrossEntropy not normalised": lambda: (timm.SoftTargetCrossEntropy(), (6, 5), soft(6, 5)),
    "timm SoftTargetCrossEntropy 3d": lambda: (timm.SoftTargetCrossEntropy(), (2, 3, 5), soft(2, 3, 5)),
    "timm SoftTargetCrossEntropy 1d": lambda: (timm.SoftTargetCrossEntropy(), (5,), soft(5)),
    "timm BinaryCrossEntropy": lambda: (timm.BinaryCrossEntropy(), (6, 5), index(6, 5)),
    "timm BinaryCrossEntropy dense": lambda: (timm.BinaryCrossEntropy(), (6, 5), soft(6, 5)),
    "timm BinaryCrossEntropy threshold": lambda: (
        timm.BinaryCrossEntropy(target_threshold=0.2, reduction="sum"),
        (6, 5),
        soft(6, 5),
    ),
    "timm BinaryCrossEntropy threshold of indices": lambda: (
        timm.BinaryCrossEntropy(target_threshold=0.2, reduction="none"),
        (6, 5),
        index(6, 5),
    ),
    "timm BinaryCrossEntropy weights": lambda: (
        timm.BinaryCrossEntropy(weight=torch.rand(5), pos_weight=torch.rand(5)),
        (6, 5),
        index(6, 5),
    ),
    "timm BinaryCrossEntropy sum_classes": lambda: (
        timm.BinaryCrossEntropy(sum_classes=True),
        (6, 5),
        soft(6, 5),
    ),
}


def of(dtype: torch.dtype, tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in tensors]


every_case = pytest.mark.parametrize("name", CASES)


def fused(criterion: nn.Module) -> nn.Module:
    report = replace_criterion(criterion)
    assert report, report
    return criterion


def value_and_gradient(
    criterion: nn.Module, logits: Tensor, targets: list[Tensor], upstream: Tensor
) -> tuple[Tensor, ...]:
    leaf = logits.clone().requires_grad_()
    loss = criterion(leaf, *targets)
    return loss.detach(), torch.autograd.grad(loss, leaf, upstream.expand_as(loss).to(loss.dtype))[0]


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers(name: str, dtype: torch.dtype) -> None:
    original, shape, *targets = CASES[name]()
    original = original.to(dtype)
    targets = of(dtype, targets)
    logits = 3 * torch.randn(shape, dtype=dtype)
    mine = fused(copy.deepcopy(original))
    assert type(mine) is not type(original)
    upstream = torch.randn(())
    expected = value_and_gradient(original, logits, targets, upstream)
    single = {"rtol": 1e-5, "atol": 1e-6} if "Varifocal" in name else {}  # which is in fp32 inside
    torch.testing.assert_close(value_and_gradient(mine, logits, targets, upstream), expected, **single)


@every_case
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(name: str, dtype: torch.dtype) -> None:
    """Our result in fp16 and bf16 is nearer to that in fp64 than twice the dtype's step, of the loss's own dtype."""
    original, shape, *targets = CASES[name]()
    original = original.to(dtype)
    targets = of(dtype, targets)
    logits = torch.randn(shape).to(dtype)
    mine = fused(copy.deepcopy(original))
    loss = mine(logits, *targets)
    assert loss.dtype == original(logits, *targets).dtype
    wide = copy.deepcopy(original).double()
    exact = wide(logits.double(), *of(torch.float64, targets)).double()
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(loss.double(), exact, rtol=4 * step, atol=4 * step)


@every_case
def test_runs_a_kernel(name: str) -> None:
    criterion, shape, *targets = CASES[name]()
    logits = torch.randn(shape, requires_grad=True)
    targets = of(torch.float32, targets)
    nodes, graph = [fused(criterion)(logits, *targets).grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None:
            graph.add(type(node).__name__)
            nodes += [before for before, _ in node.next_functions]
    assert graph & {"StoredBackward", "RecomputedBackward"}
    assert not any("BinaryCrossEntropy" in node or "LogSoftmax" in node for node in graph)


@every_case
def test_stays_what_it_was(name: str) -> None:
    criterion, shape, *targets = CASES[name]()
    theirs, attributes, shown = type(criterion), dict(vars(criterion)), repr(criterion)
    criterion.register_forward_hook(lambda module, args, output: hooked.append(output))
    hooked: list[Any] = []
    report = replace_criterion(criterion)
    assert isinstance(criterion, theirs)
    assert type(criterion) is not theirs
    assert repr(criterion) == shown
    assert vars(criterion).keys() == attributes.keys()
    targets = of(torch.float32, targets)
    loss = criterion(torch.randn(shape), *targets)
    assert hooked == [] if "__call__" in vars(theirs) else hooked[0] is loss
    assert not replace_criterion(criterion)
    report.restore()
    assert type(criterion) is theirs


@every_case
def test_copies(name: str) -> None:
    criterion, shape, *targets = CASES[name]()
    mine = fused(criterion)
    logits, targets = torch.randn(shape), of(torch.float32, targets)
    expected = mine(logits, *targets)
    saved = io.BytesIO()
    torch.save(mine, saved)
    saved.seek(0)
    for other in (
        copy.deepcopy(mine),
        copy.copy(mine),
        pickle.loads(pickle.dumps(mine)),
        torch.load(saved, weights_only=False),
    ):
        assert type(other) is type(mine)
        assert torch.equal(other(logits, *targets), expected)
    assert mine.state_dict().keys() == CASES[name]()[0].state_dict().keys()


def test_keyword_arguments() -> None:
    logits = torch.randn(6, 5)
    for criterion, keywords in (
        (yolov5.FocalLoss(bce()), {"pred": logits, "true": hard(6, 5).float()}),
        (ultralytics.FocalLoss(), {"pred": logits, "label": hard(6, 5).float()}),
        (timm.LabelSmoothingCrossEntropy(), {"x": logits, "target": index(6, 5)}),
        (timm.SoftTargetCrossEntropy(), {"x": logits, "target": soft(6, 5).float()}),
        (ultralytics.DFLoss(5), {"pred_dist": torch.randn(24, 5), "target": soft(6, 4).float()}),
        (yolov5.QFocalLoss(bce()), {"pred": logits, "true": soft(6, 5).float()}),
        (
            ultralytics.VarifocalLoss(),
            dict(zip(("gt_score", "label"), of(torch.float32, [*scores(6, 5)]), strict=True))
            | {"pred_score": logits},
        ),
        (timm.BinaryCrossEntropy(), {"x": logits, "target": index(6, 5)}),
    ):
        expected = criterion(**keywords)
        torch.testing.assert_close(fused(criterion)(**keywords), expected)


def test_parameters_of_its_own_go_to_the_original() -> None:
    class LabelSmoothingCrossEntropy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.smoothing, self.confidence = 0.1, 0.9

        def forward(self, pred: Tensor, target: Tensor, weight: float = 1.0) -> Tensor:
            return weight * nn.functional.cross_entropy(pred, target, label_smoothing=0.1)

    criterion = LabelSmoothingCrossEntropy()
    x, target = torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    calls = (
        lambda: criterion(x, target),
        lambda: criterion(pred=x, target=target),
        lambda: criterion(x, target, 0.5),
        lambda: criterion(x, target=target, weight=0.5),
    )
    expected = [call() for call in calls]
    assert replace_criterion(criterion)
    for call, value in zip(calls, expected, strict=True):
        torch.testing.assert_close(call(), value)


class Smoothing(nn.Module):
    def __init__(self, **others: Any) -> None:
        super().__init__()
        self.smoothing, self.confidence = 0.1, 0.9
        vars(self).update(others)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(x, target, label_smoothing=self.smoothing if self.training else 0)


class OverRowsWithATarget(nn.Module):
    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        each = (-target * x.log_softmax(-1)).sum(-1)
        return each.sum() / (target.sum(-1) > 0).sum()


@pytest.mark.parametrize(
    ("base", "attributes", "class_name", "why_not"),
    [
        (Smoothing, {}, "LabelSmoothingCrossEntropy", "its results are not those"),
        (Smoothing, {"ignore_index": 3}, "LabelSmoothingCrossEntropy", "does not know its ignore_index"),
        (OverRowsWithATarget, {}, "SoftTargetCrossEntropy", "its results are not those"),
    ],
)
def test_what_is_alike_and_not_the_same_is_left_alone(
    base: Any, attributes: dict[str, Any], class_name: str, why_not: str
) -> None:
    report = replace_criterion(type(class_name, (base,), {})(**attributes))
    assert not report
    assert why_not in str(report)


def test_what_an_adapter_does_not_serve_goes_to_the_original() -> None:
    focal = yolov5.FocalLoss(bce())
    changed = timm.LabelSmoothingCrossEntropy()
    calls: list[tuple[nn.Module, tuple[Tensor, ...]]] = [
        (timm.SoftTargetCrossEntropy(), (torch.randn(6, 5), soft(6, 5))),  # another dtype
        (timm.SoftTargetCrossEntropy(), (torch.randn(6, 5), soft(1, 5).float())),  # broadcast
        (changed, (torch.randn(6, 5), index(6, 5))),
        (focal, (torch.randn(6, 5), soft(6, 5))),
        (ultralytics.FocalLoss(), (torch.randn(6, 5), soft(6, 5))),
    ]
    for criterion, args in calls:
        original = copy.deepcopy(criterion)
        fused(criterion)
        for module in (original, criterion):
            if module.__dict__.get("smoothing") and criterion is changed:
                module.smoothing = 0.5  # its confidence stays 0.9
            if criterion is focal:
                module.loss_fcn = nn.BCEWithLogitsLoss(reduction="none", pos_weight=torch.tensor([2.0]))
        result, expected = criterion(*args), original(*args)
        assert result.dtype == expected.dtype
        torch.testing.assert_close(result, expected)


@pytest.mark.raises_on_the_cpu
def test_no_index_is_ignored() -> None:
    smoothing = fused(timm.LabelSmoothingCrossEntropy())
    with pytest.raises((IndexError, RuntimeError), match="-100"):
        smoothing(torch.randn(2, 5), torch.tensor([1, -100]))


def test_the_wrapped_criterion_counts() -> None:
    """YOLOv5's wrapper calls a module: one that is more than its class is not passed over."""
    hooked, patched, subclass = (yolov5.FocalLoss(bce()) for _ in range(3))
    hooked.loss_fcn.register_forward_hook(lambda module, args, output: 2 * output)
    patched.loss_fcn.forward = lambda pred, true: pred * true
    subclass.loss_fcn.__class__ = type("Own", (nn.BCEWithLogitsLoss,), {"forward": lambda self, a, b: a * b})
    for criterion in (hooked, patched, subclass):
        before = criterion(torch.ones(2, 3), torch.ones(2, 3))
        report = replace_criterion(criterion)
        assert type(criterion) is yolov5.FocalLoss
        assert any(one.where == "obj" for one in report.left_alone)
        assert criterion(torch.ones(2, 3), torch.ones(2, 3)) == before
    later = fused(yolov5.FocalLoss(bce()))
    later.loss_fcn.register_forward_hook(lambda module, args, output: 2 * output)
    args = torch.randn(2, 3), torch.ones(2, 3)
    assert later(*args) == yolov5.FocalLoss.forward(later, *args)


def test_what_the_kernels_do_not_take_goes_to_the_original() -> None:
    criterion, logits, target = timm.LabelSmoothingCrossEntropy(), torch.randn(6, 5), index(6, 5)
    fused(criterion)
    assert criterion(logits, target.int()) == timm.LabelSmoothingCrossEntropy.forward(
        criterion, logits, target.int()
    )
    criterion.smoothing, criterion.confidence = 1.2, 1 - 1.2
    assert criterion(logits, target) == timm.LabelSmoothingCrossEntropy.forward(criterion, logits, target)
    focal, args = fused(yolov5.FocalLoss(bce())), (torch.randn(2, 3), torch.ones(2, 3))
    focal.gamma = -0.5
    assert focal(*args) == yolov5.FocalLoss.forward(focal, *args)
    focal.gamma, focal.alpha = 2.0, torch.rand(3)
    torch.testing.assert_close(focal(*args), yolov5.FocalLoss.forward(focal, *args))


def test_the_numbers_decide_between_classes_that_hold_the_same() -> None:
    class FocalLoss(yolov5.QFocalLoss):
        """Quality focal loss under the name of the other."""

    imposter = FocalLoss(bce())
    report = replace_criterion(imposter)
    assert type(imposter) is FocalLoss
    assert "results are not those" in report.left_alone[0].then


def test_a_small_constant_is_a_difference() -> None:
    class FocalLoss(yolov5.FocalLoss):
        """With the constant that some add to keep the power's gradient finite."""

        def wrongness(self, probability: Tensor, true: Tensor) -> Tensor:
            return super().wrongness(probability, true) + 1e-6

    criterion = FocalLoss(bce())
    replace_criterion(criterion)
    assert type(criterion) is FocalLoss


def test_distribution_focal_loss_clamps_the_callers_target() -> None:
    """What its callers may read afterwards; and a half-precision prediction gives a loss in the target's dtype."""
    criterion, target = fused(ultralytics.DFLoss(5)), torch.tensor([[-1.0, 0.5, 3.995, 7.0]])
    assert criterion(torch.randn(4, 5).half(), target).dtype == torch.float32
    torch.testing.assert_close(target, torch.tensor([[0.0, 0.5, 3.99, 3.99]]))


def test_a_pos_weight_that_quality_focal_does_not_know_goes_to_the_original() -> None:
    args = torch.randn(6, 5), soft(6, 5).float()
    other = yolov5.QFocalLoss(bce(pos_weight=torch.full((5,), 2.0)))
    report = replace_criterion(other)
    assert type(other) is yolov5.QFocalLoss
    assert "does not serve" in str(report)
    changed = fused(yolov5.QFocalLoss(bce(pos_weight=torch.ones(5))))
    before = changed(*args)
    changed.loss_fcn.pos_weight.mul_(2)  # as a checkpoint does that is loaded later
    assert changed(*args) != before
    torch.testing.assert_close(changed(*args), other(*args))


def test_a_forward_that_raises_is_left_alone() -> None:
    class SoftTargetCrossEntropy(timm.SoftTargetCrossEntropy):
        def forward(self, x: Tensor, target: Tensor) -> Tensor:
            raise RuntimeError("needs a teacher")

    report = replace_criterion(SoftTargetCrossEntropy())
    assert "needs a teacher" in report.left_alone[0].then


def test_the_comparison_leaves_no_trace() -> None:
    state = torch.get_rng_state()
    criterion = ultralytics.FocalLoss()
    alpha = criterion.alpha
    with torch.no_grad(), autocast():
        assert replace_criterion(criterion, dry_run=True)
    assert type(criterion) is ultralytics.FocalLoss
    assert criterion.alpha is alpha
    assert torch.equal(torch.get_rng_state(), state)


class TemperedCrossEntropy:
    """A user's, and no module."""

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        return nn.functional.nll_loss((logits / self.temperature).log_softmax(1), target)


def tempered(criterion: Any, logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits / criterion.temperature, target)


def tempered_example(criterion: Any) -> tuple[Tensor, Tensor]:
    return torch.linspace(-4, 4, 30).view(6, 5), torch.arange(6) % 5


def test_register_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "ADAPTERS", list(adapters.ADAPTERS))
    monkeypatch.setattr(sys.modules["fused_losses.replace"], "ADAPTERS", adapters.ADAPTERS)
    criterion = TemperedCrossEntropy(2.0)
    with pytest.warns(UserWarning, match="no criterion"):
        assert not replace_criterion(criterion)
    fused_losses.register_adapter(
        "TemperedCrossEntropy", tempered, attributes=("temperature",), example=tempered_example
    )
    logits, target = torch.randn(6, 5, requires_grad=True), index(6, 5)
    expected = criterion(logits, target)
    report = replace_criterion({"loss": criterion})
    assert "test_adapters.tempered" in str(report)
    loss = criterion(logits, target)
    assert type(loss.grad_fn).__name__ == "StoredBackward"
    torch.testing.assert_close(loss, expected)
    assert isinstance(criterion, TemperedCrossEntropy)
    assert pickle.loads(pickle.dumps(criterion))(logits, target) == loss
    report.restore()
    assert type(criterion) is TemperedCrossEntropy


@every_case
def test_autocast(name: str) -> None:
    """The original's dtype, or a wider one: on a CPU torch has cross_entropy in fp32 and log_softmax in bf16."""
    original, shape, *targets = CASES[name]()
    mine = fused(copy.deepcopy(original))
    targets = of(torch.float32, targets)
    layer = nn.Linear(shape[-1], shape[-1])
    results = []
    for criterion in (original, mine):
        with autocast():
            loss = criterion(layer(torch.ones(shape)), *targets)
        results.append((loss.detach(), *torch.autograd.grad(loss.sum(), layer.weight)))
    (theirs, _), (ours, _) = results
    assert ours.dtype == torch.promote_types(ours.dtype, theirs.dtype)
    torch.testing.assert_close(results[1], results[0], rtol=2e-2, atol=2e-2, check_dtype=False)


@pytest.mark.parametrize(
    "name", ["yolov5 FocalLoss", "ultralytics FocalLoss", "timm LabelSmoothingCrossEntropy"]
)
def test_torch_compile(name: str) -> None:
    torch._dynamo.reset()
    criterion, shape, *targets = CASES[name]()
    logits, targets = torch.randn(shape, requires_grad=True), of(torch.float32, targets)
    expected = criterion(logits, *targets)
    compiled = torch.compile(fused(criterion), backend="aot_eager")
    torch.testing.assert_close(compiled(logits, *targets), expected)
    torch._dynamo.reset()
