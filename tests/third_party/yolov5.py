from __future__ import annotations

import torch
from torch import Tensor, nn


class _Wrapper(nn.Module):
    def __init__(self, loss_fcn: nn.Module, gamma: float = 1.5, alpha: float = 0.25) -> None:
        super().__init__()
        self.loss_fcn = loss_fcn
        self.gamma = gamma
        self.alpha = alpha
        self.reduction = loss_fcn.reduction
        self.loss_fcn.reduction = "none"

    def wrongness(self, probability: Tensor, true: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, pred: Tensor, true: Tensor) -> Tensor:
        loss = self.loss_fcn(pred, true)
        balance = self.alpha * true + (1 - self.alpha) * (1 - true)
        loss *= balance * self.wrongness(pred.sigmoid(), true) ** self.gamma  # in place, as there
        return getattr(loss, self.reduction)() if self.reduction in ("mean", "sum") else loss


class FocalLoss(_Wrapper):
    """alpha_t (1 - p_t)^gamma bce,  p_t = t s + (1 - t) (1 - s)"""

    def wrongness(self, probability: Tensor, true: Tensor) -> Tensor:
        return 1 - (true * probability + (1 - true) * (1 - probability))


class QFocalLoss(_Wrapper):
    """alpha_t |t - s|^gamma bce"""

    def wrongness(self, probability: Tensor, true: Tensor) -> Tensor:
        return torch.abs(true - probability)
