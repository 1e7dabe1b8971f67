"""What the losses ask of their arguments before a kernel sees them.

Two questions, apart: `reachable` says whether the kernels serve these tensors at all; if not, torch's own
function does. A check then names what is wrong with a call; torch's function decides whether that is an error
and of which type, the message is ours.

A small loss takes less time than these questions. So where a call is `plain` it goes to the op unasked: the ops
check all that they are given, too, and only if one objects are the questions asked, and answered in words.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.nn import _reduction as torch_reduction

from ._ops import CUDA, LossOps

NONE, MEAN, SUM = 0, 1, 2  # torch's numbering
REDUCTION_NAMES = ("none", "mean", "sum")
REDUCTION_CODES = {name: code for code, name in enumerate(REDUCTION_NAMES)}
DTYPES = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})
HALVES = frozenset({torch.bfloat16, torch.float16})
_TENSOR_TYPES = frozenset({Tensor, Parameter})
_MAX_DIMS = 12  # csrc/dtype.h
# What an op, or the way to it, has against a call. Others pass: checkpointing ends a recomputation by an exception.
OBJECTIONS = (RuntimeError, ValueError, TypeError, LookupError)
_logger = logging.getLogger("fused_losses")
_logged: set[str] = set()

_autocasting = torch._C._is_any_autocast_enabled
_saving_hooks = torch._C._autograd._top_saved_tensors_default_hooks
_transforming = torch._C._are_functorch_transforms_active
_compiling = torch.compiler.is_compiling
_dynamo_compiling = torch.compiler.is_dynamo_compiling  # it alone gets as far as asking with a plain Tensor
_tracing = torch._C._is_tracing


def _exporting() -> bool:
    return torch.compiler._is_exporting_flag  # is_exporting() is True in every graph that torch 2.11 compiles


def pass_on(error: Exception) -> None:
    """Raises an error that comes from a frame of somebody else's, a hook on saved tensors or a mode: only the op's own
    are looked into."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    where = traceback.tb_frame.f_globals.get("__name__", "") if traceback is not None else ""
    if not where.startswith((__package__, "torch._ops")):
        raise error


def reduction_name(size_average: bool | None, reduce: bool | None, reduction: str) -> str:
    if size_average is None and reduce is None:
        return reduction
    return torch_reduction.legacy_get_string(size_average, reduce)


def reduction_code(reduction: str) -> int:
    try:
        return REDUCTION_NAMES.index(reduction)
    except ValueError:
        raise ValueError(f"reduction is {reduction!r}; expected 'none', 'mean' or 'sum'") from None


def require_number(name: str, value: Any) -> None:
    if not _compiling() and not hasattr(value, "__float__"):
        raise TypeError(f"{name} is {value!r}; expected a number")


def require_exponent(name: str, value: float) -> None:
    require_number(name, value)
    if isinstance(value, Tensor) and value.requires_grad:
        raise TypeError(f"{name} requires a gradient, which it does not get; expected a number")
    if not value >= 0:
        raise ValueError(f"{name} is {value}; expected a number >= 0")


def require_tensors(function: str, **arguments: Any) -> None:
    for name, argument in arguments.items():
        if not isinstance(argument, Tensor) and not hasattr(type(argument), "__torch_function__"):
            raise TypeError(
                f"{function}(): {name} is {argument!r}; expected a Tensor, not {type(argument).__name__}"
            )


def autocast_ops(loss: LossOps, input: Tensor, target: Tensor, *weights: Tensor | None) -> LossOps | None:
    """The ops that can be asked straight away under autocast: for fp16 and bf16 those with a float32 loss; autocast
    has nothing to do for wider logits."""
    if not isinstance(input, Tensor) or _compiling():
        return None
    device = "cpu" if input.is_cpu else "cuda"
    if not (input.is_cpu or (CUDA and input.is_cuda)) or not torch.is_autocast_enabled(device):
        return None
    with torch.autocast(device, enabled=False):
        if input.dtype not in HALVES:
            return loss if plain(input, target, *weights) else None
        return loss.widened if plain(input, target) and _constant(*weights) else None


