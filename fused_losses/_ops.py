"""Loads the compiled ops, and gathers each loss's five under its name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import _C as _C

_cuda = Path(__file__).with_name("_cuda.so")
CUDA = _cuda.exists() and torch.cuda.is_available()  # whether the ops take CUDA tensors
if CUDA:
    torch.ops.load_library(str(_cuda))  # type: ignore[no-untyped-call]


def load_op(name: str) -> Any:
    return getattr(torch.ops.fused_losses, name).default.op  # without a Python frame of OpOverload


scale_: Callable[[Tensor, Tensor], None] = load_op("scale_")


@dataclass(frozen=True)
class LossOps:
    """The ops of one loss (csrc/torch/elementwise_ops.h says what each does) and its meaning in plain torch.

    All take the same arguments: input, target, the loss's weights, its options; the backward ones have the
    upstream gradient in front. `reference` takes them too.
    """

    forward: Callable[..., Tensor]
    train: Callable[..., tuple[Tensor, Tensor]]
    train_: Callable[..., Tensor]
    backward: Callable[..., Tensor]
    backward_: Callable[..., None]
    reference: Callable[..., Tensor]

    @staticmethod
    def of(name: str, reference: Callable[..., Tensor]) -> LossOps:
        def op(suffix: str) -> Any:
            return load_op(name + suffix)

        return LossOps(op(""), op("_train"), op("_train_"), op("_backward"), op("_backward_"), reference)
