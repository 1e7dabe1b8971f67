"""Loss functions with fused forward and backward kernels, in the places of torch.nn's."""

from __future__ import annotations

from . import detection, functional
from ._memory import release_memory
from .adapters import register_adapter
from .bce import BCELoss, BCEWithLogitsLoss
from .cross_entropy import CrossEntropyLoss
from .detection import DistributionFocalLoss, IndexTarget, QualityFocalLoss, VarifocalLoss
from .focal import FocalLoss, SigmoidFocalLoss, SoftmaxFocalLoss
from .patch import patch_torch
from .replace import replace_criterion

__version__ = "0.1.0"
__all__ = [
    "BCELoss",
    "BCEWithLogitsLoss",
    "CrossEntropyLoss",
    "DistributionFocalLoss",
    "FocalLoss",
    "IndexTarget",
    "QualityFocalLoss",
    "SigmoidFocalLoss",
    "SoftmaxFocalLoss",
    "VarifocalLoss",
    "detection",
    "functional",
    "patch_torch",
    "register_adapter",
    "release_memory",
    "replace_criterion",
]
