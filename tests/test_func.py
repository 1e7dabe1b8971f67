"""torch.func's transformations, forward mode and whole second derivatives: what torch's own function gives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import CASES, Case
from torch import Tensor
from torch.autograd import forward_ad

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
every_reduction = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])


def pair(case: Case, reduction: str) -> tuple[Tensor, list[Callable[[Tensor], Tensor]]]:
    """Logits, and our loss of them beside theirs."""
    logits, options = case.make(torch.float64)
    return logits, [lambda x, f=f: f(x, **options, reduction=reduction) for f in (case.ours, case.theirs)]


def assert_same(
    case: Case, reduction: str, of: Callable[[Callable[[Tensor], Tensor], Tensor], object]
) -> None:
    logits, functions = pair(case, reduction)
    torch.testing.assert_close(*(of(function, logits) for function in functions))


@every_case
@every_reduction
def test_grad(case: Case, reduction: str) -> None:
    assert_same(case, reduction, lambda f, x: torch.func.grad_and_value(lambda x: f(x).sum())(x))


@every_case
@every_reduction
def test_vmap(case: Case, reduction: str) -> None:
    batch = torch.linspace(0.5, 0.9, 3, dtype=torch.float64)
    assert_same(case, reduction, lambda f, x: torch.func.vmap(lambda scale: f(x * scale))(batch))
    assert_same(
        case, reduction, lambda f, x: torch.func.vmap(torch.func.grad(lambda s: f(x * s).sum()))(batch)
    )


@every_case
@every_reduction
def test_forward_mode(case: Case, reduction: str) -> None:
    def along(f: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.jvp(f, (x,), (torch.ones_like(x),))

    def dual(f: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        with forward_ad.dual_level():
            value, tangent = forward_ad.unpack_dual(f(forward_ad.make_dual(x, torch.ones_like(x))))
            return value, tangent

    assert_same(case, reduction, along)
    assert_same(case, reduction, dual)


@every_case
def test_hessian(case: Case) -> None:
    assert_same(case, "mean", lambda f, x: torch.func.hessian(f)(x))
    assert_same(case, "mean", lambda f, x: torch.autograd.functional.hessian(f, x))


@every_case
def test_jacobian_of_every_loss(case: Case) -> None:
    assert_same(case, "none", lambda f, x: torch.func.jacrev(f)(x))
    assert_same(case, "none", lambda f, x: torch.autograd.functional.jacobian(f, x, vectorize=True))


@every_case
@every_reduction
def test_batched_upstream_gradients(case: Case, reduction: str) -> None:
    """is_grads_batched runs backward itself under vmap."""
    logits, functions = pair(case, reduction)
    results = []
    for function in functions:
        leaf = logits.clone().requires_grad_()
        loss = function(leaf)
        torch.manual_seed(0)
        upstream = torch.randn(3, *loss.shape, dtype=loss.dtype)
        results.append(torch.autograd.grad(loss, leaf, upstream, is_grads_batched=True)[0])
    torch.testing.assert_close(*results)
