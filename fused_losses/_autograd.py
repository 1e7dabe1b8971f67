"""The autograd Functions every loss shares.

`Stored` makes the gradient in the forward pass, while the logits are in the cache; backward only applies the
upstream gradient. `Recomputed` makes it in backward, from the logits: for "none", whose upstream gradient is a
tensor, and for fp16, where a loss scale must come in before the gradient is rounded. Both differentiate twice,
by `reference`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.graph import increment_version

from ._ops import LossOps, scale_

_keep_graph = torch._C._autograd._get_current_graph_task_keep_graph


class Stored(Function):
    @staticmethod
    def forward(loss: LossOps, inplace: bool, *args: Any) -> Any:
        if not inplace:
            return loss.train(*args)
        value = loss.train_(*args)
        return value if _is_view(args[0]) else (value, args[0])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _remember(ctx, inputs)
        ctx.set_materialize_grads(False)
        if ctx.inplace:
            # Marked dirty, the logits carry this node from now on: who uses them later gets an error, not the
            # gradient's numbers. torch allows that beside another output only where they are no view; a view's
            # users are caught by the version counter, as far as they keep the logits for their own backward.
            logits = inputs[2]
            if _is_view(logits):
                increment_version(logits)
            else:
                ctx.mark_dirty(logits)
            ctx.save_for_backward(logits)
            return
        gradient = output[1]
        ctx.mark_non_differentiable(gradient)
        ctx.save_for_backward(gradient, *ctx.tensors)
        del ctx.tensors

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, of_logits: Tensor | None = None) -> Any:
        if of_logits is not None:
            raise RuntimeError(
                "the logits were used after a loss with inplace_backward=True, which has modified them by an "
                "inplace operation: they hold its gradient. Use them before the loss, or inplace_backward=False"
            )
        if upstream is None:
            return _gradients(ctx, None)
        if ctx.inplace:
            _refuse_second_derivative()
            gradient = ctx.saved_tensors[0].detach()
            scale_(gradient, upstream)
            increment_version(gradient)
            return _gradients(ctx, gradient)
        gradient, *tensors = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _gradients(ctx, _differentiable(ctx, upstream, tensors))
        if _keep_graph():  # the saved gradient serves again
            gradient = gradient * upstream
        else:
            scale_(gradient, upstream)
        return _gradients(ctx, gradient)


class Recomputed(Function):
    @staticmethod
    def forward(loss: LossOps, inplace: bool, *args: Any) -> Tensor:
        return loss.forward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _remember(ctx, inputs)
        ctx.save_for_backward(*ctx.tensors)
        del ctx.tensors

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        tensors = ctx.saved_tensors
        if ctx.inplace:
            _refuse_second_derivative()
            gradient = tensors[0].detach()
            ctx.loss.backward_(upstream, *_arguments(ctx, tensors))
            increment_version(gradient)
            return _gradients(ctx, gradient)
        if torch.is_grad_enabled():
            return _gradients(ctx, _differentiable(ctx, upstream, tensors))
        return _gradients(ctx, ctx.loss.backward(upstream, *_arguments(ctx, tensors)))


def _remember(ctx: Any, inputs: tuple[Any, ...]) -> None:
    ctx.loss, ctx.inplace, *args = inputs
    ctx.tensors = [arg for arg in args if isinstance(arg, Tensor)]
    ctx.others = [None if isinstance(arg, Tensor) else arg for arg in args]
    ctx.places = [place for place, arg in enumerate(args) if isinstance(arg, Tensor)]


def _arguments(ctx: Any, tensors: Sequence[Tensor]) -> list[Any]:
    """The op's arguments: the saved tensors back in their places."""
    args = list(ctx.others)
    for place, tensor in zip(ctx.places, tensors, strict=True):
        args[place] = tensor
    return args


def _gradients(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, ...]:
    """One for each argument of forward; only the input, the third, has one."""
    return None, None, gradient, *([None] * (len(ctx.others) - 1))


def _differentiable(ctx: Any, upstream: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    value = ctx.loss.reference(*_arguments(ctx, tensors))
    (gradient,) = torch.autograd.grad(value, tensors[0], upstream, create_graph=True)
    return gradient


def _refuse_second_derivative() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "inplace_backward=True leaves no logits for a second derivative: use inplace_backward=False with "
            "create_graph=True"
        )


def evaluate(loss: LossOps, inplace: bool, stored: bool, *args: Any) -> Tensor:
    """The loss, recorded for autograd where the input (the first of args) needs a gradient."""
    input = cast(Tensor, args[0])
    if not (input.requires_grad and torch.is_grad_enabled()):
        return loss.forward(*args)
    if inplace:
        _require_writable(input)
    if not stored:
        return cast(Tensor, _apply(Recomputed, loss, inplace, *args))
    result = _apply(Stored, loss, inplace, *args)
    return cast(Tensor, result if isinstance(result, Tensor) else result[0])


def _apply(function: type[Function], *args: Any) -> Any:
    # Function.apply first binds default arguments by inspect.signature, which takes longer than a small loss.
    return super(Function, function).apply(*args)  # type: ignore[misc]


def _is_view(tensor: Tensor) -> bool:
    return tensor._base is not None


def _require_writable(input: Tensor) -> None:
    """Lets torch's own in-place operation object, before anything is written."""
    base = input if input._base is None else input._base
    overlaps = any(stride == 0 and size > 1 for stride, size in zip(input.stride(), input.shape, strict=True))
    if overlaps or (base.is_leaf and base.requires_grad):
        input.mul_(1)
