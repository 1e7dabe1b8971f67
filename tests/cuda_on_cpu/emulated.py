"""Runs the package on the CUDA kernels' source, on CPU tensors: `with emulated(library): F.cross_entropy(...)`."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fused_losses import _autograd
from fused_losses._ops import FORWARD, LossOps
from fused_losses.detection import pairwise

_PLACES = [
    ("fused_losses.cross_entropy", "_OPS", "cross_entropy"),
    ("fused_losses.bce", "_WITH_LOGITS", "bce_with_logits"),
    ("fused_losses.bce", "_OPS", "bce"),
    ("fused_losses.focal", "_SIGMOID", "sigmoid_focal"),
    ("fused_losses.focal", "_SOFTMAX", "softmax_focal"),
    ("fused_losses.bce", "_ANCHORS", "bce_with_logits_anchors"),
    ("fused_losses.focal", "_ANCHORS", "sigmoid_focal_anchors"),
    ("fused_losses.detection.quality_focal", "_ANCHORS", "quality_focal_anchors"),
    ("fused_losses.detection.varifocal", "_ANCHORS", "varifocal_anchors"),
    ("fused_losses.detection.distribution_focal", "_OPS", "distribution_focal"),
]


@contextmanager
def emulated(library: Path) -> Iterator[None]:
    torch.ops.load_library(str(library))
    ops = torch.ops.fused_losses_simt
    before = []
    for module_name, attribute, name in _PLACES:
        module = sys.modules[module_name]
        ours: LossOps = getattr(module, attribute)
        before.append((module, attribute, ours))
        forms: dict[str, Any] = {
            "forward": getattr(ops, name).default,
            "train": getattr(ops, name + "_train").default,
            "train_": getattr(ops, name + "_train_").default,
            "backward": getattr(ops, name + "_backward").default,
            "backward_": getattr(ops, name + "_backward_").default,
            "writing": tuple(getattr(ops, name + form).probability for form in FORWARD if ours.writing),
        }
        setattr(module, attribute, dataclasses.replace(ours, **forms, number=None))
    for module, attribute, name in (
        (_autograd, "scale_", "scale_"),
        (pairwise, "_cost", "pairwise_bce_cost"),
    ):
        before.append((module, attribute, getattr(module, attribute)))
        setattr(module, attribute, getattr(ops, name).default)
    try:
        yield
    finally:
        for module, attribute, value in before:
            setattr(module, attribute, value)
