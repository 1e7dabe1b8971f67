"""The losses in plain torch: what each one means, in a form that can be read.

Every function is differentiable twice and runs on any device and in any floating dtype. The fallbacks and
second derivatives of the package go through this module, and its tests hold the kernels against it in fp64.

Shapes: N rows, C classes, d1..dK further dimensions, `*` any shape. fp16 and bf16 are computed in fp32 and
rounded once, when the result is stored. In the formulas s = sigmoid(x) and softplus(x) = log(1 + exp(x)).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as torch_functional
from torch import Tensor

from . import _torch

# Above this log(1 + exp(x)) and x are one number in fp64; torch's default, 20, is right for fp32 only.
_SOFTPLUS_LINEAR_FROM = 40.0


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
) -> Tensor:
    """Cross entropy of softmax(input) over the classes, as `torch.nn.functional.cross_entropy`.

    With p = softmax(x), e = label_smoothing, w = weight:

        class indices:  loss = (1 - e) w_y (-log p_y) + e / C sum_c w_c (-log p_c);  mean divides by sum w_y
        probabilities:  loss = sum_c w_c ((1 - e) t_c + e / C) (-log p_c);    mean divides by N d1 .. dK

    input: (C), (N, C) or (N, C, d1, .., dK). target: class indices (), (N) or (N, d1, .., dK), or
    probabilities of input's shape. weight: (C) or None. Returns the shape of the class indices for "none",
    else (). Rows whose index is ignore_index count for nothing, whatever their logits hold.
    """
    if target.shape != input.shape or not target.is_floating_point():
        input = _without_ignored_rows(input, target == ignore_index)
    loss = _torch.cross_entropy(
        _wide(input),
        _wide(target),
        None if weight is None else _wide(weight),
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )
    return loss.to(input.dtype)


def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    reduction: str,
) -> Tensor:
    """Binary cross entropy of sigmoid(input), as `torch.nn.functional.binary_cross_entropy_with_logits`.

        loss = weight [(1 - t) softplus(x) + pos_weight t softplus(-x)]

    input, target: (*). weight, pos_weight: broadcast to (*), or None for 1. Returns (*) for "none", else ().
    """
    loss = _logistic_loss(_wide(input), _wide(target), pos_weight)
    if weight is not None:
        loss = loss * weight
    return reduce(loss, reduction).to(torch.promote_types(input.dtype, target.dtype))


def binary_cross_entropy(input: Tensor, target: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    """Binary cross entropy of probabilities, as `torch.nn.functional.binary_cross_entropy`.

        loss = -weight [t max(log p, -100) + (1 - t) max(log(1 - p), -100)]

    input (probabilities p), target: (*). weight: broadcasts to (*), or None for 1. Returns (*) for "none",
    else ().
    """
    loss = _torch.binary_cross_entropy(
        _wide(input), _wide(target), None if weight is None else _wide(weight), reduction=reduction
    )
    return loss.to(input.dtype)


def sigmoid_focal_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    alpha_positive: float,
    alpha_negative: float,
    gamma: float,
    reduction: str,
) -> Tensor:
    """Focal loss of independent sigmoids: torchvision's, and YOLOv5's with its pos_weight and weight.

        loss = a_t u^gamma weight [(1 - t) softplus(x) + pos_weight t softplus(-x)]
        u    = t (1 - s) + (1 - t) s                      how wrong the prediction is, 0 to 1
        a_t  = alpha_positive t + alpha_negative (1 - t)

    input, target: (*), targets in [0, 1]. weight, pos_weight: broadcast to (*), or None for 1.
    Returns (*) for "none", else ().
    """
    x, t = _wide(input), _wide(target)
    loss = focal_elements(x, t, pos_weight, alpha_positive, alpha_negative, gamma, False)
    if weight is not None:
        loss = loss * weight
    return reduce(loss, reduction).to(torch.promote_types(input.dtype, target.dtype))


def softmax_focal_loss(
    input: Tensor,
    target: Tensor,
    alpha: float | Tensor | None,
    gamma: float,
    ignore_index: int,
    reduction: str,
) -> Tensor:
    """Focal loss of a softmax over the classes.

        loss = -alpha_y (1 - p_y)^gamma log p_y;  mean divides by the number of rows not ignored

    input: (C), (N, C) or (N, C, d1, .., dK). target: class indices (), (N) or (N, d1, .., dK).
    alpha: None for 1, a number for every class, or (C). Returns the shape of target for "none", else ().
    Rows whose index is ignore_index count for nothing, whatever their logits hold.
    """
    class_dim = _class_dim(input)
    ignored = target == ignore_index
    index = target.masked_fill(ignored, 0).long()
    log_p = torch_functional.log_softmax(_wide(_without_ignored_rows(input, ignored)), class_dim)
    log_p_y = log_p.gather(class_dim, index.unsqueeze(class_dim)).squeeze(class_dim)
    loss = -_modulation(-torch.expm1(log_p_y), gamma) * log_p_y
    if isinstance(alpha, Tensor):
        loss = loss * (alpha if alpha.dim() == 0 else alpha[index]).to(loss.dtype)
    elif alpha is not None:
        loss = loss * alpha
    loss = loss.masked_fill(ignored, 0)
    if reduction == "mean":
        loss = loss.sum() / (~ignored).sum()
    else:
        loss = reduce(loss, reduction)
    return loss.to(input.dtype)


def index_target(
    labels: Tensor,
    scores: Tensor | None,
    classes: int,
    class_dim: int,
    positive: float,
    negative: float,
    background: int,
    ignore_index: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The dense target that an index target stands for, and which of its anchors are ignored.

    labels: (*), int64. scores: (*) or None. Returns the target, (*) with `classes` at class_dim, and a bool (*).
    """
    ignored = labels == ignore_index
    absent = ignored | (labels == background) | (labels == classes)
    index = labels.masked_fill(absent, 0)
    _require_classes(index, classes)
    at_label = torch.full_like(labels, positive, dtype=dtype) if scores is None else scores.to(dtype)
    target = torch.full((*labels.shape, classes), negative, dtype=dtype, device=labels.device)
    if classes > 0:
        at_label = at_label.masked_fill(absent, negative)
        target = target.scatter(-1, index.unsqueeze(-1), at_label.unsqueeze(-1))
    return target.movedim(-1, class_dim), ignored


