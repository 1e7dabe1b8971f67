"""What the sigmoid losses of a detector's head share: index targets, weights an anchor or a class, avg_factor.

`evaluate_anchors` serves the calls that torch's functions do not know; csrc/torch/elementwise_ops.h describes its ops.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from . import _checks, reference
from ._autograd import evaluate
from ._ops import LossOps
from .detection.index_target import IndexTarget

AvgFactor = float | Tensor | None


def anchor_ops(name: str, elementwise: reference.Elementwise) -> LossOps:
    """The ops of the loss `name` for a detector's head; `elementwise` is its formula in plain torch."""

    def in_plain_torch(*arguments: Any) -> Tensor:
        in_words = (*arguments[:-1], _checks.REDUCTION_NAMES[arguments[-1]])
        return reference.anchors(elementwise, *in_words)

    return LossOps.of(f"{name}_anchors", in_plain_torch, writes_probability=True)


def evaluate_anchors(
    loss: LossOps,
    input: Tensor,
    target: Tensor | IndexTarget,
    *,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    alpha: Tensor | None = None,
    alpha_positive: float = 1.0,
    alpha_negative: float = 1.0,
    gamma: float = 0.0,
    detach_weight: bool = False,
    avg_factor: AvgFactor = None,
    class_dim: int = -1,
    reduction: str,
    inplace_backward: bool,
    return_probabilities: bool,
) -> Any:
    """The loss, or (loss, probabilities) where those are wanted."""
    if not isinstance(input, Tensor):
        raise TypeError(f"input is {input!r}; expected a Tensor, not {type(input).__name__}")
    if input.dtype not in _checks.DTYPES:
        raise ValueError(f"input has dtype {input.dtype}; expected float32, float64, bfloat16 or float16")
    if _checks.autocasts(input):
        loss = _checks.autocast_form(loss, input)
        with torch.autocast(input.device.type, enabled=False):
            return evaluate_anchors(
                loss,
                input,
                target,
                weight=weight,
                pos_weight=pos_weight,
                alpha=alpha,
                alpha_positive=alpha_positive,
                alpha_negative=alpha_negative,
                gamma=gamma,
                detach_weight=detach_weight,
                avg_factor=avg_factor,
                class_dim=class_dim,
                reduction=reduction,
                inplace_backward=inplace_backward,
                return_probabilities=return_probabilities,
            )
    code = _checks.reduction_code(reduction)
    factor, divisor = avg_factor_of(avg_factor, reduction, input)
    dim = _class_dim(class_dim, input)
    wide = torch.float64 if input.dtype is torch.float64 else torch.float32

    scores: Tensor | None = None
    if isinstance(target, IndexTarget):
        labels = target.labels
        anchors = input.shape[:dim] + input.shape[dim + 1 :]
        if input.dim() == 0 or labels.shape != anchors:
            raise ValueError(
                f"labels has {_checks.shape_of(labels)}; expected the input's, {tuple(input.shape)}, without its "
                f"classes (class_dim={class_dim})"
            )
        index = (target.positive, target.negative, target.background, target.ignore_index)
        main, scores = labels.long(), target.scores
        if scores is not None:
            scores = scores.to(wide).contiguous()
    elif isinstance(target, Tensor):
        anchors = None
        if target.shape != input.shape:
            raise ValueError(
                f"target has {_checks.shape_of(target)}; expected the input's, {tuple(input.shape)}"
            )
        if not target.is_floating_point():
            raise ValueError(f"target has dtype {target.dtype}; expected a floating one, or an IndexTarget")
        main, index = target, (1.0, 0.0, -1, -2)
    else:
        raise TypeError(
            f"target is {target!r}; expected a Tensor or an IndexTarget, not {type(target).__name__}"
        )

    weights = {
        name: _arrange(name, factors, input, dim, anchors if name == "weight" else None, wide)
        for name, factors in (("weight", weight), ("pos_weight", pos_weight), ("alpha", alpha))
    }
    tensors = (main, scores, *weights.values(), factor)
    options = (divisor, *index, dim, alpha_positive, alpha_negative, float(gamma), detach_weight, code)
    fits = anchors is not None or main.dtype == input.dtype or (loss.wide and main.dtype is torch.float32)
    if not _checks.reachable(input, *tensors) or not fits:
        value = loss.reference(input, *tensors, *options)
        return (value, input.detach().sigmoid()) if return_probabilities else value
    stored = code != _checks.NONE and input.dtype != torch.float16
    if not return_probabilities:
        return evaluate(loss, inplace_backward, stored, input, tensors, options)
    if torch.compiler.is_compiling():  # a traced op has its results and nothing beside them
        return evaluate(loss, inplace_backward, stored, input, tensors, options), input.detach().sigmoid()
    probabilities = torch.empty_like(input.detach(), memory_format=torch.preserve_format)
    value = evaluate(_writing_to(loss, probabilities), inplace_backward, stored, input, tensors, options)
    return value, probabilities


