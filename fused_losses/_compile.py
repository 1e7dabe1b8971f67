"""The autograd Functions of `_autograd`, as torch.compile can trace them.

No lists, no look at the upstream gradient, nothing in place: the product with the upstream gradient is left to the
compiler, which fuses it into what follows, and so is memory. Tensors and options are arguments of their own: what
was computed in the graph and goes inside a tuple is lost to it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ._ops import LossOps


class TracedStored(Function):
    @staticmethod
    def forward(name: str, tensors: int, *args: Any) -> Any:
        return _op(name + "_train")(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.constants = len(inputs) - 3
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor | None = None) -> Any:
        (gradient,) = ctx.saved_tensors
        return None, None, gradient * upstream, *[None] * ctx.constants


class TracedRecomputed(Function):
    @staticmethod
    def forward(name: str, tensors: int, *args: Any) -> Any:
        return _op(name)(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.name, tensors, *args = inputs
        ctx.save_for_backward(*args[:tensors])
        ctx.options = args[tensors:]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        args = *ctx.saved_tensors, *ctx.options
        gradient = _op(ctx.name + "_backward")(upstream, *args)
        return None, None, gradient, *[None] * (len(args) - 1)


def evaluate(loss: LossOps, stored: bool, input: Tensor, tensors: Any, options: Any) -> Any:
    # With dynamic=True a float is an input of the graph, and has to be used outside of a Function before it is
    # used inside one: dynamo makes it where it meets it first, and finds it there only.
    args = (input, *tensors, *(option * 1.0 if isinstance(option, float) else option for option in options))
    if loss.wide:
        args = (*args, True)
    if not (input.requires_grad and torch.is_grad_enabled()):
        return _op(loss.name)(*args)
    function: Any = TracedStored if stored else TracedRecomputed
    result = function.apply(loss.name, 1 + len(tensors), *args)
    return result[0] if stored else result


def _op(name: str) -> Any:
    return getattr(torch.ops.fused_losses, name).default
