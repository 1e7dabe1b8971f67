"""Varifocal loss: positives count by their quality, negatives as in focal loss."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import Module

from .. import _checks, reference
from .._anchors import AvgFactor, anchor_ops, evaluate_anchors
from .index_target import IndexTarget

_ANCHORS = anchor_ops("varifocal", reference.varifocal_elements)


def varifocal_loss(
    input: Tensor,
    target: Tensor | IndexTarget,
    alpha: float = 0.75,
    gamma: float = 2.0,
    weight: Tensor | None = None,
    reduction: str = "mean",
    *,
    iou_weighted: bool = True,
    detach_weight: bool = False,
    avg_factor: AvgFactor = None,
    class_dim: int = -1,
    return_probabilities: bool = False,
    inplace_backward: bool = False,
) -> Any:
    """Varifocal loss of independent sigmoids.

    ::

        t > 0:  loss = weight t ce,                  ce = (1 - t) softplus(x) + t softplus(-x)
        t = 0:  loss = weight alpha s^gamma ce,      s = sigmoid(x)

    Equivalent to::

        s, ce = torch.sigmoid(input), BCEWithLogitsLoss(reduction="none")(input, target)
        loss = torch.where(target > 0, target, alpha * s**gamma) * ce  # s.detach() with detach_weight
        loss = loss.mean()

    Args:
        input: logits, (*); float32, float64, bfloat16 or float16, any strides.
        target: in [0, 1], the shape and dtype of input; or IndexTarget(labels, scores), the quality of the predicted
            box at its class and 0 elsewhere.
        alpha: a factor for the negatives.
        gamma: how much a right negative is discounted, >= 0.
        weight: a factor for each element; broadcasts to the shape of input. With an IndexTarget one of the labels'
            shape is a factor for each anchor, and beside labels (N) one for each class is (1, C).
        reduction: "none" (an element each), "mean" or "sum".
        iou_weighted: False leaves the factor t of the positives out.
        detach_weight: the gradient takes s^gamma for a constant, as RT-DETR and its family do.
        avg_factor: "mean" divides the sum by this number, or 0-dim tensor, but at least by 1; the host reads
            nothing. Without it "mean" divides by the elements, of anchors not ignored.
        class_dim: where the classes stand: 1 for (B, C, A) and (B, C, H, W).
        return_probabilities: return (loss, sigmoid(input)) from the same read, the latter detached.
        inplace_backward: the gradient overwrites the logits, which saves their size in memory. The logits must
            not be used after this call, nor read: autograd raises for what goes through a backward pass alone.

    Returns:
        The shape of input for "none", else (), in its dtype.

    Raises:
        ValueError: a shape, dtype, reduction, gamma or avg_factor that does not fit.
        TypeError: input or target that is neither a tensor nor an IndexTarget.
        IndexError: a label that is no class, nor background nor ignored.

    Source: Zhang et al. 2021, VarifocalNet, arXiv:2008.13367.
    """
    _checks.require_exponent("gamma", gamma)
    return evaluate_anchors(
        _ANCHORS,
        input,
        target,
        weight=weight,
        alpha_positive=float(iou_weighted),
        alpha_negative=alpha,
        gamma=gamma,
        detach_weight=detach_weight,
        avg_factor=avg_factor,
        class_dim=class_dim,
        reduction=reduction,
        inplace_backward=inplace_backward,
        return_probabilities=return_probabilities,
    )


class VarifocalLoss(Module):
    """`fused_losses.functional.varifocal_loss` as a criterion."""

    def __init__(
        self,
        alpha: float = 0.75,
        gamma: float = 2.0,
        reduction: str = "mean",
        *,
        iou_weighted: bool = True,
        detach_weight: bool = False,
        class_dim: int = -1,
        inplace_backward: bool = False,
    ) -> None:
        super().__init__()
        self.alpha = alpha
        self.gamma = gamma
        self.reduction = reduction
        self.iou_weighted = iou_weighted
        self.detach_weight = detach_weight
        self.class_dim = class_dim
        self.inplace_backward = inplace_backward

    def forward(
        self,
        input: Tensor,
        target: Tensor | IndexTarget,
        weight: Tensor | None = None,
        *,
        avg_factor: AvgFactor = None,
    ) -> Tensor:
        loss: Tensor = varifocal_loss(
            input,
            target,
            self.alpha,
            self.gamma,
            weight,
            self.reduction,
            iou_weighted=self.iou_weighted,
            detach_weight=self.detach_weight,
            avg_factor=avg_factor,
            class_dim=self.class_dim,
            inplace_backward=self.inplace_backward,
        )
        return loss

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, gamma={self.gamma}, reduction={self.reduction!r}"