def _require_classes(index: Tensor, classes: int) -> None:
    if not _may_read(index):
        return
    outside = index[(index < 0) | (index >= max(classes, 1))]
    if outside.numel():
        raise IndexError(f"Label {outside[0]} is out of bounds: input has {classes} classes")


def _may_read(tensor: Tensor) -> bool:
    """Whether its numbers are there, and to be read without waiting for another device."""
    return (
        tensor.is_cpu
        and type(tensor) is Tensor  # what a compiler traces with has no numbers
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
    )


Elementwise = Callable[[Tensor, Tensor, Tensor | None, float | Tensor, float | Tensor, float, bool], Tensor]


def anchors(
    elementwise: Elementwise,
    input: Tensor,
    target: Tensor,
    scores: Tensor | None,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    alpha: Tensor | None,
    avg_factor: Tensor | None,
    divisor: float,
    positive: float,
    negative: float,
    background: int,
    ignore_index: int,
    class_dim: int,
    alpha_positive: float,
    alpha_negative: float,
    gamma: float,
    detach_weight: bool,
    reduction: str,
) -> Tensor:
    """A sigmoid loss of a detector's head: dense or index targets, and another divisor for the mean.

        loss = weight * elementwise(input, target, pos_weight, alpha_positive, alpha_negative, gamma, detach_weight)

    input: (*), C of them at class_dim. target: (*), or int64 labels, (*) without class_dim, and scores of their shape.
    weight, pos_weight, alpha: broadcast to (*); alpha and 1 - alpha take the place of alpha_positive and
    alpha_negative. avg_factor: one element, or divisor: a number that is not 0; the mean divides by it, at least 1,
    else by the elements not ignored. Returns (*) for "none", else ().
    """
    x, t = _wide(input), target
    kept = None
    if not target.is_floating_point():
        options = (positive, negative, background, ignore_index)
        t, ignored = index_target(target, scores, input.shape[class_dim], class_dim, *options, x.dtype)
        kept = ~ignored.unsqueeze(class_dim)
        x = x.masked_fill(~kept, 0)
    balance: tuple[float | Tensor, float | Tensor] = (alpha_positive, alpha_negative)
    if alpha is not None:
        balance = (_wide(alpha), 1 - _wide(alpha))
    loss = elementwise(x, _wide(t), pos_weight, *balance, gamma, detach_weight)
    if weight is not None:
        loss = loss * weight
    if kept is not None:
        loss = loss.masked_fill(~kept, 0)
    if reduction == "mean" and kept is not None and divisor == 0 and avg_factor is None:
        loss = loss.sum() / (kept.sum() * input.shape[class_dim])
    else:
        loss = _mean_by(loss, reduction, avg_factor, divisor)
    return loss.to(input.dtype if kept is not None else torch.promote_types(input.dtype, target.dtype))


