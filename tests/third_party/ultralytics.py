from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FocalLoss(nn.Module):
    """alpha_t (1 - p_t)^gamma bce, the mean over dimension 1, the sum over the rest; alpha is a tensor."""

    def __init__(self, gamma: float = 1.5, alpha: Any = 0.25) -> None:
        super().__init__()
        self.gamma = gamma
        self.alpha = torch.tensor(alpha)

    def forward(self, pred: Tensor, label: Tensor) -> Tensor:
        probability = pred.sigmoid()
        p_t = label * probability + (1 - label) * (1 - probability)
        loss = F.binary_cross_entropy_with_logits(pred, label, reduction="none") * (1 - p_t) ** self.gamma
        if (self.alpha > 0).any():
            self.alpha = self.alpha.to(pred.device, pred.dtype)
            loss = loss * (label * self.alpha + (1 - label) * (1 - self.alpha))
        return loss.mean(1).sum()
