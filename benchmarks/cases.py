"""What compare.py measures: the losses, their baselines, and the shapes people train at.

A case is written as people type it, `ce:N=4096,C=80,dtype=bf16,label_smoothing=0.1`; the suites are lists of
such lines, so everything passes through one parser.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fused_losses.functional as fused

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
OURS = ("fused", "in place")
BASELINES = ("eager", "compile", "torchvision")

SUITES: dict[str, list[str]] = {
    "tiny": [
        "ce:N=64,C=10",
        "bce_logits:N=64,C=10",
        "softmax_focal:N=64,C=10",
    ],
    "classification": [
        "ce:N=100000,C=10",
        "ce:N=4096,C=80",
        "ce:N=1500,C=1000",
        "ce:N=1500,C=1000,label_smoothing=0.1",
        "bce:N=4096,C=80",
    ],
    "segmentation": [
        "ce:N=2,C=19,H=256,W=512,ignore_index=255",
    ],
    "detection": [
        "bce_logits:N=8,A=8400,C=80",
        "bce_logits:N=8,A=8400,C=80,dtype=bf16",
        "bce_logits:N=8,A=8400,C=80,pos_weight=4",
        "focal:N=8,A=8400,C=80,gamma=2",
        "focal:N=8,A=8400,C=80,gamma=1.5",
        "softmax_focal:N=20000,C=81",
    ],
    "language": [
        "ce:N=200,C=50257",
        "ce:N=100,C=128256,dtype=bf16",
    ],
}


class CaseError(ValueError):
    """A --case that says something we do not understand."""


class Unavailable(Exception):
    """An implementation that is not installed or does not have this loss."""


def sigmoid_focal_loss(
    inputs: Tensor, targets: Tensor, alpha: float = 0.25, gamma: float = 2.0, reduction: str = "none"
) -> Tensor:
    """torchvision's formula in plain torch: what a program without a fused loss runs."""
    p = torch.sigmoid(inputs)
    ce = F.binary_cross_entropy_with_logits(inputs, targets, reduction="none")
    p_t = p * targets + (1 - p) * (1 - targets)
    loss = ce * (1 - p_t) ** gamma
    if alpha >= 0:
        loss = (alpha * targets + (1 - alpha) * (1 - targets)) * loss
    return {"none": lambda x: x, "mean": torch.mean, "sum": torch.sum}[reduction](loss)