def autocast_form(loss: LossOps, input: Tensor) -> LossOps:
    """What autocast makes of `loss`: its ops with a float32 loss, for fp16 and bf16."""
    return loss.widened if input.dtype in HALVES else loss


def traced_ops(loss: LossOps, input: Tensor) -> LossOps:
    """`loss`, or its form under autocast in a graph that is traced there."""
    return autocast_form(loss, input) if _compiling() and autocasts(input) else loss


def autocasts(input: Tensor) -> bool:
    """Whether autocast is on for the input's device."""
    kind = input.device.type
    return kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind)


def _constant(*weights: Tensor | None) -> bool:
    return all(
        w is None or (type(w) in _TENSOR_TYPES and not w.requires_grad and w.dtype is not torch.float64)
        for w in weights
    )


def plain(
    input: Tensor, target: Tensor, weight: Tensor | None = None, pos_weight: Tensor | None = None
) -> bool:
    """Whether an op can be asked straight away: no transformation of the call is under way that an op would not
    see, and nothing beside the input wants a gradient."""
    return (
        type(input) in _TENSOR_TYPES
        and type(target) in _TENSOR_TYPES
        and not target.requires_grad
        and (weight is None or _plain_weight(weight, input))
        and (pos_weight is None or _plain_weight(pos_weight, input))
        and forward_ad._current_level < 0
        and not _transforming()
        and not _autocasting()
        and not _dynamo_compiling()
        and not _tracing()
    )


def saves_as_is() -> bool:
    """Whether what is saved for backward comes back as what it was. With hooks on saved tensors it may be anything of
    theirs: of other strides, in memory that is read-only or holds other things as well."""
    return _saving_hooks(False) is None


def _plain_weight(weight: Tensor, input: Tensor) -> bool:
    return type(weight) in _TENSOR_TYPES and not weight.requires_grad and weight.dtype == input.dtype


def reachable(input: Tensor, *others: Tensor | None, ops: LossOps | None = None) -> bool:
    """Whether a kernel exists for the input, and the other tensors are constants beside it."""
    if (
        type(input) not in _TENSOR_TYPES
        or not (input.is_cpu or (CUDA and input.is_cuda))
        or input.dtype not in DTYPES
        or input.layout is not torch.strided
        or input.dim() > _MAX_DIMS
        or (input.dtype in HALVES and not (ops is not None and ops.wide) and autocasts(input))
        or _exporting()
        or _transforming()
        or forward_ad._current_level >= 0
        or (not _compiling() and _tracing())
    ):
        return _unreachable(input, others)
    for other in others:
        if other is not None and (
            type(other) not in _TENSOR_TYPES
            or other.device != input.device
            or other.requires_grad
            or other.layout is not torch.strided
        ):
            return _unreachable(input, others)
    return True


def _unreachable(input: Tensor, others: Sequence[Tensor | None]) -> bool:
    if not torch.compiler.is_compiling() and _logger.isEnabledFor(logging.DEBUG):
        log_fall_back(_why_unreachable(input, others))
    return False


def _why_unreachable(input: Tensor, others: Sequence[Tensor | None]) -> str:
    """The cause, in the order of `reachable`'s questions."""
    if type(input) not in _TENSOR_TYPES:
        return f"input is a {type(input).__module__}.{type(input).__qualname__}, not a plain Tensor"
    if not (input.is_cpu or (CUDA and input.is_cuda)):
        return f"input is on device type {input.device.type!r}, which has no kernels here"
    if input.dtype not in DTYPES:
        return f"input has dtype {input.dtype}"
    if input.layout is not torch.strided:
        return f"input has layout {input.layout}"
    if input.dim() > _MAX_DIMS:
        return f"input has more than {_MAX_DIMS} dimensions"
    if input.dtype in HALVES and autocasts(input):
        return "autocast is enabled"
    if _exporting():
        return "torch.export is recording"
    if torch._C._are_functorch_transforms_active():
        return "a torch.func transform is active"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    if torch._C._is_tracing():
        return "torch.jit.trace is recording"
    for other in others:
        if other is None:
            continue
        if type(other) not in _TENSOR_TYPES:
            return f"target or weight is a {type(other).__module__}.{type(other).__qualname__}, not a plain Tensor"
        if other.device != input.device:
            return f"target or weight is on {other.device}, input on {input.device}"
        if other.requires_grad:
            return "target or weight requires a gradient"
        if other.layout is not torch.strided:
            return f"target or weight has layout {other.layout}"
    return "a cause not known here"


