"""The autograd Functions every loss shares.

`Stored` makes the gradient in the forward pass, while the logits are in the cache; backward only applies the
upstream gradient. `Recomputed` makes it in backward, from the logits: for "none", whose upstream gradient is a
tensor, and for fp16, where a loss scale must come in before the gradient is rounded. Both differentiate twice,
by `reference`. Both have a compiled form, csrc/autograd/native_autograd.cpp, which takes their place beside the
PyTorch it was compiled with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.graph import increment_version

from . import _compile
from ._checks import saves_as_is
from ._ops import LossOps, by_number, native_autograd, scale_

Tensors = tuple[Tensor | None, ...]
Options = tuple[Any, ...]

_recording = torch.is_grad_enabled
_keep_graph = torch._C._autograd._get_current_graph_task_keep_graph
_dispatch_modes = torch._C._len_torch_dispatch_stack


class Stored(Function):
    @staticmethod
    def forward(
        loss: LossOps, input: Tensor, tensors: Tensors, options: Options, made: list[Tensor]
    ) -> Tensor:
        # The gradient leaves by a list: as a second output, autograd would wrap it twice.
        value, gradient = loss.train(input, *tensors, *options)
        made.append(gradient)
        return value

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.loss, input, tensors, ctx.options, made = inputs
        ctx.own = saves_as_is()
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(made.pop(), input, *tensors)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None) -> Any:
        if upstream is None:  # the loss was no part of what was differentiated: no gradient, not one of zeros
            return None, None, None, None, None
        gradient, *args = ctx.saved_tensors
        if _recording():
            gradient = _differentiable(ctx.loss, upstream, args, ctx.options)
        elif ctx.own and not _keep_graph():  # else it serves again, or is somebody else's
            gradient = _scale(gradient, upstream)
        else:
            gradient = gradient * upstream
        return None, gradient, None, None, None


class Overwritten(Function):
    """`Stored`, with the gradient where the logits were."""

    @staticmethod
    def forward(loss: LossOps, input: Tensor, tensors: Tensors, options: Options) -> Any:
        value = loss.train_(input, *tensors, *options)
        return (value, input) if _can_be_marked(input) else value

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        # Marked dirty, the logits carry this node from now on: who uses them later gets an error, not the
        # gradient's numbers. Where torch does not allow that, users are caught by the version counter, as far as
        # they keep the logits for their own backward.
        input = inputs[1]
        if _can_be_marked(input):
            ctx.mark_dirty(input)
        else:
            increment_version(input)
        ctx.own = saves_as_is()
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, of_logits: Tensor | None = None) -> Any:
        if of_logits is not None:
            raise RuntimeError(
                "the logits were used after a loss with inplace_backward=True, which has modified them by an "
                "inplace operation: they hold its gradient. Use them before the loss, or inplace_backward=False"
            )
        if upstream is None:
            return None, None, None, None
        _refuse_second_derivative()
        gradient = ctx.saved_tensors[0].detach()
        if not ctx.own:
            return None, gradient * upstream, None, None
        gradient = _scale(gradient, upstream)
        increment_version(gradient)
        return None, gradient, None, None


class Recomputed(Function):
    @staticmethod
    def forward(loss: LossOps, inplace: bool, input: Tensor, tensors: Tensors, options: Options) -> Tensor:
        return loss.forward(input, *tensors, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.loss, inplace, input, tensors, ctx.options = inputs
        ctx.inplace = inplace and saves_as_is()
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, *tensors)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None) -> Any:
        if upstream is None:
            return None, None, None, None, None
        args = ctx.saved_tensors
        if ctx.inplace:
            _refuse_second_derivative()
            gradient = args[0].detach()
            ctx.loss.backward_(upstream, *args, *ctx.options)
            increment_version(gradient)
        elif _recording():
            gradient = _differentiable(ctx.loss, upstream, args, ctx.options)
        else:
            gradient = ctx.loss.backward(upstream, *args, *ctx.options)
        return None, None, gradient, None, None


def _is_several(upstream: Tensor) -> bool:
    """Whether it stands for more than one number: in vmap over a backward pass, in `is_grads_batched`, which has a
    vmap of its own, or as a subclass that calls each op once for every tensor in it."""
    functorch = torch._C._functorch
    return (
        type(upstream) is not Tensor
        or functorch.is_batchedtensor(upstream)
        or functorch.is_legacy_batchedtensor(upstream)
    )


def _scale(gradient: Tensor, upstream: Tensor) -> Tensor:
    """gradient * upstream, in the gradient's memory where that is possible."""
    if _is_several(upstream):
        return gradient * upstream
    # A number in the host's memory is read at once; on a GPU only the kernel may look at it, and in a trace nobody.
    if not upstream.is_cpu or _dispatch_modes() or upstream.item() != 1:
        scale_(gradient, upstream)
    return gradient


