"""The functional forms, with the signatures of `torch.nn.functional` and torchvision."""

from .bce import binary_cross_entropy, binary_cross_entropy_with_logits
from .cross_entropy import cross_entropy
from .detection import distribution_focal_loss, quality_focal_loss, varifocal_loss
from .focal import sigmoid_focal_loss, softmax_focal_loss

__all__ = [
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "cross_entropy",
    "distribution_focal_loss",
    "quality_focal_loss",
    "sigmoid_focal_loss",
    "softmax_focal_loss",
    "varifocal_loss",
]
