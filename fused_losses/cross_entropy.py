"""Cross entropy: `torch.nn.functional.cross_entropy` and `torch.nn.CrossEntropyLoss`, fused."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _checks, _torch, reference
from ._autograd import evaluate, evaluate_eagerly
from ._ops import LossOps


def _reference(
    input: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int, smoothing: float
) -> Tensor:
    return reference.cross_entropy(
        input, target, weight, ignore_index, _checks.REDUCTION_NAMES[reduction], smoothing
    )


_OPS = LossOps.of("cross_entropy", _reference)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    inplace_backward: bool = False,
) -> Tensor:
    """Cross entropy between logits and class indices or class probabilities.

    With p = softmax(x), e = label_smoothing, w = weight (1 where None)::

        indices y:        loss = (1 - e) w_y (-log p_y) + e / C sum_c w_c (-log p_c)
        probabilities t:  loss = sum_c w_c ((1 - e) t_c + e / C) (-log p_c)

    "mean" divides the sum by the weights of the targets not ignored (indices), or by their number of rows
    (probabilities). No row counted is 0 / 0: nan, as in torch.

    Equivalent to::

        log_p = torch.log_softmax(input, 1)
        loss = torch.nn.functional.nll_loss(log_p, target, weight, reduction=reduction)

    Args:
        input: logits, (C), (N, C) or (N, C, d1, ..., dK); float32, float64, bfloat16 or float16, any strides.
        target: class indices in [0, C), (), (N) or (N, d1, ..., dK), int64 or uint8; or probabilities, of the
            input's shape and dtype.
        weight: (C), a factor for each class.
        ignore_index: a target of this value has no loss and an exactly zero gradient. Indices only.
        label_smoothing: in [0, 1].
        size_average, reduce: deprecated in torch; they override `reduction` as they do there.
        inplace_backward: the gradient overwrites the logits, which saves their size in memory. The logits must
            not be used after this call, nor read: autograd raises for what goes through a backward pass alone.

    Returns:
        The shape of class indices for "none", else (), in the input's dtype.

    Raises:
        IndexError: a class index outside [0, C) that is not ignore_index.
        ValueError, RuntimeError, TypeError: where `torch.nn.functional.cross_entropy` raises them.
    """
    plain = _checks.plain(input, target, weight)
    ops = _OPS if plain else _checks.autocast_ops(_OPS, input, target, weight)
    if ops is not None and size_average is None and reduce is None:
        try:
            code = _checks.REDUCTION_CODES[reduction]
            stored = code != _checks.NONE and input.dtype is not torch.float16
            tensors = (target, weight if weight is None else _checks.compute_weight(weight, input))
            options = (code, ignore_index, label_smoothing)
            return evaluate_eagerly(ops, inplace_backward, stored, input, tensors, options)
        except _checks.OBJECTIONS as error:
            _checks.pass_on(error)  # of the op's own the checks below say why, or they happen again
    reduction = _checks.reduction_name(size_average, reduce, reduction)
    _checks.require_tensors("cross_entropy", input=input, target=target)
    code = _checks.reduction_code(reduction)
    torch_args = (input, target, weight, None, ignore_index, None, reduction, label_smoothing)
    ops = _checks.traced_ops(_OPS, input)
    if not _checks.reachable(input, target, weight, ops=ops):
        return _checks.fall_back(_torch.cross_entropy, torch_args, input, weight=weight)
    problem = _problem(input, target, weight, ignore_index, label_smoothing)
    if problem is not None:
        return _checks.ask_torch(problem, _torch.cross_entropy, *torch_args)
    if target.dtype == torch.uint8:
        target = target.long()
    stored = code != _checks.NONE and input.dtype != torch.float16
    weight = _checks.compute_weight(weight, input)
    options = (code, ignore_index, label_smoothing)
    return evaluate(ops, inplace_backward, stored, input, (target, weight), options)


def _problem(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, label_smoothing: float
) -> str | None:
    """What keeps the kernels from this call, in words for the user."""
    dims = input.dim()
    if not isinstance(ignore_index, int):
        return f"ignore_index is {ignore_index!r}; expected an int"
    if not isinstance(label_smoothing, (int, float)) or not 0.0 <= label_smoothing <= 1.0:
        return f"label_smoothing is {label_smoothing!r}; expected a number from 0.0 to 1.0"
    if target.shape == input.shape and dims > 0:
        if target.dtype != input.dtype:
            return f"target has dtype {target.dtype}; class probabilities need the input's, {input.dtype}"
        if ignore_index >= 0:
            return f"ignore_index is {ignore_index}, but target holds probabilities, which have no index to ignore"
        if input.shape[min(dims - 1, 1)] == 0:
            return f"input has shape {tuple(input.shape)}; expected (C), (N, C) or (N, C, d1, ...) with C > 0"
    else:
        problem = _checks.index_problem(input, target)
        if problem is not None:
            return f"{problem}, or probabilities of the input's own shape"
    if weight is not None:
        classes = input.shape[min(dims - 1, 1)]
        if tuple(weight.shape) != (classes,):
            return f"weight has {_checks.shape_of(weight)}; expected ({classes},), a weight for each class"
        if weight.dtype != input.dtype:
            return f"weight has dtype {weight.dtype}; expected the input's, {input.dtype}"
    return None


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """`torch.nn.CrossEntropyLoss`, fused: see `fused_losses.functional.cross_entropy`."""

    inplace_backward: bool = False  # of the class: an instance of torch's that becomes one of ours has none

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        inplace_backward: bool = False,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.inplace_backward = inplace_backward

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(
            input,
            target,
            self.weight,
            None,
            self.ignore_index,
            None,
            self.reduction,
            self.label_smoothing,
            inplace_backward=self.inplace_backward,
        )