def _differentiable(
    loss: LossOps, upstream: Tensor, args: Sequence[Tensor], options: Sequence[Any]
) -> Tensor:
    # By an alias: hooks on the logits themselves are called for the gradient that leaves this node, and only then.
    input = args[0].view_as(args[0])
    value = loss.reference(input, *args[1:], *options)
    (gradient,) = torch.autograd.grad(value, input, upstream, create_graph=True)
    return gradient


def differentiable_by_number(upstream: Tensor, args: Sequence[Tensor], numbered: Sequence[Any]) -> Tensor:
    """For the compiled form, which keeps a loss's number in front of its options."""
    number, *options = numbered
    return _differentiable(by_number[number], upstream, args, options)


def _refuse_second_derivative() -> None:
    if _recording():
        raise RuntimeError(
            "inplace_backward=True leaves no logits for a second derivative: use inplace_backward=False with "
            "create_graph=True"
        )


def evaluate(
    loss: LossOps, inplace: bool, stored: bool, input: Tensor, tensors: Tensors, options: Options
) -> Tensor:
    """The loss of (input, *tensors, *options), recorded for autograd where the input needs a gradient.

    `tensors` are constants: the target and the weights, None where absent.
    """
    if torch.compiler.is_compiling():
        traced: Tensor = _compile.evaluate(loss, stored, input, tensors, options)
        return traced
    return evaluate_eagerly(loss, inplace, stored, input, tensors, options)


def evaluate_eagerly(
    loss: LossOps, inplace: bool, stored: bool, input: Tensor, tensors: Tensors, options: Options
) -> Tensor:
    """`evaluate`, for a call that is `plain` (_checks.py)."""
    recorded = input.requires_grad and _recording()
    inplace = recorded and inplace and _is_overwritable(input, tensors)
    result: Any
    if native_autograd is not None and loss.number is not None and not inplace:
        recording = native_autograd.stored if stored else native_autograd.recomputed
        compiled = recording if recorded else native_autograd.unrecorded
        result = compiled(loss.number, input, tensors, options)
    elif not recorded:
        result = loss.forward(input, *tensors, *options)
    elif not stored:
        result = _recomputed(loss, inplace, input, tensors, options)
    elif inplace:
        result = _overwritten(loss, input, tensors, options)
    else:
        result = _stored(loss, input, tensors, options, [])
    value: Tensor = result[0] if type(result) is tuple else result
    return value


def _applier(function: Any) -> Callable[..., Any]:
    """`function.apply`, without what takes torch longer than a small loss."""
    # The node of a Function looks for boxed gradients and for a `vjp` before it calls backward: neither is here.
    node = getattr(function, "_backward_cls", None)  # private to torch: without it, it takes a little longer
    if node is not None:
        node.apply = function.backward
    # Function.apply binds default arguments by inspect.signature.
    apply: Callable[..., Any] = super(Function, function).apply
    return apply


_stored, _overwritten, _recomputed = _applier(Stored), _applier(Overwritten), _applier(Recomputed)


def _can_be_marked(input: Tensor) -> bool:
    """Whether torch lets a Function with another output say that it has overwritten it: no view, nor a tensor whose
    gradient is retained."""
    return input._base is None and not input.retains_grad


def _is_overwritable(input: Tensor, tensors: Tensors) -> bool:
    """Whether the input's memory is its own. Where it may not be written to, torch's own in-place operation objects,
    before anything is."""
    base = input if input._base is None else input._base
    overlaps = any(stride == 0 and size > 1 for stride, size in zip(input.stride(), input.shape, strict=True))
    if overlaps or (base.is_leaf and base.requires_grad):
        input.mul_(1)
    memory = input.untyped_storage().data_ptr()
    shared = any(tensor is not None and tensor.untyped_storage().data_ptr() == memory for tensor in tensors)
    return not shared and not input.is_neg()  # an op gets a copy of what is only marked as negated
