"""The losses in plain torch: what each one means, in a form that can be read.

Every function is differentiable twice and runs on any device and in any floating dtype. The fallbacks and
second derivatives of the package go through this module, and its tests hold the kernels against it in fp64.

Shapes: N rows, C classes, d1..dK further dimensions, `*` any shape. fp16 and bf16 are computed in fp32 and
rounded once, when the result is stored. In the formulas s = sigmoid(x) and softplus(x) = log(1 + exp(x)).
"""

from __future__ import annotations

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
    return _reduce(loss, reduction).to(torch.result_type(input, target))


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
    wrongness = t * torch.sigmoid(-x) + (1 - t) * torch.sigmoid(x)
    alpha = alpha_positive * t + alpha_negative * (1 - t)
    loss = alpha * _modulation(wrongness, gamma) * _logistic_loss(x, t, pos_weight)
    if weight is not None:
        loss = loss * weight
    return _reduce(loss, reduction).to(torch.result_type(input, target))


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
        loss = loss * alpha.to(loss.dtype)[index]
    elif alpha is not None:
        loss = loss * alpha
    loss = loss.masked_fill(ignored, 0)
    if reduction == "mean":
        loss = loss.sum() / (~ignored).sum()
    else:
        loss = _reduce(loss, reduction)
    return loss.to(input.dtype)


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


def _reduce(loss: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return loss
    if reduction == "mean":
        return loss.mean()
    if reduction == "sum":
        return loss.sum()
    raise ValueError(f"{reduction} is not a valid value for reduction")
