"""Autocast: a float32 loss and a gradient in the logits' dtype, as torch's criteria; no float32 copy of the logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import CASES, IN_PLACE_CASES, Case
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fused_losses.functional as F

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
every_half = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def exact(case: Case, logits: Tensor, options: dict[str, Any], reduction: str) -> tuple[Tensor, Tensor]:
    """The loss and gradient of the same numbers in fp64."""
    wide = {
        name: option.double() if isinstance(option, Tensor) and option.is_floating_point() else option
        for name, option in options.items()
    }
    leaf = logits.double().requires_grad_()
    loss = case.theirs(leaf, **wide, reduction=reduction)
    loss.sum().backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


@every_case
@every_half
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("wide_others", [False, True], ids=["halves", "float32 targets and weights"])
def test_a_float32_loss(case: Case, dtype: torch.dtype, reduction: str, wide_others: bool) -> None:
    logits, options = case.make(dtype)
    if wide_others:
        options = {
            name: o.float() if isinstance(o, Tensor) and o.is_floating_point() else o
            for name, o in options.items()
        }
    leaf = logits.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = case.ours(leaf, **options, reduction=reduction)
    loss.sum().backward()
    value, gradient = exact(case, logits, options, reduction)
    assert loss.dtype == torch.float32
    assert leaf.grad is not None
    assert leaf.grad.dtype == dtype
    torch.testing.assert_close(loss.detach().double(), value, rtol=2e-6, atol=1e-6)
    tolerance = torch.finfo(dtype).eps
    torch.testing.assert_close(leaf.grad.double(), gradient, rtol=tolerance, atol=tolerance / 16)


@every_case
def test_second_derivatives(case: Case) -> None:
    logits, options = case.make(torch.bfloat16)
    results = []
    for loss_of in (case.ours, case.theirs):
        leaf = logits.clone().requires_grad_()
        with torch.autocast("cpu"):
            loss = loss_of(leaf, **options, reduction="mean")
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
        results.append(torch.autograd.grad(gradient.float().square().sum(), leaf)[0])
    torch.testing.assert_close(*results, rtol=0.05, atol=1e-3)


class Made(TorchDispatchMode):
    """The dtypes of what is made of the logits' shape, and our ops."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape, self.dtypes, self.ops = shape, set[torch.dtype](), set[str]()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        if op.namespace == "fused_losses":
            self.ops.add(op._schema.name)
        for tensor in result if isinstance(result, tuple) else (result,):
            if isinstance(tensor, Tensor) and tensor.shape == self.shape:
                self.dtypes.add(tensor.dtype)
        return result


@every_case
@every_half
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_no_copy_of_the_logits(case: Case, dtype: torch.dtype, reduction: str) -> None:
    logits, options = case.make(dtype)
    leaf = logits.requires_grad_()
    if isinstance(options.get("alpha"), Tensor):
        options["alpha"] = None
    with Made(logits.shape) as made:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = case.ours(leaf, **options, reduction=reduction)
        loss.backward()
    assert made.dtypes <= {dtype}
    assert made.ops


@every_case
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_autocast_switched_off_inside(case: Case, dtype: torch.dtype, reduction: str) -> None:
    logits, options = case.make(dtype)
    expected = case.ours(logits, **options, reduction=reduction)
    with torch.autocast("cpu"), torch.autocast("cpu", enabled=False):
        loss = case.ours(logits, **options, reduction=reduction)
    assert loss.dtype == dtype
    assert torch.equal(loss, expected)


@every_case
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_logits_stay_what_they_are(case: Case, dtype: torch.dtype, reduction: str) -> None:
    logits, options = case.make(dtype)
    with torch.autocast("cpu"):
        loss = case.ours(logits, **options, reduction=reduction)
        theirs = case.theirs(logits, **options, reduction=reduction)
    assert loss.dtype == theirs.dtype == dtype
    torch.testing.assert_close(loss, theirs)


@pytest.mark.parametrize("case", IN_PLACE_CASES, ids=lambda case: case.name)
def test_in_place(case: Case) -> None:
    data, options = case.make(torch.bfloat16)
    gradients = []
    for keyword in ({}, {"inplace_backward": True}):
        leaf = data.clone().requires_grad_()
        with torch.autocast("cpu"):
            loss = case.ours(leaf * 1.5, **options, reduction="mean", **keyword)
        gradients.append(torch.autograd.grad(loss, leaf)[0])
    assert torch.equal(*gradients)


def test_grad_scaler() -> None:
    """1 / (N V) is no number of fp16; the loss scale has to come in before the gradient is rounded."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(16, 9000)
    x, target = torch.randn(128, 16), torch.randint(9000, (128,))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    with torch.autocast("cpu", dtype=torch.float16):
        logits = layer(x)
        loss = F.cross_entropy(logits, target)
    logits.retain_grad()
    scaler.scale(loss).backward()
    assert logits.grad is not None
    unscaled = logits.grad.double() / 2**16
    reference = logits.detach().double().requires_grad_()
    torch.nn.functional.cross_entropy(reference, target).backward()
    assert reference.grad is not None
    assert reference.grad.abs().median() < 2**-20  # less than 16 steps of fp16
    torch.testing.assert_close(unscaled, reference.grad, rtol=1e-3, atol=2.0**-40)
    weights = layer.weight.detach().clone()
    scaler.step(optimizer)
    scaler.update()
    assert not torch.equal(layer.weight, weights)
    assert scaler.get_scale() == 2.0**16
