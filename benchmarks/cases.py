"""What compare.py measures: the losses, the shapes people train at, and the inputs.

A case is written as people type it, `ce:N=4096,C=80,dtype=bf16,label_smoothing=0.1`; the suites are lists of
such lines, so everything passes through one parser.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import baselines as plain
import torch
import torch.nn.functional as F
from torch import Tensor

import fused_losses.functional as fused
from fused_losses import IndexTarget
from fused_losses.detection import pairwise_bce_cost

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}

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
        "ce:N=2,C=19,H=256,W=512,dtype=bf16,ignore_index=255",
        "ce:N=8,C=2,H=224,W=224",
    ],
    "detection": [
        "bce_logits:N=8,A=8400,C=80",
        "bce_logits:N=8,A=8400,C=80,dtype=bf16",
        "bce_logits:N=8,A=8400,C=80,pos_weight=4",
        "focal:N=8,A=8400,C=80,gamma=2",
        "focal:N=8,A=8400,C=80,gamma=1.5",
        "softmax_focal:N=20000,C=81",
        "bce_index:N=8,A=8400,C=80",
        "focal_index:N=8,A=8400,C=80",
        "focal_index:N=8,A=8400,C=80,dtype=bf16",
        "varifocal_index:N=8,A=8400,C=80",
        "dfl:N=20000,C=16",
        "pairwise:G=100,A=8400,C=80",
    ],
    "language": [
        "ce:N=200,C=50257",
        "ce:N=100,C=128256,dtype=bf16",
    ],
}

# A sweep takes a case through these sizes of one of its dimensions; --quick through every second.
SWEEPS: dict[str, tuple[str, list[int], str]] = {
    "classes": ("C", [10, 32, 100, 316, 1000, 3162, 10000, 31623, 100000, 262144], "ce:N=64,C=10"),
    "rows": ("N", [1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144], "ce:N=1,C=80"),
}


class CaseError(ValueError):
    """A --case that says something we do not understand."""


@dataclass(frozen=True)
class Loss:
    """A loss compare.py knows. Its functions are called with the inputs and the options, both as they are in torch."""

    title: str
    eager: Callable[..., Tensor]
    fused: Callable[..., Tensor]
    inputs: Callable[[Case, torch.Generator], tuple[Tensor, ...]]  # the logits first; fp32 on the CPU
    dims: str  # in their order; those in brackets may be left out
    options: dict[str, type]
    in_place: bool = True
    differentiable: bool = True  # else it is measured forward only, with what it returns whole
    logits_dims: str = ""  # those that make the logits' shape, if not all
    floor_bytes: Callable[[dict[str, int], int], int] | None = (
        None  # of sizes and itemsize, if not logits in, gradient out
    )


def index_target(case: Case, random: torch.Generator) -> tuple[Tensor, ...]:
    """A class a row."""
    logits = 2 * torch.randn(case.shape, generator=random)
    rows = case.shape[:1] + case.shape[2:]
    target = torch.randint(case.dims["C"], rows, generator=random)
    if "ignore_index" in case.options:
        target[torch.rand(rows, generator=random) < 0.05] = case.options["ignore_index"]
    return logits, target


def dense_target(case: Case, random: torch.Generator) -> tuple[Tensor, ...]:
    """The same targets as of anchors(), each a row with a number for every class."""
    logits, labels, _ = anchors(case, random)
    return logits, IndexTarget(labels).dense(case.shape[-1])[0]


def probabilities(case: Case, random: torch.Generator) -> tuple[Tensor, ...]:
    logits, target = dense_target(case, random)
    return torch.sigmoid(logits), target


def anchors(case: Case, random: torch.Generator) -> tuple[Tensor, ...]:
    """A detector after its warm-up: logits around the customary prior of one in a hundred, and as many anchors with an
    object. A class and a quality an anchor; the others' class is -1."""
    logits = 2 * torch.randn(case.shape, generator=random) - 4.6
    positive = torch.rand(case.shape[:-1], generator=random) < 0.01
    labels = torch.randint(case.dims["C"], case.shape[:-1], generator=random).where(positive, -1)
    return logits, labels, torch.rand(case.shape[:-1], generator=random) * positive


