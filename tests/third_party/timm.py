from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LabelSmoothingCrossEntropy(nn.Module):
    """(1 - e) nll + e mean_c(-log p_c), the mean over the rows."""

    def __init__(self, smoothing: float = 0.1) -> None:
        super().__init__()
        self.smoothing = smoothing
        self.confidence = 1.0 - smoothing

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        log_p = F.log_softmax(x, dim=-1)
        nll = -log_p.gather(dim=-1, index=target.unsqueeze(1)).squeeze(1)
        return (self.confidence * nll + self.smoothing * -log_p.mean(dim=-1)).mean()


class SoftTargetCrossEntropy(nn.Module):
    """-sum_c t_c log p_c, the mean over the rows."""

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return (-target * F.log_softmax(x, dim=-1)).sum(dim=-1).mean()


class BinaryCrossEntropy(nn.Module):
    """bce on dense targets, or on class indices that are smoothed: 1 - e + e / C and e / C."""

    def __init__(
        self,
        smoothing: float = 0.1,
        target_threshold: float | None = None,
        weight: Tensor | None = None,
        reduction: str = "mean",
        sum_classes: bool = False,
        pos_weight: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.smoothing = smoothing
        self.target_threshold = target_threshold
        self.reduction = "none" if sum_classes else reduction
        self.sum_classes = sum_classes
        self.register_buffer("weight", weight)
        self.register_buffer("pos_weight", pos_weight)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        assert x.shape[0] == target.shape[0]
        if target.shape != x.shape:
            off = self.smoothing / x.shape[-1]
            dense = torch.full((target.shape[0], x.shape[-1]), off, device=x.device, dtype=x.dtype)
            target = dense.scatter_(1, target.long().view(-1, 1), 1.0 - self.smoothing + off)
        if self.target_threshold is not None:
            target = target.gt(self.target_threshold).to(dtype=target.dtype)
        loss = F.binary_cross_entropy_with_logits(
            x, target, self.weight, pos_weight=self.pos_weight, reduction=self.reduction
        )
        return loss.sum(-1).mean() if self.sum_classes else loss
