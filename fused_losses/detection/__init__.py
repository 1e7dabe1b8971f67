"""What a detector's head needs from its loss: targets by index, and the losses of its classes and boxes."""

from __future__ import annotations

from .distribution_focal import DistributionFocalLoss, distribution_focal_loss
from .index_target import IndexTarget
from .levels import multi_level
from .pairwise import pairwise_bce_cost
from .quality_focal import QualityFocalLoss, quality_focal_loss
from .varifocal import VarifocalLoss, varifocal_loss

__all__ = [
    "DistributionFocalLoss",
    "IndexTarget",
    "QualityFocalLoss",
    "VarifocalLoss",
    "distribution_focal_loss",
    "multi_level",
    "pairwise_bce_cost",
    "quality_focal_loss",
    "varifocal_loss",
]
