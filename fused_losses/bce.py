"""Binary cross entropy, on logits and on probabilities: torch's functions and criteria, fused."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _checks, _torch, reference
from ._anchors import AvgFactor, anchor_ops, evaluate_anchors, of_classes
from ._autograd import evaluate, evaluate_eagerly
from ._ops import LossOps
from .detection.index_target import IndexTarget


def _with_logits_reference(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    alpha_positive: float,
    alpha_negative: float,
    gamma: float,
    reduction: int,
) -> Tensor:
    name = _checks.REDUCTION_NAMES[reduction]
    return reference.binary_cross_entropy_with_logits(input, target, weight, pos_weight, name)


def _reference(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    alpha_positive: float,
    alpha_negative: float,
    gamma: float,
    reduction: int,
) -> Tensor:
    return reference.binary_cross_entropy(input, target, weight, _checks.REDUCTION_NAMES[reduction])


_WITH_LOGITS = LossOps.of("bce_with_logits", _with_logits_reference)
_ANCHORS = anchor_ops("bce_with_logits", reference.bce_elements)
_OPS = LossOps.of("bce", _reference)
_NOT_FOCAL = (1.0, 1.0, 0.0)  # alpha_positive, alpha_negative, gamma: every element-wise op takes them


def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor | IndexTarget,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
    *,
    avg_factor: AvgFactor = None,
    class_dim: int = -1,
    return_probabilities: bool = False,
    inplace_backward: bool = False,
) -> Any:
    """Binary cross entropy of sigmoid(input).

    ::

        loss = weight [(1 - t) softplus(x) + pos_weight t softplus(-x)],    softplus(x) = log(1 + exp(x))
        grad = weight [(1 - t) s - pos_weight t (1 - s)],                   s = sigmoid(x)

    Neither form cancels, whatever the logit: in float32 torch's own is 4 % off at x = -11.5, t = 0.

    Equivalent to::

        s = torch.sigmoid(input)
        loss = -weight * (pos_weight * target * s.log() + (1 - target) * (1 - s).log())
        loss = loss.mean()

    Args:
        input: logits, (*); float32, float64, bfloat16 or float16, any strides.
        target: probabilities of the positive class, the input's shape; or an IndexTarget, one class an anchor.
        weight: a factor for each element; broadcasts to the input's shape. With an IndexTarget one of the labels'
            shape is a factor for each anchor, and beside labels (N) one for each class is (1, C).
        pos_weight: a factor for each positive target; broadcasts to the input's shape.
        size_average, reduce: deprecated in torch; they override `reduction` as they do there.
        avg_factor: "mean" divides the sum by this number, or 0-dim tensor, but at least by 1; the host reads
            nothing. Without it "mean" divides by the elements, of anchors not ignored.
        class_dim: where the classes stand: 1 for (B, C, A) and (B, C, H, W).
        return_probabilities: return (loss, sigmoid(input)) from the same read, the latter detached.
        inplace_backward: the gradient overwrites the logits, which saves their size in memory. The logits must
            not be used after this call, nor read: autograd raises for what goes through a backward pass alone.

    Returns:
        The input's shape for "none", else (), in the input's dtype.

    Raises:
        ValueError, RuntimeError, TypeError: where torch's function raises them; ValueError for labels, weights or an
            avg_factor that do not fit.
        IndexError: a label that is no class, nor background nor ignored.
    """
    if avg_factor is not None or class_dim != -1 or return_probabilities or isinstance(target, IndexTarget):
        reduction = _checks.reduction_name(size_average, reduce, reduction)
        return evaluate_anchors(
            _ANCHORS,
            input,
            target,
            weight=weight,
            pos_weight=pos_weight,
            avg_factor=avg_factor,
            class_dim=class_dim,
            reduction=reduction,
            inplace_backward=inplace_backward,
            return_probabilities=return_probabilities,
        )
    plain = _checks.plain(input, target, weight, pos_weight)
    ops = _WITH_LOGITS if plain else _checks.autocast_ops(_WITH_LOGITS, input, target, weight, pos_weight)
    if ops is not None and size_average is None and reduce is None:
        try:
            code = _checks.REDUCTION_CODES[reduction]
            stored = code != _checks.NONE and input.dtype is not torch.float16
            options = (*_NOT_FOCAL, code)
            return evaluate_eagerly(
                ops, inplace_backward, stored, input, (target, weight, pos_weight), options
            )
        except _checks.OBJECTIONS as error:
            _checks.pass_on(error)  # of the op's own the checks below say why, or they happen again
    reduction = _checks.reduction_name(size_average, reduce, reduction)
    _checks.require_tensors("binary_cross_entropy_with_logits", input=input, target=target)
    code = _checks.reduction_code(reduction)
    torch_args = (input, target, weight, None, None, reduction, pos_weight)
    ops = _checks.traced_ops(_WITH_LOGITS, input)
    if not _checks.reachable(input, target, weight, pos_weight, ops=ops):
        function = _torch.binary_cross_entropy_with_logits
        return _checks.fall_back(function, torch_args, input, weight=weight, pos_weight=pos_weight)
    problem = _checks.elementwise_problem(input, target=target, weight=weight, pos_weight=pos_weight)
    if problem is not None:
        function = _torch.binary_cross_entropy_with_logits
        return _checks.ask_torch(problem, function, *torch_args)
    stored = code != _checks.NONE and input.dtype != torch.float16
    tensors = (target, weight, pos_weight)
    return evaluate(ops, inplace_backward, stored, input, tensors, (*_NOT_FOCAL, code))


def binary_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Binary cross entropy of probabilities.

    ::

        loss = -weight [t max(log p, -100) + (1 - t) max(log(1 - p), -100)]
        grad =  weight (p - t) / max(p (1 - p), 1e-12)

    The clamps are torch's. Where the probabilities come from a sigmoid, `binary_cross_entropy_with_logits`
    on its logits is faster and keeps the digits that p loses near 1.

    Equivalent to::

        positive = target * input.log().clamp_min(-100)
        negative = (1 - target) * (-input).log1p().clamp_min(-100)
        loss = -(weight * (positive + negative)).mean()

    Args:
        input: probabilities in [0, 1], (*); float32, float64, bfloat16 or float16, any strides.
        target: the input's shape and dtype.
        weight: a factor for each element; broadcasts to the input's shape.
        size_average, reduce: deprecated in torch; they override `reduction` as they do there.

    Returns:
        The input's shape for "none", else (), in the input's dtype.

    Raises:
        RuntimeError: an input outside [0, 1], and a target where torch objects to it.
        ValueError, RuntimeError, TypeError: elsewhere as torch's function.
    """
    plain = _checks.plain(input, target, weight)
    ops = _OPS if plain else None
    if not plain and isinstance(input, Tensor) and input.is_cpu:
        ops = _checks.autocast_ops(_OPS, input, target, weight)
    if ops is not None and size_average is None and reduce is None:
        try:
            code = _checks.REDUCTION_CODES[reduction]
            stored = code != _checks.NONE and input.dtype is not torch.float16
            options = (*_NOT_FOCAL, code)
            return evaluate_eagerly(ops, False, stored, input, (target, weight, None), options)
        except _checks.OBJECTIONS as error:
            _checks.pass_on(error)  # of the op's own the checks below say why, or they happen again
    reduction = _checks.reduction_name(size_average, reduce, reduction)
    _checks.require_tensors("binary_cross_entropy", input=input, target=target)
    code = _checks.reduction_code(reduction)
    function = _torch.binary_cross_entropy
    torch_args = (input, target, weight, None, None, reduction)
    ops = _checks.traced_ops(_OPS, input)
    served = _checks.reachable(input, target, weight, ops=ops)
    if not served or (_checks.autocasts(input) and not input.is_cpu):  # which torch refuses on CUDA
        return _checks.fall_back(function, torch_args, input, weight=weight)
    problem = _checks.elementwise_problem(input, target=target, weight=weight)
    if problem is not None:
        return _checks.ask_torch(problem, function, *torch_args)
    stored = code != _checks.NONE and input.dtype != torch.float16
    try:
        return evaluate(ops, False, stored, input, (target, weight, None), (*_NOT_FOCAL, code))
    except RuntimeError as error:
        if "between 0 and 1" not in str(error):
            raise
        return _checks.ask_torch(str(error), function, *torch_args)  # torch before 2.13 takes any target


