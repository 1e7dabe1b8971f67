"""Loads the compiled ops, and gathers each loss's five under its name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

try:
    from . import _C as _C
except ImportError as error:
    raise ImportError(
        f"fused_losses in {Path(__file__).parent} has no compiled part that this Python can load ({error}). Where "
        "this is the source and the package is installed, start Python in another folder; otherwise build it here: "
        "pip install --no-build-isolation --editable ."
    ) from error

_cuda = Path(__file__).with_name("_cuda.so")
CUDA = _cuda.exists() and torch.cuda.is_available()  # whether the ops take CUDA tensors
if CUDA:
    torch.ops.load_library(str(_cuda))  # type: ignore[no-untyped-call]


# Another release would not bear with it.
_is_native = (
    _C.torch_version() == torch.__version__ and find_spec("fused_losses._native_autograd") is not None
)
native_autograd = import_module("fused_losses._native_autograd") if _is_native else None


def load_op(name: str, overload: str = "default") -> Any:
    packet = getattr(torch.ops.fused_losses, name)
    return getattr(packet, overload).op  # without a Python frame of OpOverload


scale_: Callable[[Tensor, Tensor], None] = load_op("scale_")


@dataclass(frozen=True)
class LossOps:
    """The ops of one loss (csrc/torch/elementwise_ops.h says what each does) and its meaning in plain torch.

    All take the same arguments: input, target, the loss's weights, its options; the backward ones have the
    upstream gradient in front. `reference` takes them too.
    """

    name: str
    forward: Callable[..., Tensor]
    train: Callable[..., tuple[Tensor, Tensor]]
    train_: Callable[..., Tensor]
    backward: Callable[..., Tensor]
    backward_: Callable[..., None]
    reference: Callable[..., Tensor]
    wide: bool = False  # see `widened`
    number: int | None = None  # to the compiled autograd, where it serves these ops
    # forward, train and train_ that also write sigmoid(input) to `probability`, a keyword; a detector's head has them
    writing: tuple[Callable[..., Any], ...] = ()

    @cached_property
    def widened(self) -> LossOps:
        """The same with a float32 loss, as autocast has it, beside a gradient in the input's dtype, fp16 or bf16. A
        dense target may be float32, too."""

        def wide(op: Any) -> Any:
            return lambda *args, **keywords: op(*args, True, **keywords)

        widened = LossOps(
            self.name,
            wide(self.forward),
            wide(self.train),
            wide(self.train_),
            wide(self.backward),
            wide(self.backward_),
            lambda input, *rest: self.reference(input.float(), *rest),
            wide=True,
            writing=tuple(map(wide, self.writing)),
        )
        return widened if self.number is None else widened._registered()

    @staticmethod
    def of(name: str, reference: Callable[..., Tensor], *, writes_probability: bool = False) -> LossOps:
        register_fakes(name, writes_probability)

        def op(suffix: str) -> Any:
            return load_op(name + suffix)

        writing = [load_op(name + suffix, "probability") for suffix in FORWARD if writes_probability]
        forms = op(""), op("_train"), op("_train_"), op("_backward"), op("_backward_")
        loss = LossOps(name, *forms, reference, writing=tuple(writing))._registered()
        assert loss.widened  # now: a traced graph could read it, but not make it
        return loss

    def _registered(self) -> LossOps:
        if native_autograd is None:
            return self
        number = native_autograd.register_loss(self.name, self.wide)
        by_number[number] = dataclasses.replace(self, number=number)
        return by_number[number]


by_number: dict[int, LossOps] = {}
FORWARD = ("", "_train", "_train_")


def register_fakes(name: str, writes_probability: bool) -> None:
    """The shapes, strides and dtypes that the five ops return, for what traces a program without running it."""
    schema = getattr(torch.ops.fused_losses, name).default._schema
    names = [argument.name for argument in schema.arguments]
    reduction, wide = names.index("reduction"), names.index("wide")

    def value(input: Tensor, *rest: Any) -> Tensor:
        devices = {tensor.device for tensor in (input, *rest) if isinstance(tensor, Tensor)}
        if len(devices) > 1:
            raise RuntimeError(f"{name}: expected all tensors on one device, not on {devices}")
        arguments = (input, *rest)
        wider = any(arguments[wide : wide + 1]) and input.dtype in (torch.float16, torch.bfloat16)
        dtype = torch.float32 if wider else input.dtype
        if arguments[reduction] != 0:
            return input.new_empty((), dtype=dtype)
        target: Tensor = rest[0]
        if name in ("cross_entropy", "softmax_focal"):
            class_dim = min(1, input.dim() - 1)
            return input.new_empty((*input.shape[:class_dim], *input.shape[class_dim + 1 :]), dtype=dtype)
        if name == "distribution_focal":
            return input.new_empty(target.shape, dtype=dtype)
        dense = target.is_floating_point() and name != "bce"
        return torch.empty_like(target if dense else input, dtype=dtype)

    def gradient(upstream: Tensor, input: Tensor, *rest: Any) -> Tensor:
        return torch.empty_like(input)

    fakes: dict[str, Callable[..., Any]] = {
        "": value,
        "_train": lambda input, *rest: (value(input, *rest), torch.empty_like(input)),
        "_train_": value,
        "_backward": gradient,
        "_backward_": lambda upstream, input, *rest: None,
    }
    for suffix, fake in fakes.items():
        torch.library.register_fake(f"fused_losses::{name}{suffix}", fake)
    for suffix in FORWARD if writes_probability else ():

        def writing(*arguments: Any, probability: Tensor, fake: Callable[..., Any] = fakes[suffix]) -> Any:
            return fake(*arguments)

        torch.library.register_fake(f"fused_losses::{name}{suffix}.probability", writing)


torch.library.register_fake("fused_losses::scale_", lambda gradient, upstream: None)