def distances(case: Case, random: torch.Generator) -> tuple[Tensor, ...]:
    """C bins a side, and a distance in them."""
    logits = 2 * torch.randn(case.shape, generator=random)
    return logits, torch.rand(case.shape[0], generator=random) * (case.dims["C"] - 1.01)


def bce_by_index(logits: Tensor, labels: Tensor, scores: Tensor, **options: Any) -> Tensor:
    target = IndexTarget(labels, scores)
    return fused.binary_cross_entropy_with_logits(logits, target, avg_factor=scores.sum(), **options)


def focal_by_index(
    logits: Tensor, labels: Tensor, scores: Tensor, alpha: float = 0.25, gamma: float = 2.0, **options: Any
) -> Tensor:
    divisor = (labels >= 0).sum()
    return fused.sigmoid_focal_loss(
        logits, IndexTarget(labels), alpha, gamma, "mean", avg_factor=divisor, **options
    )


def varifocal_by_index(logits: Tensor, labels: Tensor, scores: Tensor, **options: Any) -> Tensor:
    return fused.varifocal_loss(logits, IndexTarget(labels, scores), avg_factor=scores.sum(), **options)


def classes_of_ground_truths(case: Case, random: torch.Generator) -> tuple[Tensor, ...]:
    logits = 2 * torch.randn(case.shape, generator=random) - 4.6
    return logits, torch.randint(case.dims["C"], (case.dims["G"],), generator=random)


LOSSES = {
    "ce": Loss(
        "cross entropy",
        F.cross_entropy,
        fused.cross_entropy,
        index_target,
        dims="NC[HW]",
        options={"label_smoothing": float, "ignore_index": int, "weight": float, "reduction": str},
    ),
    "bce_logits": Loss(
        "BCE with logits",
        F.binary_cross_entropy_with_logits,
        fused.binary_cross_entropy_with_logits,
        dense_target,
        dims="N[A]C",
        options={"weight": float, "pos_weight": float, "reduction": str},
    ),
    "bce": Loss(
        "BCE",
        F.binary_cross_entropy,
        fused.binary_cross_entropy,
        probabilities,
        dims="N[A]C",
        options={"weight": float, "reduction": str},
        in_place=False,
    ),
    "focal": Loss(
        "sigmoid focal",
        plain.sigmoid_focal_loss,
        fused.sigmoid_focal_loss,
        dense_target,
        dims="N[A]C",
        options={"alpha": float, "gamma": float, "reduction": str},
    ),
    "softmax_focal": Loss(
        "softmax focal",
        plain.softmax_focal_loss,
        fused.softmax_focal_loss,
        index_target,
        dims="NC[HW]",
        options={"alpha": float, "gamma": float, "ignore_index": int, "reduction": str},
    ),
    "bce_index": Loss(
        "BCE with logits, index target",
        plain.bce_by_index,
        bce_by_index,
        anchors,
        dims="N[A]C",
        options={},
    ),
    "focal_index": Loss(
        "sigmoid focal, index target",
        plain.focal_by_index,
        focal_by_index,
        anchors,
        dims="N[A]C",
        options={"alpha": float, "gamma": float},
    ),
    "varifocal_index": Loss(
        "varifocal, index target",
        plain.varifocal_by_index,
        varifocal_by_index,
        anchors,
        dims="N[A]C",
        options={"alpha": float, "gamma": float},
    ),
    "dfl": Loss(
        "distribution focal",
        plain.distribution_focal_loss,
        fused.distribution_focal_loss,
        distances,
        dims="NC",
        options={},
    ),
    "pairwise": Loss(
        "pairwise BCE cost",
        plain.pairwise_bce_cost,
        pairwise_bce_cost,
        classes_of_ground_truths,
        dims="GAC",
        options={},
        in_place=False,
        differentiable=False,
        logits_dims="AC",
        floor_bytes=lambda n, itemsize: n["A"] * n["C"] * itemsize + n["G"] * n["A"] * max(4, itemsize),
    ),
}


