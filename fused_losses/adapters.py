"""Criteria of other libraries that `replace_criterion` knows, by class name and attributes: nothing is imported.

An adapter is a function `fused(criterion, *arguments)` with the original's parameters. It returns what the original
would, by a fused loss, or NotImplemented for a call it does not serve: that goes to the original.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from . import functional
from .focal import FocalLoss, wraps_plain_bce


@dataclass(frozen=True)
class Adapter:
    class_name: str
    attributes: tuple[str, ...]  # that every instance has
    fused: Callable[..., Any]
    example: Callable[
        [Any], tuple[Any, ...]
    ]  # arguments, logits first, on which the original is compared with it
    others: tuple[str, ...] | None = ()  # that it may have besides; None: any


def register_adapter(
    class_name: str,
    fused: Callable[..., Any],
    *,
    attributes: tuple[str, ...] = (),
    example: Callable[[Any], tuple[Any, ...]],
) -> None:
    """Makes `replace_criterion` recognise a criterion of your own or of another library.

    ::

        def fused(criterion, logits, target):
            return fused_losses.functional.cross_entropy(logits / criterion.temperature, target)

        def example(criterion):
            return torch.linspace(-4, 4, 30, dtype=torch.float64).view(6, 5), torch.arange(6) % 5

        register_adapter("TemperedCrossEntropy", fused, attributes=("temperature",), example=example)

    Args:
        class_name: the name of the criterion's class, without its module.
        fused: a function of a module (so that a criterion can be pickled), called with the criterion and the arguments
            of its forward. It returns NotImplemented for what it leaves to the original.
        attributes: what an instance must have, to tell classes of one name apart.
        example: arguments for a criterion, the logits first, in float64 if it takes that. The criterion is exchanged
            only if `fused` and its own forward agree on them, value and gradient.

    The adapter registered last is asked first.
    """
    ADAPTERS.insert(0, Adapter(class_name, attributes, fused, example, others=None))


def yolov5_focal_loss(criterion: Any, pred: Tensor, true: Tensor) -> Any:
    """alpha_t u^gamma bce, bce by the criterion it wraps: `fused_losses.FocalLoss`, whose attributes it has."""
    if not wraps_plain_bce(criterion) or not criterion.gamma >= 0:
        return NotImplemented
    return FocalLoss.forward(criterion, pred, true)


def yolov5_quality_focal_loss(criterion: Any, pred: Tensor, true: Tensor) -> Any:
    """alpha_t |t - s|^gamma bce, bce by the criterion it wraps. A pos_weight that is not 1 goes to the original."""
    bce, alpha = criterion.loss_fcn, criterion.alpha
    if not wraps_plain_bce(criterion) or pred.shape != true.shape or not _is_one(bce.pos_weight):
        return NotImplemented
    balance = true * alpha + (1 - true) * (1 - alpha)
    weight = balance if bce.weight is None else balance * bce.weight
    reduction = criterion.reduction if criterion.reduction in ("mean", "sum") else "none"
    return functional.quality_focal_loss(pred, true, criterion.gamma, weight, reduction)


def ultralytics_focal_loss(criterion: Any, pred: Tensor, label: Tensor) -> Any:
    """alpha_t u^gamma bce, its mean over dimension 1, summed over the rest. alpha is a tensor: one or one a class."""
    alpha = criterion.alpha
    if (
        not isinstance(alpha, Tensor)
        or pred.dim() < 2
        or pred.shape != label.shape
        or not criterion.gamma >= 0
    ):
        return NotImplemented
    if alpha.numel() == 1 and alpha.is_cpu:  # its value is here: on a device it would have to be waited for
        number = float(alpha)
        loss = functional.sigmoid_focal_loss(
            pred, label, number if number > 0 else -1, criterion.gamma, "mean"
        )
        return loss * (pred.numel() // max(pred.shape[1], 1))
    loss = functional.sigmoid_focal_loss(pred, label, -1, criterion.gamma, "none")
    alpha = alpha.to(pred.device, pred.dtype)
    balance = label * alpha + (1 - label) * (1 - alpha)
    return (loss * torch.where((alpha > 0).any(), balance, 1)).mean(1).sum()


def ultralytics_varifocal_loss(criterion: Any, pred_score: Tensor, gt_score: Tensor, label: Tensor) -> Any:
    """alpha s^gamma bce where label is 0, q bce where it is 1, in fp32 or more; mean over dimension 1, sum over the rest.

    As its callers have it: label is 0 or 1, and the score q is 0 where label is 0.
    """
    if pred_score.dim() < 2 or not pred_score.shape == gt_score.shape == label.shape:
        return NotImplemented
    dtype = torch.promote_types(torch.promote_types(pred_score.dtype, gt_score.dtype), torch.float32)
    score = gt_score.to(dtype)
    # A positive of score 0 weighs nothing. The next number to 0 does not, and is no negative.
    score = torch.where(label > 0, score.clamp_min(torch.finfo(torch.float32).tiny), 0)
    logits = pred_score.to(dtype)
    return (
        functional.varifocal_loss(logits, score, criterion.alpha, criterion.gamma, None, "sum")
        / logits.shape[1]
    )


def ultralytics_distribution_focal_loss(criterion: Any, pred_dist: Tensor, target: Tensor) -> Any:
    """Cross entropy with both neighbours of the target, the mean over the sides of a box: (4 N, bins), (N, 4) -> (N, 1)."""
    if pred_dist.dim() != 2 or target.dim() == 0 or pred_dist.shape[0] != target.numel():
        return NotImplemented
    target = target.clamp_(0, criterion.reg_max - 1 - 0.01)  # in place, as there
    logits = pred_dist.to(torch.promote_types(pred_dist.dtype, target.dtype))
    loss = functional.distribution_focal_loss(logits, target.reshape(-1), reduction="none")
    return loss.view(target.shape).mean(-1, keepdim=True)


def timm_label_smoothing(criterion: Any, x: Tensor, target: Tensor) -> Any:
    """confidence nll + smoothing mean_c(-log p_c), with confidence = 1 - smoothing. No index is ignored."""
    if x.dim() != 2 or target.dim() != 1 or target.dtype != torch.int64 or not 0 <= criterion.smoothing <= 1:
        return NotImplemented
    if criterion.confidence != 1.0 - criterion.smoothing:
        return NotImplemented
    return functional.cross_entropy(x, target, ignore_index=_NO_INDEX, label_smoothing=criterion.smoothing)


def timm_soft_target(criterion: Any, x: Tensor, target: Tensor) -> Any:
    """-sum_c t_c log p_c, mean over the rows."""
    if x.shape != target.shape or x.dtype != target.dtype or x.dim() < 1:
        return NotImplemented
    if x.dim() > 2:
        x, target = x.flatten(0, -2), target.flatten(0, -2)
    return functional.cross_entropy(x, target)


def timm_binary_cross_entropy(criterion: Any, x: Tensor, target: Tensor) -> Any:
    """bce on targets that are given dense, or as class indices: 1 - e + e / C for the class, e / C for the others."""
    if x.shape[0] != target.shape[0]:
        return NotImplemented
    if target.shape != x.shape:
        classes = x.shape[-1]
        off = criterion.smoothing / classes
        index = target.long().view(-1, 1)
        dense = torch.full((index.shape[0], classes), off, device=x.device, dtype=x.dtype)
        target = dense.scatter_(1, index, 1.0 - criterion.smoothing + off)
    if criterion.target_threshold is not None:
        target = target.gt(criterion.target_threshold).to(target.dtype)
    loss = functional.binary_cross_entropy_with_logits(
        x, target, criterion.weight, pos_weight=criterion.pos_weight, reduction=criterion.reduction
    )
    return loss.sum(-1).mean() if getattr(criterion, "sum_classes", False) else loss


_ones = WeakTensorKeyDictionary()  # a tensor: its version, and whether it is all 1


def _is_one(weight: Tensor | None) -> bool:
    """Read once a tensor, and again after it is changed: on a device the host has to wait for the answer."""
    if weight is None:
        return True
    version, one = _ones.get(weight, (None, False))  # type: ignore[no-untyped-call]
    if version != weight._version:
        one = bool((weight == 1).all())
        _ones[weight] = weight._version, one
    return bool(one)


_NO_INDEX = torch.iinfo(torch.int64).min


def _logits(*shape: int) -> Tensor:
    return torch.linspace(-3, 4, torch.Size(shape).numel(), dtype=torch.float64).view(shape)


def _wrapped_example(criterion: Any) -> tuple[Tensor, Tensor]:
    return _binary_example(criterion.loss_fcn)


def _binary_example(criterion: Any) -> tuple[Tensor, Tensor]:
    """Logits that the criterion's weights broadcast to, on their device, and targets soft and hard."""
    weights = [weight for weight in (criterion.weight, criterion.pos_weight) if weight is not None]
    shape = torch.Size((4, 5)) if all(weight.numel() == 1 for weight in weights) else torch.Size((1,))
    for weight in weights:
        shape = torch.broadcast_shapes(shape, weight.shape)  # type: ignore[no-untyped-call]
    shape = torch.Size((4, *shape)) if len(shape) == 1 else shape
    targets = (
        torch.tensor([0, 1, 0.3, 0.9, 0, 0.05, 1], dtype=torch.float64)
        .repeat(shape.numel() // 7 + 1)[: shape.numel()]
        .view(shape)
    )
    device = weights[0].device if weights else torch.device("cpu")
    return _logits(*shape).to(device), targets.to(device)


def _score_example(criterion: Any) -> tuple[Tensor, Tensor, Tensor]:
    labels = torch.tensor([0.0, 1.0, 0.0, 0.0, 1.0, 0.0, 1.0]).repeat(5)[:30].view(6, 5)
    return _logits(6, 5).float(), labels * torch.linspace(0, 1, 30).view(6, 5), labels


def _bins_example(criterion: Any) -> tuple[Tensor, Tensor]:
    bins = criterion.reg_max
    return _logits(12, bins), torch.linspace(-1, bins, 12, dtype=torch.float64).view(3, 4)


def _alpha_example(criterion: Any) -> tuple[Tensor, Tensor]:
    alpha = torch.as_tensor(criterion.alpha)
    classes = alpha.numel() if alpha.numel() > 1 else 5
    targets = torch.tensor([0, 1, 0.3], dtype=torch.float64).repeat(2 * classes).view(6, classes)
    return _logits(6, classes).to(alpha.device), targets.to(alpha.device)


def _index_example(criterion: Any) -> tuple[Tensor, Tensor]:
    return _logits(6, 5), torch.tensor([0, 4, 2, 1, 3, 3])


def _soft_example(criterion: Any) -> tuple[Tensor, Tensor]:
    target = _logits(6, 5).flip(0).softmax(1)
    target[3] = 0  # a row without a target counts in the mean all the same
    return _logits(6, 5), target


ADAPTERS = [
    Adapter("FocalLoss", ("loss_fcn", "gamma", "alpha", "reduction"), yolov5_focal_loss, _wrapped_example),
    Adapter(
        "QFocalLoss", ("loss_fcn", "gamma", "alpha", "reduction"), yolov5_quality_focal_loss, _wrapped_example
    ),
    Adapter("VarifocalLoss", ("gamma", "alpha"), ultralytics_varifocal_loss, _score_example),
    Adapter("DFLoss", ("reg_max",), ultralytics_distribution_focal_loss, _bins_example),
    Adapter("FocalLoss", ("gamma", "alpha"), ultralytics_focal_loss, _alpha_example),
    Adapter("LabelSmoothingCrossEntropy", ("smoothing", "confidence"), timm_label_smoothing, _index_example),
    Adapter("SoftTargetCrossEntropy", (), timm_soft_target, _soft_example),
    Adapter(
        "BinaryCrossEntropy",
        ("smoothing", "target_threshold", "reduction", "weight", "pos_weight"),
        timm_binary_cross_entropy,
        _binary_example,
        others=("sum_classes",),
    ),
]
