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
        increment_version(args[0])
        return value

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _remember(ctx, inputs)
        if ctx.inplace:
            ctx.save_for_backward(inputs[2])
            return
        gradient = output[1]
        ctx.mark_non_differentiable(gradient)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(gradient, *ctx.tensors)
        del ctx.tensors

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, _: None = None) -> Any:
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
        if not _keep_graph():
            scale_(gradient, upstream)
        elif upstream != 1:
            gradient = gradient * upstream
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
    if inplace:
        return cast(Tensor, _apply(Stored, loss, inplace, *args))
    return cast(Tensor, _apply(Stored, loss, inplace, *args)[0])


def _apply(function: type[Function], *args: Any) -> Any:
    # Function.apply first binds default arguments by inspect.signature, which takes longer than a small loss.
    return super(Function, function).apply(*args)  # type: ignore[misc]


def _require_writable(input: Tensor) -> None:
    """Lets torch's own in-place operation object, before anything is written."""
    overlaps = any(stride == 0 and size > 1 for stride, size in zip(input.stride(), input.shape, strict=True))
    if input.is_leaf or overlaps:
        input.mul_(1)
