"""What programs do with a loss: edit it in place, weigh it, add others to it, keep it. All as with torch's."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import CASES, IN_PLACE_CASES, Case
from torch import Tensor

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
every_reduction = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])


def times_two(loss: Tensor, other: Tensor) -> Tensor:
    loss *= 2
    return loss


def plus_another(loss: Tensor, other: Tensor) -> Tensor:
    loss += other
    return loss


def several(loss: Tensor, other: Tensor) -> Tensor:
    loss.mul_(0.3).add_(other, alpha=2)
    loss /= 4
    loss -= other**2
    return loss.clamp_(max=50)


def squared(loss: Tensor, other: Tensor) -> Tensor:
    loss *= loss.clone()
    return loss


def into_a_total(loss: Tensor, other: Tensor) -> Tensor:
    total = torch.zeros_like(loss)
    total += loss
    total *= 3
    return total


def into_a_slice(loss: Tensor, other: Tensor) -> Tensor:
    total = torch.zeros(3, *loss.shape, dtype=loss.dtype)
    total[1] = loss
    total[2] += 0.25 * loss
    return total


def masked(loss: Tensor, other: Tensor) -> Tensor:
    loss[loss > loss.mean()] = 0
    return loss


EDITS = [times_two, plus_another, several, squared, into_a_total, into_a_slice, masked]


def after(
    case: Case, function: Callable[..., Tensor], edit: Any, reduction: str, **more: Any
) -> tuple[Tensor, Tensor]:
    """The edited loss and the logits' gradient, for an upstream gradient that is not 1."""
    torch.manual_seed(3)
    logits, options = case.make(torch.float64)
    leaf = logits.clone().requires_grad_()
    scale = torch.rand((), dtype=torch.float64, requires_grad=True)
    loss = edit(function(leaf * 1, reduction=reduction, **options, **more), scale * leaf.detach().mean())
    upstream = torch.rand(loss.shape, dtype=loss.dtype) - 0.3
    loss.backward(upstream)
    return loss.detach(), leaf.grad


@every_case
@every_reduction
@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_in_place_edits(case: Case, reduction: str, edit: Any) -> None:
    torch.testing.assert_close(
        after(case, case.ours, edit, reduction), after(case, case.theirs, edit, reduction)
    )


@pytest.mark.parametrize("case", IN_PLACE_CASES, ids=lambda case: case.name)
@every_reduction
@pytest.mark.parametrize("edit", [times_two, plus_another, several], ids=lambda edit: edit.__name__)
def test_in_place_edits_of_a_loss_with_inplace_backward(case: Case, reduction: str, edit: Any) -> None:
    torch.testing.assert_close(
        after(case, case.ours, edit, reduction, inplace_backward=True),
        after(case, case.theirs, edit, reduction),
    )


@every_case
def test_the_value_can_be_kept(case: Case) -> None:
    """A logger that holds the loss does not see backward or the optimizer change it, nor does it change them."""
    logits, options = case.make(torch.float32)
    leaf = logits.clone().requires_grad_()
    loss = case.ours(leaf, **options).sum()
    kept, number = loss.detach(), loss.item()
    loss.backward()
    with torch.no_grad():
        leaf -= leaf.grad
    assert kept.item() == number


@every_case
def test_a_detached_value_edited_in_place(case: Case) -> None:
    logits, options = case.make(torch.float64)
    gradients = []
    for function in (case.ours, case.theirs):
        leaf = logits.clone().requires_grad_()
        loss = function(leaf, reduction="sum", **options)
        loss.detach().mul_(0)  # shares the loss's memory
        loss.backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


@every_case
@every_reduction
def test_an_out_of_graph_loss_is_a_plain_tensor(case: Case, reduction: str) -> None:
    logits, options = case.make(torch.float32)
    with torch.no_grad():
        loss = case.ours(logits.requires_grad_(), reduction=reduction, **options)
    loss *= 2
    assert not loss.requires_grad
    assert type(loss) is Tensor
    assert loss.is_leaf
    assert loss._base is None
    with torch.inference_mode():
        case.ours(logits.detach(), reduction=reduction, **options).mul_(2)


@every_case
@pytest.mark.parametrize("scale", [0.0, -1.5, 1e-3, 65536.0])
def test_upstream_gradients(case: Case, scale: float) -> None:
    logits, options = case.make(torch.float64)
    for reduction in ("mean", "sum"):
        gradients = []
        for function in (case.ours, case.theirs):
            leaf = logits.clone().requires_grad_()
            (scale * function(leaf, reduction=reduction, **options)).backward()
            gradients.append(leaf.grad)
        torch.testing.assert_close(*gradients)


@every_case
def test_two_losses_of_the_same_logits(case: Case) -> None:
    logits, options = case.make(torch.float64)
    gradients = []
    for function in (case.ours, case.theirs):
        leaf = logits.clone().requires_grad_()
        total = function(leaf, reduction="mean", **options)
        total += 0.1 * function(leaf, reduction="sum", **options)
        total += function(leaf, reduction="none", **options).amax()
        total.backward()
        total = 2 * function(leaf, reduction="mean", **options)  # a second step into the same .grad
        total.backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


@every_case
def test_no_warning(case: Case) -> None:
    logits, options = case.make(torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        case.ours(logits.requires_grad_(), **options).sum().backward()