def softmax_focal_loss(
    input: Tensor,
    target: Tensor,
    gamma: float = 2.0,
    alpha: float | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """The usual way in plain torch: cross entropy a row, then its weight."""
    ce = F.cross_entropy(input, target, reduction="none", ignore_index=ignore_index)
    loss = (1 - torch.exp(-ce)) ** gamma * ce
    if alpha is not None:
        loss = alpha * loss
    if reduction == "none":
        return loss
    total = loss.sum()
    return total if reduction == "sum" else total / (target != ignore_index).sum()


@dataclass(frozen=True)
class Loss:
    title: str
    eager: Callable[..., Tensor]
    fused: Callable[..., Tensor]
    dims: str  # dimensions in their order; all but N and C may be left out
    options: dict[str, type]
    index_target: bool
    in_place: bool = True


LOSSES = {
    "ce": Loss(
        "cross entropy",
        F.cross_entropy,
        fused.cross_entropy,
        dims="NCHW",
        options={"label_smoothing": float, "ignore_index": int, "weight": float, "reduction": str},
        index_target=True,
    ),
    "bce_logits": Loss(
        "BCE with logits",
        F.binary_cross_entropy_with_logits,
        fused.binary_cross_entropy_with_logits,
        dims="NAC",
        options={"weight": float, "pos_weight": float, "reduction": str},
        index_target=False,
    ),
    "bce": Loss(
        "BCE",
        F.binary_cross_entropy,
        fused.binary_cross_entropy,
        dims="NAC",
        options={"weight": float, "reduction": str},
        index_target=False,
        in_place=False,
    ),
    "focal": Loss(
        "sigmoid focal",
        sigmoid_focal_loss,
        fused.sigmoid_focal_loss,
        dims="NAC",
        options={"alpha": float, "gamma": float, "reduction": str},
        index_target=False,
    ),
    "softmax_focal": Loss(
        "softmax focal",
        softmax_focal_loss,
        fused.softmax_focal_loss,
        dims="NCHW",
        options={"alpha": float, "gamma": float, "ignore_index": int, "reduction": str},
        index_target=True,
    ),
}


@dataclass(frozen=True)
class Case:
    spec: str
    loss: Loss
    dims: dict[str, int]
    dtype: str
    options: dict[str, Any]

    @classmethod
    def parse(cls, spec: str, dtype: str | None = None) -> Case:
        """Reads `loss:KEY=VALUE,...`; `dtype` overrides the one in the line."""
        name, _, rest = spec.partition(":")
        if name not in LOSSES:
            raise CaseError(f"case {spec!r}: no loss {name!r}; there are {', '.join(LOSSES)}")
        loss = LOSSES[name]
        dims: dict[str, int] = {}
        options: dict[str, Any] = {}
        chosen = "fp32"
        for item in filter(None, rest.split(",")):
            key, _, text = item.partition("=")
            kind = int if key in loss.dims else loss.options.get(key, str)
            if key not in {*loss.dims, *loss.options, "dtype"}:
                known = ", ".join([*loss.dims, "dtype", *loss.options])
                raise CaseError(f"case {spec!r}: {name} has no {key!r}; it has {known}")
            try:
                value = kind(text)
            except ValueError:
                raise CaseError(f"case {spec!r}: {key} must be {kind.__name__}, not {text!r}") from None
            if key == "dtype":
                chosen = text
            elif key in loss.dims:
                dims[key] = int(value)
            else:
                options[key] = value
        if missing := {"N", "C"} - dims.keys():
            raise CaseError(
                f"case {spec!r}: {' and '.join(sorted(missing))} missing, as in {name}:N=4096,C=80"
            )
        if min(dims.values()) < 1:
            raise CaseError(f"case {spec!r}: every dimension must be at least 1, got {dims}")
        if chosen not in DTYPES:
            raise CaseError(f"case {spec!r}: dtype must be one of {', '.join(DTYPES)}, not {chosen!r}")
        if options.get("reduction", "mean") not in ("none", "mean", "sum"):
            raise CaseError(
                f"case {spec!r}: reduction must be none, mean or sum, not {options['reduction']!r}"
            )
        dims = {key: dims[key] for key in loss.dims if key in dims}
        dtype = dtype or chosen
        fields = dims | ({} if dtype == "fp32" else {"dtype": dtype}) | options
        canonical = f"{name}:" + ",".join(f"{key}={value}" for key, value in fields.items())
        return cls(canonical, loss, dims, dtype, options)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.dims.values())

    @property
    def label(self) -> str:
        options = [
            f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}"
            for key, value in self.options.items()
        ]
        return ", ".join([f"{self.loss.title} {' x '.join(map(str, self.shape))}", self.dtype, *options])

    @property
    def logits_bytes(self) -> int:
        return torch.Size(self.shape).numel() * DTYPES[self.dtype].itemsize

    @property
    def floor_bytes(self) -> int:
        """What forward and backward together cannot avoid: the logits in once, the gradient out once."""
        return 2 * self.logits_bytes

    def small(self) -> Case:
        """The same call on next to nothing, to load code without touching memory."""
        return Case(self.spec, self.loss, dict.fromkeys(self.dims, 2), self.dtype, self.options)

    def inputs(self, device: str) -> tuple[Tensor, Tensor]:
        """Logits (probabilities for BCE) and targets, the same on every call."""
        random = torch.Generator().manual_seed(0)
        if self.loss.index_target:
            logits = 2 * torch.randn(self.shape, generator=random)
            rows = self.shape[:1] + self.shape[2:]
            target = torch.randint(self.dims["C"], rows, generator=random)
            if "ignore_index" in self.options:
                target[torch.rand(rows, generator=random) < 0.05] = self.options["ignore_index"]
        else:
            # A detector after its warm-up: few positives, logits around the customary prior of one in a hundred.
            logits = 2 * torch.randn(self.shape, generator=random) - 4.6
            target = (torch.rand(self.shape, generator=random) < 0.01).float()
        if self.loss is LOSSES["bce"]:
            logits = torch.sigmoid(logits)
        dtype = DTYPES[self.dtype]
        target = target if self.loss.index_target else target.to(dtype)
        return logits.to(dtype).to(device), target.to(device)

    def arguments(self, dtype: torch.dtype, device: str) -> dict[str, Any]:
        """The options as keyword arguments; weights rise over the classes from 1 to the value given."""
        arguments = {"reduction": "mean", **self.options}
        for key in {"weight", "pos_weight"} & arguments.keys():
            arguments[key] = torch.linspace(1, arguments[key], self.dims["C"], dtype=dtype, device=device)
        return arguments


def implementation(case: Case, name: str) -> Callable[..., Tensor]:
    """The function called `name` that computes the loss of `case`."""
    loss = case.loss
    if name == "fused":
        return loss.fused
    if name == "in place":
        if not loss.in_place:
            raise Unavailable(f"{loss.title} has no inplace_backward")
        return partial(loss.fused, inplace_backward=True)
    if name == "eager":
        return loss.eager
    if name == "compile":
        # Left to itself it would generalise over the shapes of the cases before.
        torch.compiler.reset()
        return torch.compile(loss.eager, dynamic=False)
    if name == "torchvision":
        if loss is not LOSSES["focal"]:
            raise Unavailable(f"torchvision has no {loss.title}")
        try:
            from torchvision.ops import sigmoid_focal_loss as torchvision_focal
        except ImportError as error:
            raise Unavailable(str(error)) from None
        return torchvision_focal
    raise Unavailable(f"not a baseline compare.py knows; those are {', '.join(BASELINES)}")
