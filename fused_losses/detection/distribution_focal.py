"""Distribution focal loss: a side of a box as a distribution over bins."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Module

from .. import _checks, reference
from .._anchors import AvgFactor, avg_factor_of
from .._autograd import evaluate, evaluate_eagerly
from .._ops import LossOps


def _reference(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    avg_factor: Tensor | None,
    divisor: float,
    reduction: int,
) -> Tensor:
    name = _checks.REDUCTION_NAMES[reduction]
    return reference.distribution_focal_loss(input, target, weight, avg_factor, divisor, name)


_OPS = LossOps.of("distribution_focal", _reference)


def distribution_focal_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: str = "mean",
    *,
    avg_factor: AvgFactor = None,
    inplace_backward: bool = False,
) -> Tensor:
    """Distribution focal loss: cross entropy of the bins with both neighbours of a target between them.

    ::

        loss = -weight ((l + 1 - t) log p_l + (t - l) log p_(l+1)),    l = floor(t),    p = softmax(x)

    Equivalent to::

        l = target.long().clamp(max=input.shape[-1] - 2)
        left, right = (F.cross_entropy(input.movedim(-1, 1), i, reduction="none") for i in (l, l + 1))
        loss = (left * (l + 1 - target) + right * (target - l)).mean()

    Args:
        input: logits of the bins, (bins), (N, bins) or (N, ..., bins), as (N, 4, bins) and (4 N, bins) for the sides of
            N boxes; float32, float64, bfloat16 or float16, any strides.
        target: in [0, bins - 1], the shape of input without its bins; any floating dtype.
        weight: a factor for each target, or for each of N anchors: broadcasts to target's shape, and beside (N, 4) a
            weight of one dimension is (N); one for each side is (1, 4).
        reduction: "none" (one value a target), "mean" or "sum". "mean" divides by the number of targets.
        avg_factor: "mean" divides the sum by this number, or 0-dim tensor, but at least by 1; the host reads nothing.
        inplace_backward: the gradient overwrites the logits, which saves their size in memory. The logits must
            not be used after this call, nor read: autograd raises for what goes through a backward pass alone.

    Returns:
        The shape of target for "none", else (), in the dtype of input.

    Raises:
        IndexError: a target outside [0, bins - 1]. On a GPU the kernel stops.
        ValueError: a shape, dtype, reduction or avg_factor that does not fit.
        TypeError: input or target that is not a tensor.

    Source: Li et al. 2020, Generalized Focal Loss, arXiv:2006.04388.
    """
    if (
        weight is None
        and avg_factor is None
        and _checks.plain(input, target)
        and input.dim() == target.dim() + 1 == 2
    ):
        try:
            code = _checks.REDUCTION_CODES[reduction]
            stored = code != _checks.NONE and input.dtype is not torch.float16
            return evaluate_eagerly(_OPS, inplace_backward, stored, input, (target, None, None), (0.0, code))
        except _checks.OBJECTIONS as error:
            _checks.pass_on(error)  # of the op's own the checks below say why, or they happen again
    _checks.require_tensors("distribution_focal_loss", input=input, target=target)
    if not _checks.autocasts(input):
        return _evaluate(_OPS, input, target, weight, reduction, avg_factor, inplace_backward)
    ops = _checks.autocast_form(_OPS, input)
    with torch.autocast(input.device.type, enabled=False):
        return _evaluate(ops, input, target, weight, reduction, avg_factor, inplace_backward)


def _evaluate(
    ops: LossOps,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    avg_factor: AvgFactor,
    inplace_backward: bool,
) -> Tensor:
    code = _checks.reduction_code(reduction)
    factor, divisor = avg_factor_of(avg_factor, reduction, input)
    if input.dtype not in _checks.DTYPES:
        raise ValueError(f"input has dtype {input.dtype}; expected float32, float64, bfloat16 or float16")
    if input.dim() == 0 or input.shape[-1] == 0:
        raise ValueError(f"input has {_checks.shape_of(input)}; expected (..., bins) with bins > 0")
    if target.shape != input.shape[:-1]:
        raise ValueError(
            f"target has {_checks.shape_of(target)}; expected the input's, {tuple(input.shape)}, without its bins"
        )
    if not target.is_floating_point():
        raise ValueError(
            f"target has dtype {target.dtype}; expected a floating one: it lies between two bins"
        )
    wide = torch.float64 if input.dtype is torch.float64 else torch.float32
    if weight is not None:
        weight = _for_each_target(weight, target).to(wide)
    logits = input.movedim(-1, 1) if input.dim() > 2 else input
    tensors = (target.to(wide), weight, factor)
    options = (divisor, code)
    if not _checks.reachable(logits, *tensors):
        return ops.reference(logits, *tensors, *options)
    stored = code != _checks.NONE and input.dtype != torch.float16
    return evaluate(ops, inplace_backward, stored, logits, tensors, options)


def _for_each_target(weight: Tensor, target: Tensor) -> Tensor:
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight is {weight!r}; expected a Tensor or None, not {type(weight).__name__}")
    # (4) beside (4, 4) is one for each anchor, not for each side
    of_anchors = weight.dim() > 0 and weight.dim() == target.dim() - 1
    each = weight.unsqueeze(-1) if of_anchors else weight
    if not _checks.broadcasts(each.shape, target.shape):
        raise ValueError(
            f"weight has {_checks.shape_of(weight)}, which does not broadcast to target's, {tuple(target.shape)}"
        )
    return each.expand(target.shape)


class DistributionFocalLoss(Module):
    """`fused_losses.functional.distribution_focal_loss` as a criterion."""

    def __init__(self, reduction: str = "mean", *, inplace_backward: bool = False) -> None:
        super().__init__()
        self.reduction = reduction
        self.inplace_backward = inplace_backward

    def forward(
        self, input: Tensor, target: Tensor, weight: Tensor | None = None, *, avg_factor: AvgFactor = None
    ) -> Tensor:
        return distribution_focal_loss(
            input,
            target,
            weight,
            self.reduction,
            avg_factor=avg_factor,
            inplace_backward=self.inplace_backward,
        )

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}"
