"""torch's own functions, for what the kernels do not reach.

Copies of them, made at import: `patch_torch` exchanges the code of the originals, and a fallback that called
those would come back here.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import TypeVar, cast

import torch.nn.functional as torch_functional

F = TypeVar("F", bound=Callable[..., object])


def own_copy(function: F) -> F:
    """The function as it is now, whatever happens to the original's code. Its globals are the original's."""
    if not isinstance(function, FunctionType):
        return function
    copy = FunctionType(
        function.__code__,
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__annotations__ = function.__annotations__
    copy.__module__ = function.__module__
    copy.__doc__ = function.__doc__
    return cast(F, copy)


cross_entropy = own_copy(torch_functional.cross_entropy)
binary_cross_entropy = own_copy(torch_functional.binary_cross_entropy)
binary_cross_entropy_with_logits = own_copy(torch_functional.binary_cross_entropy_with_logits)
