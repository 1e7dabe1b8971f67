"""Loss functions with fused forward and backward kernels, in the places of torch.nn's."""

from __future__ import annotations

from . import functional
from .adapters import register_adapter
from .bce import BCELoss, BCEWithLogitsLoss
from .cross_entropy import CrossEntropyLoss
from .focal import FocalLoss, SigmoidFocalLoss, SoftmaxFocalLoss
from .patch import patch_torch
from .replace import replace_criterion

__version__ = "0.1.0"
__all__ = [
    "BCELoss",
    "BCEWithLogitsLoss",
    "CrossEntropyLoss",
    "FocalLoss",
    "SigmoidFocalLoss",
    "SoftmaxFocalLoss",
    "functional",
    "patch_torch",
    "register_adapter",
    "replace_criterion",
]