@dataclass(frozen=True)
class Case:
    spec: str
    name: str
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
        known = re.sub(r"[\[\]]", "", loss.dims)
        required = re.sub(r"\[.*?\]", "", loss.dims)
        dims: dict[str, int] = {}
        options: dict[str, Any] = {}
        chosen = "fp32"
        for item in filter(None, rest.split(",")):
            key, _, text = item.strip().partition("=")
            if key not in {*known, *loss.options, "dtype"}:
                raise CaseError(
                    f"case {spec!r}: {name} has no {key!r}; it has {', '.join([*known, 'dtype', *loss.options])}"
                )
            kind = int if key in known else loss.options.get(key, str)
            try:
                value = kind(text)
            except ValueError:
                raise CaseError(f"case {spec!r}: {key} must be {kind.__name__}, not {text!r}") from None
            if key == "dtype":
                chosen = text
            elif key in known:
                dims[key] = int(value)
            else:
                options[key] = value
        if missing := [key for key in required if key not in dims]:
            example = ",".join(f"{key}=80" for key in required)
            raise CaseError(f"case {spec!r}: {' and '.join(missing)} missing, as in {name}:{example}")
        if min(dims.values()) < 1:
            raise CaseError(f"case {spec!r}: every dimension must be at least 1, got {dims}")
        if chosen not in DTYPES:
            raise CaseError(f"case {spec!r}: dtype must be one of {', '.join(DTYPES)}, not {chosen!r}")
        if options.get("reduction", "mean") not in ("none", "mean", "sum"):
            raise CaseError(
                f"case {spec!r}: reduction must be none, mean or sum, not {options['reduction']!r}"
            )
        return cls._canonical(
            name, {key: dims[key] for key in known if key in dims}, dtype or chosen, options
        )

    @classmethod
    def _canonical(cls, name: str, dims: dict[str, int], dtype: str, options: dict[str, Any]) -> Case:
        fields = dims | ({} if dtype == "fp32" else {"dtype": dtype}) | options
        spec = f"{name}:" + ",".join(f"{key}={value}" for key, value in fields.items())
        return cls(spec, name, dims, dtype, options)

    def sized(self, **dims: int) -> Case:
        """The same case with other sizes."""
        return self._canonical(self.name, self.dims | dims, self.dtype, self.options)

    def small(self) -> Case:
        """The same call on next to nothing, to load code without touching memory."""
        return self.sized(**dict.fromkeys(self.dims, 2))

    @property
    def loss(self) -> Loss:
        return LOSSES[self.name]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the logits."""
        return tuple(self.dims[key] for key in self.loss.logits_dims or self.dims)

    @property
    def label(self) -> str:
        options = [
            f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}"
            for key, value in self.options.items()
        ]
        sizes = " x ".join(map(str, self.dims.values()))
        return ", ".join([f"{self.loss.title} {sizes}", self.dtype, *options])

    @property
    def logits_bytes(self) -> int:
        return torch.Size(self.shape).numel() * DTYPES[self.dtype].itemsize

    @property
    def floor_bytes(self) -> int:
        """What forward and backward together cannot avoid: the logits in once, the gradient out once."""
        if self.loss.floor_bytes:
            return self.loss.floor_bytes(self.dims, DTYPES[self.dtype].itemsize)
        return 2 * self.logits_bytes

    def inputs(self, device: str) -> tuple[Tensor, ...]:
        """Logits (probabilities for BCE) and what goes with them, the same on every call."""
        made = self.loss.inputs(self, torch.Generator().manual_seed(0))
        dtype = DTYPES[self.dtype]
        return tuple(x.to(device, dtype if x.is_floating_point() else x.dtype) for x in made)

    def arguments(self, dtype: torch.dtype, device: str) -> dict[str, Any]:
        """The options as keyword arguments; weights rise over the classes from 1 to the value given."""
        arguments = dict(self.options)
        if "reduction" in self.loss.options:
            arguments = {"reduction": "mean"} | arguments
        for key in {"weight", "pos_weight"} & arguments.keys():
            arguments[key] = torch.linspace(1, arguments[key], self.dims["C"], dtype=dtype, device=device)
        return arguments