class BCEWithLogitsLoss(torch.nn.BCEWithLogitsLoss):
    """`torch.nn.BCEWithLogitsLoss`, fused: see `fused_losses.functional.binary_cross_entropy_with_logits`."""

    class_dim: int = -1

    inplace_backward: bool = False  # of the class: an instance of torch's that becomes one of ours has none

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
        pos_weight: Tensor | None = None,
        *,
        class_dim: int = -1,
        inplace_backward: bool = False,
    ) -> None:
        super().__init__(weight, size_average, reduce, reduction, pos_weight)
        self.class_dim = class_dim
        self.inplace_backward = inplace_backward

    def forward(self, input: Tensor, target: Tensor | IndexTarget, *, avg_factor: AvgFactor = None) -> Tensor:
        loss: Tensor = binary_cross_entropy_with_logits(
            input,
            target,
            of_classes(self.weight, target, self.class_dim),
            reduction=self.reduction,
            pos_weight=self.pos_weight,
            avg_factor=avg_factor,
            class_dim=self.class_dim,
            inplace_backward=self.inplace_backward,
        )
        return loss


class BCELoss(torch.nn.BCELoss):
    """`torch.nn.BCELoss`, fused: see `fused_losses.functional.binary_cross_entropy`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return binary_cross_entropy(input, target, self.weight, reduction=self.reduction)
