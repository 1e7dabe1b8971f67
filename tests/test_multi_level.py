"""Several levels at once: fused_losses.detection.multi_level."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fused_losses
import fused_losses.functional as F
from fused_losses import IndexTarget
from fused_losses.detection import multi_level

BALANCE = [4.0, 1.0, 0.4]


class Launches(TorchDispatchMode):
    """Counts the operations that do something: on a GPU each is a launch or more."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not function.is_view and function is not torch.ops.aten.detach.default:
            self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def head() -> list[tuple[Tensor, Tensor]]:
    """Objectness of YOLOv5's three levels: stride-85 views of (B, 3, H, W, 85)."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(3)
    return [
        (
            torch.randn(2, 3, n, n, 85, generator=generator).requires_grad_(),
            torch.rand(2, 3, n, n, generator=generator),
        )
        for n in (12, 6, 3)
    ]


def test_yolov5_objectness() -> None:
    ours, theirs = head(), head()
    total, values = multi_level(
        fused_losses.BCEWithLogitsLoss(), [(x[..., 4], target) for x, target in ours], BALANCE
    )
    each = [torch.nn.BCEWithLogitsLoss()(x[..., 4], target) for x, target in theirs]
    expected = torch.zeros(())
    for value, factor in zip(each, BALANCE, strict=True):
        expected = expected + factor * value
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(values, torch.stack(each).detach())
    assert not values.requires_grad
    (total * 0.5).backward()
    (expected * 0.5).backward()
    for (x, _), (y, _) in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x.grad, y.grad)


def test_a_name_options_and_index_targets() -> None:
    """Decoder layers of a DETR: the same loss a dozen times, another divisor each."""
    torch.manual_seed(3)
    levels = [
        (
            torch.randn(2, 30, 8).requires_grad_(),
            IndexTarget(torch.randint(-1, 8, (2, 30)), torch.rand(2, 30)),
        )
        for _ in range(12)
    ]
    each = [{"avg_factor": torch.tensor(float(i))} for i in range(12)]
    total, values = multi_level("varifocal_loss", levels, each=each, detach_weight=True)
    expected = torch.stack(
        [F.varifocal_loss(*level, detach_weight=True, **o) for level, o in zip(levels, each, strict=True)]
    )
    torch.testing.assert_close(values, expected)
    torch.testing.assert_close(total, expected.sum())
    total.backward()
    for (logits, target), option in zip(levels, each, strict=True):
        other = logits.detach().clone().requires_grad_()
        F.varifocal_loss(other, target, detach_weight=True, **option).backward()
        torch.testing.assert_close(logits.grad, other.grad)


@pytest.mark.parametrize("balanced", [False, True])
def test_launches(balanced: bool) -> None:
    levels = [(torch.randn(9, 5).requires_grad_(), IndexTarget(torch.randint(5, (9,)))) for _ in range(12)]
    balance = [0.5 + i for i in range(12)] if balanced else None
    with Launches() as forward:
        total, _ = multi_level("sigmoid_focal_loss", levels, balance, reduction="mean")
    assert len(forward.names) == (12 + 1 + 12 if balanced else 12 + 1 + 1)
    assert sum("sigmoid_focal_anchors_train" in name for name in forward.names) == 12
    assert not [
        name for name in forward.names if "item" in name or "local_scalar" in name or "_to_copy" in name
    ]
    upstream = torch.tensor(3.0)
    with Launches() as backward:
        total.backward(upstream)
    assert len([name for name in backward.names if "scale_" in name]) == 12
    others = [name for name in backward.names if "scale_" not in name and "local_scalar" not in name]
    assert len(others) <= (12 if balanced else 1)


def test_a_balance_that_is_learned() -> None:
    levels = [(torch.randn(3, 4), torch.rand(3, 4)) for _ in range(3)]
    balance = torch.tensor([4.0, 1.0, 0.4], requires_grad=True)
    total, values = multi_level("quality_focal_loss", levels, balance)
    torch.testing.assert_close(total, balance @ values)
    (gradient,) = torch.autograd.grad(total, balance)
    torch.testing.assert_close(gradient, values)


def test_differentiates_twice() -> None:
    logits = [torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    targets = [torch.rand(3, 4, dtype=torch.float64) for _ in range(2)]

    def total(*leaves: Tensor) -> Tensor:
        return multi_level("quality_focal_loss", list(zip(leaves, targets, strict=True)), [0.3, 2.0])[0]

    assert torch.autograd.gradcheck(total, logits)
    assert torch.autograd.gradgradcheck(total, logits)


def test_errors() -> None:
    level = (torch.randn(3, 4), torch.rand(3, 4))
    for words, call in (
        ("levels is empty", lambda: multi_level("quality_focal_loss", [])),
        ("balance has 2 .* expected 1", lambda: multi_level("quality_focal_loss", [level], [1.0, 2.0])),
        ("each has 0 .* expected 1", lambda: multi_level("quality_focal_loss", [level], each=[])),
        (r"shape \(3, 4\)", lambda: multi_level("quality_focal_loss", [level], reduction="none")),
        ("quality_loss.*quality_focal_loss", lambda: multi_level("quality_loss", [level])),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(TypeError, match="a level is a tuple"):
        multi_level("quality_focal_loss", [level], return_probabilities=True)
