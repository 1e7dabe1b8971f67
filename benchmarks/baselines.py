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


def pairwise_bce_cost(logits: Tensor, gt_classes: Tensor, objectness: Tensor) -> Tensor:
    """YOLOX's assigner: probabilities and one-hot classes repeated to (G, A, C)."""
    wide = logits.dtype if logits.dtype == torch.float64 else torch.float32
    p = (logits.to(wide).sigmoid() * objectness.to(wide).sigmoid()).sqrt()
    target = F.one_hot(gt_classes, logits.shape[1]).to(wide)
    p, target = p.unsqueeze(0).repeat(len(gt_classes), 1, 1), target.unsqueeze(1).repeat(1, len(logits), 1)
    return F.binary_cross_entropy(p, target, reduction="none").sum(-1)


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
