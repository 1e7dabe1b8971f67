"""The focal losses as people write them today: what ours replace, and what our error is held against."""

from __future__ import annotations

import torch
import torch.nn.functional as torch_functional
from torch import Tensor, nn


def sigmoid_focal_loss(
    inputs: Tensor, targets: Tensor, alpha: float = 0.25, gamma: float = 2.0, reduction: str = "none"
) -> Tensor:
    """torchvision's."""
    p = torch.sigmoid(inputs)
    ce = torch_functional.binary_cross_entropy_with_logits(inputs, targets, reduction="none")
    p_t = p * targets + (1 - p) * (1 - targets)
    loss = ce * (1 - p_t) ** gamma
    if alpha >= 0:
        loss = (alpha * targets + (1 - alpha) * (1 - targets)) * loss
    return loss if reduction == "none" else getattr(loss, reduction)()


def softmax_focal_loss(
    input: Tensor,
    target: Tensor,
    gamma: float = 2.0,
    alpha: float | Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """The usual few lines around torch's cross entropy."""
    ce = torch_functional.cross_entropy(input, target, ignore_index=ignore_index, reduction="none")
    loss = (1 - torch.exp(-ce)) ** gamma * ce
    if isinstance(alpha, Tensor):
        loss = alpha[target.long().where(target != ignore_index, 0)] * loss
    elif alpha is not None:
        loss = alpha * loss
    if reduction == "mean":
        return loss.sum() / (target != ignore_index).sum()
    return loss if reduction == "none" else getattr(loss, reduction)()


class FocalLoss(nn.Module):
    """YOLOv5's wrapper around nn.BCEWithLogitsLoss."""

    def __init__(self, loss_fcn: nn.BCEWithLogitsLoss, gamma: float = 1.5, alpha: float = 0.25) -> None:
        super().__init__()
        self.loss_fcn = loss_fcn
        self.gamma = gamma
        self.alpha = alpha
        self.reduction = loss_fcn.reduction
        self.loss_fcn.reduction = "none"

    def forward(self, pred: Tensor, true: Tensor) -> Tensor:
        loss = self.loss_fcn(pred, true)
        prob = torch.sigmoid(pred)
        p_t = true * prob + (1 - true) * (1 - prob)
        alpha_factor = true * self.alpha + (1 - true) * (1 - self.alpha)
        loss = loss * alpha_factor * (1.0 - p_t) ** self.gamma
        return loss if self.reduction == "none" else getattr(loss, self.reduction)()


def quality_focal_loss(
    input: Tensor, target: Tensor, beta: float = 2.0, weight: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    """mmdet's, for a dense target."""
    ce = torch_functional.binary_cross_entropy_with_logits(input, target, reduction="none")
    loss = (target - torch.sigmoid(input)).abs() ** beta * ce
    loss = loss if weight is None else loss * weight
    return loss if reduction == "none" else getattr(loss, reduction)()


def varifocal_loss(
    input: Tensor,
    target: Tensor,
    alpha: float = 0.75,
    gamma: float = 2.0,
    weight: Tensor | None = None,
    reduction: str = "mean",
    iou_weighted: bool = True,
    detach_weight: bool = False,
) -> Tensor:
    """mmdet's; with detach_weight RT-DETR's."""
    p = torch.sigmoid(input)
    if detach_weight:
        p = p.detach()
    positive = (target > 0).to(input.dtype)
    focal = (target if iou_weighted else 1) * positive + alpha * p**gamma * (1 - positive)
    loss = focal * torch_functional.binary_cross_entropy_with_logits(input, target, reduction="none")
    loss = loss if weight is None else loss * weight
    return loss if reduction == "none" else getattr(loss, reduction)()


def distribution_focal_loss(
    input: Tensor, target: Tensor, weight: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    """mmdet's and ultralytics's: two cross entropies on (N, bins)."""
    bins = input.shape[-1]
    left = target.long().clamp(max=max(bins - 2, 0))
    right = (left + 1).clamp(max=bins - 1)
    flat = input.reshape(-1, bins)
    ce_left, ce_right = (
        torch_functional.cross_entropy(flat, i.reshape(-1), reduction="none").view(target.shape)
        for i in (left, right)
    )
    loss = ce_left * (left + 1 - target) + ce_right * (target - left)
    loss = loss if weight is None else loss * weight
    return loss if reduction == "none" else getattr(loss, reduction)()
