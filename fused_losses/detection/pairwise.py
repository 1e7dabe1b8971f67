"""The classification cost of SimOTA, OTA and TAL assigners, without the (G, A, C) tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import _checks, reference

_cost: Callable[[Tensor, Tensor, Tensor | None], Tensor] = torch.ops.fused_losses.pairwise_bce_cost.default


def _fake_cost(logits: Tensor, gt_classes: Tensor, objectness: Tensor | None) -> Tensor:
    dtype = torch.float64 if logits.dtype is torch.float64 else torch.float32
    return logits.new_empty(gt_classes.shape[0], logits.shape[0], dtype=dtype)


torch.library.register_fake("fused_losses::pairwise_bce_cost", _fake_cost)


def pairwise_bce_cost(logits: Tensor, gt_classes: Tensor, objectness: Tensor | None = None) -> Tensor:
    """Binary cross entropy of every anchor's probabilities with every ground truth's one-hot target.

    ::

        cost[g, a] = sum_c -log(1 - p[a, c]) + log(1 - p[a, y]) - log p[a, y],    y = gt_classes[g]
        p = sigmoid(logits), or sqrt(sigmoid(logits) sigmoid(objectness)) where that is given

    It is computed from the logits as sum_c softplus(z_c) - z_y with z = log(p / (1 - p)): one pass over the logits,
    and nothing larger than the result is made.

    Equivalent to::

        p = (logits.float().sigmoid() * objectness.float().sigmoid()).sqrt().expand(G, A, C)
        target = one_hot(gt_classes, C).float().unsqueeze(1).expand(G, A, C)
        cost = F.binary_cross_entropy(p, target, reduction="none").sum(-1)

    Args:
        logits: class logits of the anchors, (A, C); float32, float64, bfloat16 or float16, any strides.
        gt_classes: the ground truths' classes, (G), of any integer dtype.
        objectness: objectness logits of the anchors, (A) or (A, 1), of the logits' dtype.

    Returns:
        (G, A), float64 for float64 logits and float32 for any other: a cost is compared, and bfloat16 has too
        few digits to rank anchors by.

    Logarithms are taken for at least -100, as in torch, so a cost is finite for infinite logits. torch takes them of
    rounded probabilities: in float32 it says 100 for -log(1 - p) from a logit of 18 on, where p rounds to 1; this says
    the logarithm itself, 18 (of the product, up to 88).

    Where a gradient is wanted (logits or objectness require one and gradients are enabled; assigners run without)
    the cost is computed in plain torch and is differentiable, with the same memory bound in A, C and G apart.

    Raises:
        IndexError: a class outside [0, C); on CUDA the kernel stops, and where a gradient is wanted it is the
            RuntimeError of index_select.
        ValueError: a shape or dtype that does not fit.
        TypeError: an argument that is not a tensor.

    Source: Ge et al. 2021, arXiv:2107.08430 (SimOTA, YOLOX).
    """
    _checks.require_tensors("pairwise_bce_cost", logits=logits, gt_classes=gt_classes)
    if objectness is not None:
        _checks.require_tensors("pairwise_bce_cost", objectness=objectness)
    problem = _problem(logits, gt_classes, objectness)
    if problem is not None:
        raise ValueError(problem)
    if objectness is not None:
        objectness = objectness.reshape(logits.shape[:1])
    if _checks.autocasts(logits):
        with torch.autocast(logits.device.type, enabled=False):  # it is float32 inside anyway
            return pairwise_bce_cost(logits, gt_classes, objectness)
    wants_gradient = torch.is_grad_enabled() and (
        logits.requires_grad or (objectness is not None and objectness.requires_grad)
    )
    gt_classes = gt_classes.long()
    if wants_gradient:
        _checks.log_fall_back("a gradient of pairwise_bce_cost is wanted")
        return reference.pairwise_bce_cost(logits, gt_classes, objectness)
    objectness = None if objectness is None else objectness.detach()
    if not _checks.reachable(logits, gt_classes, objectness):
        return reference.pairwise_bce_cost(logits, gt_classes, objectness)
    return _cost(logits, gt_classes, objectness)


def _problem(logits: Tensor, gt_classes: Tensor, objectness: Tensor | None) -> str | None:
    """What is wrong with the arguments, in words for the user."""
    if logits.dim() != 2 or logits.shape[1] == 0:
        return f"logits has {_checks.shape_of(logits)}; expected (A, C) with C > 0"
    if logits.dtype not in _checks.DTYPES:
        return f"logits has dtype {logits.dtype}; expected float32, float64, bfloat16 or float16"
    if gt_classes.dim() != 1:
        return f"gt_classes has {_checks.shape_of(gt_classes)}; expected (G), a class for each ground truth"
    if gt_classes.is_floating_point() or gt_classes.is_complex() or gt_classes.dtype is torch.bool:
        return f"gt_classes has dtype {gt_classes.dtype}; expected an integer dtype"
    if gt_classes.device != logits.device:
        return f"gt_classes is on {gt_classes.device}, logits on {logits.device}"
    if objectness is None:
        return None
    anchors = logits.shape[0]
    if objectness.shape not in ((anchors,), (anchors, 1)):
        return f"objectness has {_checks.shape_of(objectness)}; expected ({anchors},) or ({anchors}, 1)"
    if objectness.dtype != logits.dtype:
        return f"objectness has dtype {objectness.dtype}; expected the logits', {logits.dtype}"
    if objectness.device != logits.device:
        return f"objectness is on {objectness.device}, logits on {logits.device}"
    return None
