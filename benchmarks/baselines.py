"""What fused_losses is compared with: plain torch, torch.compile, and the packages that have some of the losses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from cases import Case

OURS = ("fused", "in place")

REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "mean": torch.mean,
    "sum": torch.sum,
}


class Unavailable(Exception):
    """An implementation that is not installed, does not have this loss or does not run on this device."""


# -- plain torch -----------------------------------------------------------------------------------------------


def sigmoid_focal_loss(
    inputs: Tensor, targets: Tensor, alpha: float = 0.25, gamma: float = 2.0, reduction: str = "none"
) -> Tensor:
    """torchvision's formula in plain torch: what a program without a fused loss runs."""
    p = torch.sigmoid(inputs)
    ce = F.binary_cross_entropy_with_logits(inputs, targets, reduction="none")
    p_t = p * targets + (1 - p) * (1 - targets)
    loss = ce * (1 - p_t) ** gamma
    if alpha >= 0:
        loss = (alpha * targets + (1 - alpha) * (1 - targets)) * loss
    return REDUCTIONS[reduction](loss)


def softmax_focal_loss(
    input: Tensor,
    target: Tensor,
    gamma: float = 2.0,
    alpha: float | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """The usual way in plain torch: cross entropy a row, then its weight."""
    ce = F.cross_entropy(input, target, reduction="none", ignore_index=ignore_index)
    loss = (1 - torch.exp(-ce)) ** gamma * ce
    if alpha is not None:
        loss = alpha * loss
    return _reduce_rows(loss, target, ignore_index, reduction)


def _reduce_rows(loss: Tensor, target: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """Torch's mean: over the rows that are not ignored."""
    if reduction == "mean":
        return loss.sum() / (target != ignore_index).sum()
    return REDUCTIONS[reduction](loss)


def dense_target(logits: Tensor, labels: Tensor, scores: Tensor) -> Tensor:
    """What a detector builds today: each anchor's score at its class, zeros elsewhere and where the label is -1."""
    scores = scores.masked_fill(labels < 0, 0).unsqueeze(-1)
    return torch.zeros_like(logits).scatter_(-1, labels.clamp(min=0).unsqueeze(-1), scores)


def bce_by_index(logits: Tensor, labels: Tensor, scores: Tensor) -> Tensor:
    """YOLOv8's class loss."""
    target = dense_target(logits, labels, scores)
    each = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return each.sum() / scores.sum().clamp(min=1)


def focal_by_index(
    logits: Tensor, labels: Tensor, scores: Tensor, alpha: float = 0.25, gamma: float = 2.0
) -> Tensor:
    target = dense_target(logits, labels, torch.ones_like(scores))
    return sigmoid_focal_loss(logits, target, alpha, gamma, "sum") / (labels >= 0).sum().clamp(min=1)


def varifocal_by_index(
    logits: Tensor, labels: Tensor, scores: Tensor, alpha: float = 0.75, gamma: float = 2.0
) -> Tensor:
    """mmdet's, which differentiates the weight."""
    target = dense_target(logits, labels, scores)
    weight = torch.where(target > 0, target, alpha * logits.sigmoid() ** gamma)
    each = F.binary_cross_entropy_with_logits(logits, target, reduction="none") * weight
    return each.sum() / scores.sum().clamp(min=1)


def distribution_focal_loss(input: Tensor, target: Tensor) -> Tensor:
    """YOLOv8's: two cross entropies."""
    left = target.long()
    to_left = F.cross_entropy(input, left, reduction="none") * (left + 1 - target)
    to_right = F.cross_entropy(input, left + 1, reduction="none") * (target - left)
    return (to_left + to_right).mean()


def pairwise_bce_cost(logits: Tensor, gt_classes: Tensor) -> Tensor:
    """An assigner's cost as assigners compute it: both sides expanded to (G, A, C)."""
    (anchors, classes), (ground_truths,) = logits.shape, gt_classes.shape
    probability = logits.to(torch.promote_types(logits.dtype, torch.float32)).sigmoid()
    target = F.one_hot(gt_classes, classes).to(probability).unsqueeze(1)
    shape = ground_truths, anchors, classes
    cost = F.binary_cross_entropy(probability.expand(shape), target.expand(shape), reduction="none")
    return cost.sum(-1)


# -- packages --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Package:
    """A package that may be installed: where its functions are, and how each takes the arguments of the loss."""

    module: str
    losses: dict[str, Callable[[Any], Callable[..., Tensor]]]
    cuda_only: bool = True
    overwrites_logits: bool = False


def _rows(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """For a function of [N, C] logits only: its users bring dimensions behind C to the front, which copies."""

    def loss(logits: Tensor, target: Tensor, **arguments: Any) -> Tensor:
        if logits.dim() > 2:
            logits, target = logits.movedim(1, -1).flatten(0, -2), target.flatten()
        return function(logits, target, **arguments)

    return loss


def _apex(module: Any) -> Callable[..., Tensor]:
    def loss(
        logits: Tensor,
        target: Tensor,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> Tensor:
        losses = module.SoftmaxCrossEntropyLoss.apply(logits, target, label_smoothing, ignore_index)
        return _reduce_rows(losses, target, ignore_index, reduction)

    return loss


PACKAGES = {
    "torchvision": Package("torchvision.ops", {"focal": lambda ops: ops.sigmoid_focal_loss}, cuda_only=False),
    "liger": Package(
        "liger_kernel.transformers.functional",
        {"ce": lambda functional: _rows(functional.liger_cross_entropy)},
        overwrites_logits=True,
    ),
    "quack": Package("quack.cross_entropy", {"ce": lambda module: _rows(module.cross_entropy)}),
    "apex": Package("apex.contrib.xentropy", {"ce": lambda module: _rows(_apex(module))}),
}

BASELINES = ("eager", "compile", *PACKAGES)


def overwrites_logits(name: str) -> bool:
    """Whether an implementation puts the gradient where the logits were, so that it needs new ones every time."""
    return name == "in place" or (name in PACKAGES and PACKAGES[name].overwrites_logits)


def implementation(case: Case, name: str, device: str) -> Callable[..., Tensor]:
    """The function called `name` that computes the loss of `case`."""
    loss = case.loss
    if name == "fused":
        return loss.fused
    if name == "in place":
        if not loss.in_place:
            raise Unavailable("only losses on logits have it")
        return partial(loss.fused, inplace_backward=True)
    if name == "eager":
        return loss.eager
    if name == "compile":
        # Left to itself it would generalise over the shapes of the cases before.
        torch.compiler.reset()
        return torch.compile(loss.eager, dynamic=False)
    package = PACKAGES[name]
    try:
        module = import_module(package.module)
    except Exception as error:  # a build for another torch fails with whatever it likes
        raise Unavailable(f"cannot be imported ({str(error).partition(chr(10))[0]})") from None
    if case.name not in package.losses:
        raise Unavailable(f"it has {', '.join(package.losses)} only")
    if package.cuda_only and not device.startswith("cuda"):
        raise Unavailable("it runs on CUDA only")
    return package.losses[case.name](module)