def bce_elements(
    x: Tensor,
    t: Tensor,
    pos_weight: Tensor | None,
    alpha_positive: float | Tensor,
    alpha_negative: float | Tensor,
    gamma: float,
    detach_weight: bool,
) -> Tensor:
    """(1 - t) softplus(x) + pos_weight t softplus(-x)"""
    return _logistic_loss(x, t, pos_weight)


def focal_elements(
    x: Tensor,
    t: Tensor,
    pos_weight: Tensor | None,
    alpha_positive: float | Tensor,
    alpha_negative: float | Tensor,
    gamma: float,
    detach_weight: bool,
) -> Tensor:
    """a_t u^gamma ce; see sigmoid_focal_loss."""
    wrongness = t * torch.sigmoid(-x) + (1 - t) * torch.sigmoid(x)
    alpha = alpha_positive * t + alpha_negative * (1 - t)
    return alpha * _modulation(wrongness, gamma) * _logistic_loss(x, t, pos_weight)


def quality_focal_elements(
    x: Tensor,
    t: Tensor,
    pos_weight: Tensor | None,
    alpha_positive: float | Tensor,
    alpha_negative: float | Tensor,
    gamma: float,
    detach_weight: bool,
) -> Tensor:
    """|t - s|^gamma ce"""
    # Where s is small it is its own difference to t = 0, and 1 - s to t = 1: no digit is lost.
    difference = (1 - t) * torch.sigmoid(x) - t * torch.sigmoid(-x)
    return _modulation(difference.abs(), gamma) * _logistic_loss(x, t, None)


def varifocal_elements(
    x: Tensor,
    t: Tensor,
    pos_weight: Tensor | None,
    alpha_positive: float | Tensor,
    alpha_negative: float | Tensor,
    gamma: float,
    detach_weight: bool,
) -> Tensor:
    """w ce where t > 0, w = t or (alpha_positive 0) 1; else alpha_negative s^gamma ce with t = 0."""
    focus = alpha_negative * _modulation(torch.sigmoid(x), gamma)
    if detach_weight:
        focus = focus.detach()
    weight = alpha_positive * t + (1 - alpha_positive)
    positive = weight * _logistic_loss(x, t, None)
    return torch.where(t > 0, positive, focus * _logistic_loss(x, torch.zeros_like(t), None))


def distribution_focal_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    avg_factor: Tensor | None,
    divisor: float,
    reduction: str,
) -> Tensor:
    """Cross entropy of softmax(input) with the two bins beside a target.

        loss = -weight ((l + 1 - t) log p_l + (t - l) log p_(l+1)),    l = floor(t)

    input: (C), (N, C) or (N, C, d1, .., dK) logits of C bins. target, weight: the same without C, targets in
    [0, C - 1]. The mean divides by avg_factor or divisor as in `anchors`, else by the targets. Returns the shape of
    target for "none", else ().
    """
    class_dim = _class_dim(input)
    last = input.shape[class_dim] - 1
    outside = ~((target >= 0) & (target <= last))
    if _may_read(target) and outside.any():
        raise IndexError(f"Target {target[outside][0]} is out of bounds: input has {last + 1} bins")
    log_p = torch_functional.log_softmax(_wide(input), class_dim)
    left = target.detach().floor().long().clamp(0, max(last - 1, 0))  # the last bin is a right neighbour

    def at(bin: Tensor) -> Tensor:
        return log_p.gather(class_dim, bin.unsqueeze(class_dim)).squeeze(class_dim)

    loss = -((left + 1 - target) * at(left) + (target - left) * at((left + 1).clamp(max=last)))
    if weight is not None:
        loss = loss * weight
    return _mean_by(loss, reduction, avg_factor, divisor).to(input.dtype)


