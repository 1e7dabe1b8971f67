"""`patch_torch`: routes torch's own loss functions here, for programs that cannot change what they import."""

from __future__ import annotations

import inspect
import sys
import threading
import warnings
from collections.abc import Callable
from contextlib import ContextDecorator
from types import CodeType, FunctionType
from typing import Any

import torch.nn.functional as torch_functional
from torch import Tensor
from torch.overrides import has_torch_function

from . import _checks, _torch, functional

# How it works: the function object stays, its code is exchanged. So every name it was imported by, every partial
# and local that holds it leads here, and nothing else in torch pays for it. The new code is one of these, with
# the original's parameters; it runs with the original's globals and therefore imports the route it takes.
# fmt: off


def cross_entropy(input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing):  # type: ignore[no-untyped-def]
    import fused_losses.patch as fused
    return fused.routes["cross_entropy"](input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing)


def binary_cross_entropy_with_logits(input, target, weight, size_average, reduce, reduction, pos_weight):  # type: ignore[no-untyped-def]
    import fused_losses.patch as fused
    return fused.routes["binary_cross_entropy_with_logits"](input, target, weight, size_average, reduce, reduction, pos_weight)


def binary_cross_entropy(input, target, weight, size_average, reduce, reduction):  # type: ignore[no-untyped-def]
    import fused_losses.patch as fused
    return fused.routes["binary_cross_entropy"](input, target, weight, size_average, reduce, reduction)


def sigmoid_focal_loss(inputs, targets, alpha, gamma, reduction):  # type: ignore[no-untyped-def]
    import fused_losses.patch as fused
    return fused.routes["sigmoid_focal_loss"](inputs, targets, alpha, gamma, reduction)


# fmt: on
def _route(theirs: Callable[..., Tensor], ours: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def route(*args: Any) -> Tensor:
        # Subclasses and modes that override torch's function see torch's function.
        return (theirs if has_torch_function(args) else ours)(*args)

    return route


def _torchvision_route(theirs: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def route(inputs: Any, targets: Any, alpha: Any, gamma: Any, reduction: Any) -> Tensor:
        fits = (
            isinstance(inputs, Tensor)
            and isinstance(targets, Tensor)
            and not has_torch_function((inputs, targets))
            and reduction in _checks.REDUCTION_NAMES
            and isinstance(alpha, (int, float))
            and isinstance(gamma, (int, float))
            and (0 <= alpha <= 1 or alpha == -1)
            and gamma >= 0
            and _checks.reachable(inputs, targets)
            and _checks.fits(inputs, targets=targets)
        )
        return (functional.sigmoid_focal_loss if fits else theirs)(inputs, targets, alpha, gamma, reduction)

    return route


routes: dict[str, Callable[..., Tensor]] = {
    "cross_entropy": _route(_torch.cross_entropy, functional.cross_entropy),
    "binary_cross_entropy": _route(_torch.binary_cross_entropy, functional.binary_cross_entropy),
    "binary_cross_entropy_with_logits": _route(
        _torch.binary_cross_entropy_with_logits, functional.binary_cross_entropy_with_logits
    ),
}
_new_codes = {
    function.__name__: function.__code__
    for function in (
        cross_entropy,
        binary_cross_entropy_with_logits,
        binary_cross_entropy,
        sigmoid_focal_loss,
    )
}

_lock = threading.RLock()
_patches_in_force = 0
_exchanged: list[tuple[FunctionType, CodeType, CodeType]] = []  # function, its code, ours


class patch_torch(ContextDecorator):
    """Routes torch's loss functions to the fused ones, however a program holds them.

    ::

        with patch_torch():                 # for a block
            train()

        @patch_torch()                      # for every call of a function
        def train(): ...

        patch = patch_torch().enable()      # for good, or until
        patch.disable()

    It reaches `torch.nn.functional.cross_entropy`, `binary_cross_entropy_with_logits`, `binary_cross_entropy` and,
    where torchvision has been imported by then, its `sigmoid_focal_loss`: also where a module imported one by name
    or keeps it in a local or a partial, and in the criterion classes of `torch.nn`, which call them.

    While a patch is in force it is so for every thread of the process. Patches nest; when the last one ends, also
    by an exception, the functions are as they were. No other operation of torch is touched. A tensor subclass or a
    mode that overrides these functions (`__torch_function__`) still gets torch's own.
    """

    def __init__(self) -> None:
        self._enabled = False

    def enable(self) -> patch_torch:
        """Puts the patch in force until `disable`; once enabled, another call changes nothing."""
        with _lock:
            if not self._enabled:
                _enter()
            self._enabled = True
        return self

    def disable(self) -> None:
        """Ends what `enable` began; without that, it changes nothing."""
        with _lock:
            if self._enabled:
                _leave()
            self._enabled = False

    def __enter__(self) -> patch_torch:
        _enter()
        return self

    def __exit__(self, *exception: object) -> None:
        _leave()

    def __call__(self, function: Any) -> Any:
        if isinstance(function, type) or any(kind(function) for kind in _RUN_LATER):
            raise TypeError(
                f"patch_torch() is given {function!r} to decorate, and expects a function that runs when it is called: "
                "the patch would be over before this one's code runs. Write `with patch_torch():` inside it"
            )
        return super().__call__(function)


_RUN_LATER = inspect.isgeneratorfunction, inspect.iscoroutinefunction, inspect.isasyncgenfunction


def _enter() -> None:
    global _patches_in_force
    with _lock:
        if _patches_in_force == 0:
            try:
                _exchange_all()
            except BaseException:  # a warning that is an error: all or nothing
                _restore()
                raise
        _patches_in_force += 1


def _leave() -> None:
    global _patches_in_force
    with _lock:
        _patches_in_force -= 1
        if _patches_in_force == 0:
            _restore()


def _exchange_all() -> None:
    _exchange(torch_functional.cross_entropy)
    _exchange(torch_functional.binary_cross_entropy)
    _exchange(torch_functional.binary_cross_entropy_with_logits)
    vision = sys.modules.get("torchvision.ops.focal_loss")
    if vision is not None:
        routes["sigmoid_focal_loss"] = _torchvision_route(_torch.own_copy(vision.sigmoid_focal_loss))
        _exchange(vision.sigmoid_focal_loss)


def _restore() -> None:
    while _exchanged:
        function, original, ours = _exchanged.pop()
        if function.__code__ is ours:
            function.__code__ = original


def _exchange(function: Any) -> None:
    """Gives the function our code, under the original's place in its file: `inspect.getsource` and TorchScript,
    which compiles that source, see the original."""
    new = _new_codes.get(getattr(function, "__name__", ""))
    code = getattr(function, "__code__", None)
    if new is None or code is None or _parameters(code) != _parameters(new) or code.co_freevars:
        warnings.warn(
            f"patch_torch leaves {function!r} alone: it is not the function of torch that is known here. Has another "
            "library replaced it?",
            stacklevel=5,
        )
        return
    new = new.replace(co_filename=code.co_filename, co_firstlineno=code.co_firstlineno)
    _exchanged.append((function, code, new))
    function.__code__ = new


def _parameters(code: CodeType) -> tuple[str, ...]:
    return code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
