"""Loss functions with fused forward and backward kernels, in the places of torch.nn's."""

from __future__ import annotations

from . import detection, functional
from .bce import BCELoss, BCEWithLogitsLoss
from .cross_entropy import CrossEntropyLoss
from .detection import IndexTarget, QualityFocalLoss, VarifocalLoss
from .focal import FocalLoss, SigmoidFocalLoss, SoftmaxFocalLoss

__version__ = "0.1.0"
__all__ = [
    "BCELoss",
    "BCEWithLogitsLoss",
    "CrossEntropyLoss",
    "FocalLoss",
    "IndexTarget",
    "QualityFocalLoss",
    "SigmoidFocalLoss",
    "SoftmaxFocalLoss",
    "VarifocalLoss",
    "detection",
    "functional",
]
