"""Quality focal loss: one target for whether there is an object and how good its box is."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import Module

from .. import _checks, reference
from .._anchors import AvgFactor, anchor_ops, evaluate_anchors
from .index_target import IndexTarget

_ANCHORS = anchor_ops("quality_focal", reference.quality_focal_elements)


def quality_focal_loss(
    input: Tensor,
    target: Tensor | IndexTarget,
    beta: float = 2.0,
    weight: Tensor | None = None,
    reduction: str = "mean",
    *,
    avg_factor: AvgFactor = None,
    class_dim: int = -1,
    return_probabilities: bool = False,
    inplace_backward: bool = False,
) -> Any:
    """Quality focal loss of independent sigmoids.

    ::

        loss = weight |t - s|^beta ce,    ce = (1 - t) softplus(x) + t softplus(-x),    s = sigmoid(x)

    Equivalent to::

        s, ce = torch.sigmoid(input), BCEWithLogitsLoss(reduction="none")(input, target)
        loss = (target - s).abs() ** beta * ce
        loss = loss.mean()

    Args:
        input: logits, (*); float32, float64, bfloat16 or float16, any strides.
        target: in [0, 1], the shape and dtype of input; or IndexTarget(labels, scores), the quality of the predicted
            box at its class and 0 elsewhere.
        beta: how much a right prediction is discounted, >= 0. Gradients are finite for every beta: for one below 1 and
            a soft target they have no limit at s = t, and are 0 there.
        weight: a factor for each element; broadcasts to the shape of input. With an IndexTarget one of the labels'
            shape is a factor for each anchor, and beside labels (N) one for each class is (1, C).
        reduction: "none" (an element each), "mean" or "sum".
        avg_factor: "mean" divides the sum by this number, or 0-dim tensor, but at least by 1; the host reads
            nothing. Without it "mean" divides by the elements, of anchors not ignored.
        class_dim: where the classes stand: 1 for (B, C, A) and (B, C, H, W).
        return_probabilities: return (loss, sigmoid(input)) from the same read, the latter detached.
        inplace_backward: the gradient overwrites the logits, which saves their size in memory. The logits must
            not be used after this call, nor read: autograd raises for what goes through a backward pass alone.

    Returns:
        The shape of input for "none", else (), in its dtype.

    Raises:
        ValueError: a shape, dtype, reduction, beta or avg_factor that does not fit.
        TypeError: input or target that is neither a tensor nor an IndexTarget.
        IndexError: a label that is no class, nor background nor ignored.

    Source: Li et al. 2020, Generalized Focal Loss, arXiv:2006.04388.
    """
    _checks.require_exponent("beta", beta)
    return evaluate_anchors(
        _ANCHORS,
        input,
        target,
        weight=weight,
        gamma=beta,
        avg_factor=avg_factor,
        class_dim=class_dim,
        reduction=reduction,
        inplace_backward=inplace_backward,
        return_probabilities=return_probabilities,
    )


class QualityFocalLoss(Module):
    """`fused_losses.functional.quality_focal_loss` as a criterion."""

    def __init__(
        self,
        beta: float = 2.0,
        reduction: str = "mean",
        *,
        class_dim: int = -1,
        inplace_backward: bool = False,
    ) -> None:
        super().__init__()
        self.beta = beta
        self.reduction = reduction
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
        loss: Tensor = quality_focal_loss(
            input,
            target,
            self.beta,
            weight,
            self.reduction,
            avg_factor=avg_factor,
            class_dim=self.class_dim,
            inplace_backward=self.inplace_backward,
        )
        return loss

    def extra_repr(self) -> str:
        return f"beta={self.beta}, reduction={self.reduction!r}"
