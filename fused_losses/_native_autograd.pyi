"""The compiled form of `Stored` and `Recomputed`, csrc/autograd/native_autograd.cpp."""

from typing import Any

from torch import Tensor

def register_loss(name: str, wide: bool) -> int: ...
def stored(
    loss: int, input: Tensor, tensors: tuple[Tensor | None, ...], options: tuple[Any, ...]
) -> Tensor: ...
def unrecorded(
    loss: int, input: Tensor, tensors: tuple[Tensor | None, ...], options: tuple[Any, ...]
) -> Tensor: ...
def recomputed(
    loss: int, input: Tensor, tensors: tuple[Tensor | None, ...], options: tuple[Any, ...]
) -> Tensor: ...