def pairwise_bce_cost(logits: Tensor, gt_classes: Tensor, objectness: Tensor | None) -> Tensor:
    """Binary cross entropy of every anchor's probabilities p with every ground truth's one-hot target.

        cost[g, a] = sum_c -log(1 - p[a, c]) + log(1 - p[a, y]) - log p[a, y],    y = gt_classes[g]
        p = sigmoid(x), or sqrt(sigmoid(x) sigmoid(o)) with an objectness logit o an anchor

    logits: (A, C). gt_classes: (G). objectness: (A) or None. Returns (G, A), fp32 for fp16 and bf16. Logarithms are
    taken for at least -100, as torch's binary_cross_entropy does.
    """
    x = _wide(logits)
    log_p, log_not_p = torch_functional.logsigmoid(x), torch_functional.logsigmoid(-x)
    if objectness is not None:
        o = _wide(objectness).unsqueeze(1)
        # 1 - p^2 = sigmoid(-x) + sigmoid(x) sigmoid(-o) = (1 - p) (1 + p); a small p needs 1 - p itself
        log_rest = torch.logaddexp(log_not_p, log_p + torch_functional.logsigmoid(-o))
        log_p = (log_p + torch_functional.logsigmoid(o)) / 2
        p = log_p.exp()
        log_not_p = torch.where(p < 0.5, torch.log1p(-p.clamp(max=0.5)), log_rest - torch.log1p(p))
    log_p, log_not_p = log_p.clamp_min(-100), log_not_p.clamp_min(-100)
    others = log_not_p.sum(1, keepdim=True) - log_not_p.index_select(1, gt_classes)
    return -(others + log_p.index_select(1, gt_classes)).t().contiguous()


def _logistic_loss(x: Tensor, t: Tensor, pos_weight: Tensor | None) -> Tensor:
    """(1 - t) softplus(x) + pos_weight t softplus(-x): no term cancels another, whatever x is."""
    positive = t if pos_weight is None else t * pos_weight
    return (1 - t) * torch_functional.softplus(x, 1.0, _SOFTPLUS_LINEAR_FROM) + positive * (
        torch_functional.softplus(-x, 1.0, _SOFTPLUS_LINEAR_FROM)
    )


def _modulation(wrongness: Tensor, gamma: float) -> Tensor:
    """wrongness^gamma, with finite derivatives where the prediction is right to the last bit.

    The derivatives hold wrongness^(gamma - 1) and wrongness^(gamma - 2), which are infinite at 0 for a gamma
    below 2. From the square root of the smallest normal number up both are finite; below it the cross
    entropy that wrongness^gamma multiplies is under that bound too, so the product is zero in practice.
    """
    return wrongness.clamp_min(torch.finfo(wrongness.dtype).tiny ** 0.5).pow(gamma)


def _without_ignored_rows(input: Tensor, ignored: Tensor) -> Tensor:
    """Zeros for the logits of ignored rows: neither their inf and nan nor a gradient gets through."""
    return input.masked_fill(ignored.unsqueeze(_class_dim(input)), 0)


def _class_dim(input: Tensor) -> int:
    return 0 if input.dim() == 1 else 1


def _wide(tensor: Tensor) -> Tensor:
    """fp32 for fp16 and bf16, anything else as it is."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _mean_by(loss: Tensor, reduction: str, avg_factor: Tensor | None, divisor: float) -> Tensor:
    if reduction != "mean" or (divisor == 0 and avg_factor is None):
        return reduce(loss, reduction)
    return loss.sum() / (divisor if avg_factor is None else avg_factor.clamp(min=1).to(loss.dtype))


def reduce(loss: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return loss
    if reduction == "mean":
        return loss.mean()
    if reduction == "sum":
        return loss.sum()
    raise ValueError(f"{reduction} is not a valid value for reduction")