def log_fall_back(cause: str) -> None:
    """Says, once a cause, at level DEBUG of the logger "fused_losses", that a call did not reach the kernels."""
    if not torch.compiler.is_compiling() and _logger.isEnabledFor(logging.DEBUG) and cause not in _logged:
        _logged.add(cause)
        _logger.debug("not fused: %s", cause)


def autocast(input: Tensor) -> Tensor:
    """What autocast makes of the input of a loss that torch itself does not have: float32 for fp16 and bf16."""
    return input.float() if input.dtype in HALVES and torch.is_autocast_enabled(input.device.type) else input


def ask_torch(problem: str, function: Callable[..., Tensor], *args: Any) -> Tensor:
    """torch's result, where torch has no objection; its type of error with `problem` for a message, where it has."""
    try:
        result = function(*args)
    except Exception as error:
        raise type(error)(problem) from None
    log_fall_back(problem)
    return result


def fall_back(function: Callable[..., Tensor], args: tuple[Any, ...], input: Tensor, **others: Any) -> Tensor:
    """torch's result for what the kernels do not reach."""
    problem = None
    if input.dtype not in DTYPES:
        problem = f"input has dtype {input.dtype}; expected float32, float64, bfloat16 or float16"
    for name, other in others.items():
        if other is not None and not isinstance(other, Tensor):
            problem = f"{name} is {other!r}; expected a Tensor or None, not {type(other).__name__}"
    return function(*args) if problem is None else ask_torch(problem, function, *args)


def compute_weight(weight: Tensor | None, input: Tensor) -> Tensor | None:
    """A weight for each class, [C], as the kernels read it: contiguous, float32 beside float16 and bfloat16."""
    if weight is None:
        return None
    wide = torch.float64 if input.dtype is torch.float64 else torch.float32
    if weight.dtype is wide and weight.is_contiguous():
        return weight
    return weight.to(wide).contiguous()


def broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    lead = len(to) - len(shape)
    return lead >= 0 and all(
        size == wanted or size == 1 for size, wanted in zip(shape, to[lead:], strict=True)
    )


def shape_of(tensor: Tensor) -> str:
    return f"shape {tuple(tensor.shape)}"


def elementwise_problem(input: Tensor, **others: Tensor | None) -> str | None:
    """What keeps an element-wise kernel from this call, in words for the user. A target has the input's shape,
    the others broadcast to it."""
    for name, other in others.items():
        if other is None:
            continue
        if other.shape != input.shape:
            if name.startswith("target"):
                return f"{name} has {shape_of(other)}; expected the input's, {tuple(input.shape)}"
            if not broadcasts(other.shape, input.shape):
                return f"{name} has {shape_of(other)}, which does not broadcast to the input's, {tuple(input.shape)}"
        if other.dtype != input.dtype:
            return f"{name} has dtype {other.dtype}; expected the input's, {input.dtype}"
    return None


def fits(input: Tensor, **others: Tensor | None) -> bool:
    """Whether an element-wise kernel takes this call; if not, the log says why."""
    problem = elementwise_problem(input, **others)
    if problem is not None:
        log_fall_back(problem)
    return problem is None


def index_problem(input: Tensor, target: Tensor) -> str | None:
    """What is wrong with logits and class indices, in words for the user."""
    shape = tuple(input.shape)
    dims = len(shape)
    if dims == 0 or shape[1 if dims > 1 else 0] == 0:
        return f"input has shape {shape}; expected (C), (N, C) or (N, C, d1, ...) with C > 0"
    expected = shape[:1] + shape[2:] if dims > 1 else ()
    if target.shape != expected:
        return f"target has {shape_of(target)}; an input of shape {shape} takes class indices of shape {expected}"
    if target.dtype is not torch.int64 and target.dtype is not torch.uint8:
        return f"target has dtype {target.dtype}; class indices are torch.int64 or torch.uint8"
    return None
