from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class VarifocalLoss(nn.Module):
    """w bce in fp32, w = alpha s^gamma (1 - label) + q label; the mean over dimension 1, the sum over the rest."""

    def __init__(self, gamma: float = 2.0, alpha: float = 0.75) -> None:
        super().__init__()
        self.gamma = gamma
        self.alpha = alpha

    def forward(self, pred_score: Tensor, gt_score: Tensor, label: Tensor) -> Tensor:
        focus = self.alpha * pred_score.sigmoid() ** self.gamma
        weight = focus * (1 - label) + gt_score * label
        with torch.autocast("cpu", enabled=False):
            bce = F.binary_cross_entropy_with_logits(pred_score.float(), gt_score.float(), reduction="none")
            return (bce * weight).mean(1).sum()


class DFLoss(nn.Module):
    """(r - t) ce(l) + (t - l) ce(r), l = floor(t), r = l + 1, the mean over the last dimension, kept. Not a forward."""

    def __init__(self, reg_max: int = 16) -> None:
        super().__init__()
        self.reg_max = reg_max

    def __call__(self, pred_dist: Tensor, target: Tensor) -> Tensor:
        target = target.clamp_(0, self.reg_max - 1.01)
        log_p = pred_dist.log_softmax(1)
        left = target.long()
        to_right = target - left
        ce = [-log_p.gather(1, (left + side).view(-1, 1)).view(left.shape) for side in (0, 1)]
        return (ce[0] * (1 - to_right) + ce[1] * to_right).mean(-1, keepdim=True)


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