def _writing_to(loss: LossOps, probabilities: Tensor) -> LossOps:
    forward, train, train_ = (partial(form, probability=probabilities) for form in loss.writing)
    return dataclasses.replace(loss, forward=forward, train=train, train_=train_, number=None)


def avg_factor_of(avg_factor: AvgFactor, reduction: str, input: Tensor) -> tuple[Tensor | None, float]:
    """What a mean divides by, as a tensor on its device or as a number (0: the mean's own)."""
    if avg_factor is None:
        return None, 0.0
    if reduction != "mean":
        raise ValueError(f"avg_factor divides a mean; reduction is {reduction!r}")
    if isinstance(avg_factor, Tensor):
        if avg_factor.numel() != 1:
            raise ValueError(
                f"avg_factor has {_checks.shape_of(avg_factor)}; expected a number or a 0-dim Tensor"
            )
        if not avg_factor.is_cpu or input.is_cpu or avg_factor.requires_grad or torch.compiler.is_compiling():
            return avg_factor.to(torch.float64).reshape(()), 0.0
        avg_factor = float(avg_factor)  # beside logits on a device: the host has it, and nothing waits
    if isinstance(avg_factor, Real):
        return None, float("nan") if avg_factor != avg_factor else max(float(avg_factor), 1.0)
    raise TypeError(f"avg_factor is {avg_factor!r}; expected a number or a 0-dim Tensor")


def of_classes(weight: Tensor | None, target: Any, class_dim: int) -> Tensor | None:
    """A criterion's weight, one a class however many anchors there are: not to be taken for one an anchor."""
    if weight is None or not isinstance(target, IndexTarget) or weight.dim() != 1 or target.labels.dim() != 1:
        return weight
    return weight.unsqueeze(0 if class_dim in (-1, 1) else 1)


def _class_dim(class_dim: int, input: Tensor) -> int:
    dims = max(input.dim(), 1)
    if not -dims <= class_dim < dims:
        raise IndexError(f"class_dim is {class_dim}; input has shape {tuple(input.shape)}")
    return class_dim % dims


def _arrange(
    name: str, factors: Tensor | None, input: Tensor, dim: int, anchors: torch.Size | None, wide: torch.dtype
) -> Tensor | None:
    """`factors` as they broadcast to the input: one an anchor, one a class, or as they are."""
    if factors is None:
        return None
    if not isinstance(factors, Tensor):
        raise TypeError(f"{name} is {factors!r}; expected a Tensor or None, not {type(factors).__name__}")
    if anchors is not None and len(anchors) == 1 == factors.dim() and factors.shape[0] not in (1, *anchors):
        one_a_class = tuple(size if d == dim else 1 for d, size in enumerate(input.shape))
        raise ValueError(
            f"{name} has {_checks.shape_of(factors)}; beside labels of shape {tuple(anchors)} expected theirs, or for a "
            f"factor each class that of {one_a_class}"
        )
    if anchors is not None and factors.shape == anchors:
        alone = (1,) * (input.dim() - factors.dim()) + tuple(factors.shape)
        factors = factors.unsqueeze(dim)
        if (
            len(anchors) > 1
            and alone != tuple(factors.shape)
            and _checks.broadcasts(torch.Size(alone), input.shape)
        ):
            raise ValueError(
                f"{name} has shape {tuple(anchors)}, that of the labels, which broadcasts to the input's as well: "
                f"expected {tuple(factors.shape)} for a factor each anchor, or {alone}"
            )
    elif factors.dim() == 1 and dim < input.dim() - 1 and factors.shape[0] == input.shape[dim]:
        factors = factors.view(-1, *(1,) * (input.dim() - 1 - dim))
    elif not _checks.broadcasts(factors.shape, input.shape):
        either = f" or an anchor's, {tuple(anchors)}" if anchors is not None else ""
        raise ValueError(
            f"{name} has {_checks.shape_of(factors)}, which does not broadcast to the input's, {tuple(input.shape)}"
            f"{either}"
        )
    return factors if factors.dtype in (input.dtype, wide) else factors.to(wide)
