"""Every loss once, for the tests that ask the same thing of all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import plain
import torch
import torch.nn.functional as torch_functional
from torch import Tensor

import fused_losses.functional as F


@dataclass(frozen=True)
class Case:
    """`ours(logits, **options)`, the plain torch it replaces, and `make(dtype)` for logits and options."""

    name: str
    ours: Callable[..., Tensor]
    theirs: Callable[..., Tensor]
    make: Callable[[torch.dtype], tuple[Tensor, dict[str, Any]]]
    in_place: bool = True  # it has inplace_backward


def autocast(dtype: torch.dtype = torch.bfloat16, *, enabled: bool = True) -> torch.autocast:
    """On the device the tests run on."""
    return torch.autocast(torch.get_default_device().type, dtype, enabled=enabled)


def _soft(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.rand(shape, dtype=torch.float64).to(dtype)


def _logits(*shape: int, dtype: torch.dtype) -> Tensor:
    return (torch.randn(shape, dtype=torch.float64) * 2).to(dtype)


def _index(dtype: torch.dtype) -> tuple[Tensor, dict[str, Any]]:
    return _logits(6, 5, dtype=dtype), {"target": torch.tensor([0, 4, 2, 1, 3, 3])}


def _index_options(dtype: torch.dtype) -> tuple[Tensor, dict[str, Any]]:
    options = {"weight": _soft(5, dtype=dtype), "label_smoothing": 0.1, "ignore_index": 2}
    return _logits(6, 5, dtype=dtype), {"target": torch.tensor([0, 4, 2, 1, 2, 3]), **options}


def _images(dtype: torch.dtype) -> tuple[Tensor, dict[str, Any]]:
    return _logits(2, 5, 3, 2, dtype=dtype), {"target": torch.randint(5, (2, 3, 2))}


def _probabilities(dtype: torch.dtype) -> tuple[Tensor, dict[str, Any]]:
    options = {"weight": _soft(5, dtype=dtype), "label_smoothing": 0.1}
    return _logits(6, 5, dtype=dtype), {"target": _soft(6, 5, dtype=dtype).softmax(1), **options}


def _with_logits(dtype: torch.dtype) -> tuple[Tensor, dict[str, Any]]:
    return _logits(6, 5, dtype=dtype), {"target": _soft(6, 5, dtype=dtype)}


def _with_logits_weighted(dtype: torch.dtype) -> tuple[Tensor, dict[str, Any]]:
    options = {"weight": _soft(6, 1, dtype=dtype), "pos_weight": 3 * _soft(5, dtype=dtype)}
    return _logits(6, 5, dtype=dtype), {"target": _soft(6, 5, dtype=dtype).round(), **options}


def _bce(dtype: torch.dtype) -> tuple[Tensor, dict[str, Any]]:
    probabilities = 0.05 + 0.9 * _soft(6, 5, dtype=dtype)
    return probabilities, {"target": _soft(6, 5, dtype=dtype), "weight": _soft(5, dtype=dtype)}


def _focal_hard(dtype: torch.dtype) -> tuple[Tensor, dict[str, Any]]:
    return _logits(6, 5, dtype=dtype), {"targets": _soft(6, 5, dtype=dtype).round()}


def _focal_soft(dtype: torch.dtype) -> tuple[Tensor, dict[str, Any]]:
    return _logits(6, 5, dtype=dtype), {"targets": _soft(6, 5, dtype=dtype), "alpha": -1, "gamma": 1.5}


def _softmax_focal(dtype: torch.dtype) -> tuple[Tensor, dict[str, Any]]:
    options = {"alpha": _soft(5, dtype=dtype), "gamma": 1.5, "ignore_index": 2}
    return _logits(6, 5, dtype=dtype), {"target": torch.tensor([0, 4, 2, 1, 2, 3]), **options}


CASES = [
    Case("cross_entropy", F.cross_entropy, torch_functional.cross_entropy, _index),
    Case("cross_entropy_options", F.cross_entropy, torch_functional.cross_entropy, _index_options),
    Case("cross_entropy_images", F.cross_entropy, torch_functional.cross_entropy, _images),
    Case("cross_entropy_probabilities", F.cross_entropy, torch_functional.cross_entropy, _probabilities),
    Case(
        "bce_with_logits",
        F.binary_cross_entropy_with_logits,
        torch_functional.binary_cross_entropy_with_logits,
        _with_logits,
    ),
    Case(
        "bce_with_logits_weighted",
        F.binary_cross_entropy_with_logits,
        torch_functional.binary_cross_entropy_with_logits,
        _with_logits_weighted,
    ),
    Case("bce", F.binary_cross_entropy, torch_functional.binary_cross_entropy, _bce, in_place=False),
    Case("sigmoid_focal_hard", F.sigmoid_focal_loss, plain.sigmoid_focal_loss, _focal_hard),
    Case("sigmoid_focal_soft", F.sigmoid_focal_loss, plain.sigmoid_focal_loss, _focal_soft),
    Case("softmax_focal", F.softmax_focal_loss, plain.softmax_focal_loss, _softmax_focal),
]
IN_PLACE_CASES = [case for case in CASES if case.in_place]
