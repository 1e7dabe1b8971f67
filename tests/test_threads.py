"""The same bits from any number of threads, from two runs, and from callers at once."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from accuracy import REDUCTIONS
from cases import CASES, Case
from torch import Tensor

import fused_losses.functional as F

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def large(name: str, dtype: torch.dtype) -> tuple[Any, Tensor, dict[str, Any]]:
    """Enough work for every thread to get some."""
    generator = torch.Generator().manual_seed(5)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator).to(dtype)

    def index(*shape: int) -> Tensor:
        return torch.randint(37, shape, generator=generator)

    dense = 6 * uniform(3001, 37) - 3
    return {
        "cross_entropy": (F.cross_entropy, dense, {"target": index(3001), "weight": uniform(37)}),
        "cross_entropy images": (
            F.cross_entropy,
            6 * uniform(5, 37, 61, 7) - 3,
            {"target": index(5, 61, 7), "label_smoothing": 0.1},
        ),
        "cross_entropy few long rows": (F.cross_entropy, 6 * uniform(3, 50257) - 3, {"target": index(3)}),
        "cross_entropy probabilities": (F.cross_entropy, dense, {"target": uniform(3001, 37)}),
        "bce_with_logits": (
            F.binary_cross_entropy_with_logits,
            dense,
            {"target": uniform(3001, 37), "pos_weight": uniform(37), "weight": uniform(3001, 1)},
        ),
        "bce": (F.binary_cross_entropy, uniform(3001, 37), {"target": uniform(3001, 37)}),
        "sigmoid_focal": (F.sigmoid_focal_loss, dense, {"targets": uniform(3001, 37), "gamma": 1.5}),
        "softmax_focal": (F.softmax_focal_loss, dense, {"target": index(3001), "alpha": uniform(37)}),
    }[name]


LARGE = [
    "cross_entropy",
    "cross_entropy images",
    "cross_entropy few long rows",
    "cross_entropy probabilities",
    "bce_with_logits",
    "bce",
    "sigmoid_focal",
    "softmax_focal",
]


def value_and_gradient(
    loss_of: Any, logits: Tensor, options: dict[str, Any], reduction: str
) -> tuple[Tensor, Tensor]:
    leaf = logits.clone().requires_grad_()
    loss = loss_of(leaf, **options, reduction=reduction)
    loss.sum().backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", LARGE)
def test_same_bits_for_any_number_of_threads(name: str, dtype: torch.dtype, reduction: str) -> None:
    loss_of, logits, options = large(name, dtype)
    results = []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        results.append(value_and_gradient(loss_of, logits, options, reduction))
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(gradient, results[0][1])


@every_case
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_several_callers_at_once(case: Case, reduction: str) -> None:
    logits, options = case.make(torch.float32)
    loss, gradient = value_and_gradient(case.ours, logits, options, reduction)
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(value_and_gradient, case.ours, logits, options, reduction) for _ in range(40)]
        for job in jobs:
            other_loss, other_gradient = job.result()
            assert torch.equal(other_loss, loss)
            assert torch.equal(other_gradient, gradient)


@pytest.mark.parametrize("name", LARGE)
def test_several_callers_with_threads_of_their_own(name: str) -> None:
    torch.set_num_threads(2)
    loss_of, logits, options = large(name, torch.float32)
    loss, gradient = value_and_gradient(loss_of, logits, options, "mean")
    with ThreadPoolExecutor(3) as pool:
        jobs = [pool.submit(value_and_gradient, loss_of, logits, options, "mean") for _ in range(6)]
        for job in jobs:
            assert torch.equal(job.result()[0], loss)
            assert torch.equal(job.result()[1], gradient)


@pytest.mark.parametrize("threads", [1, 3])
def test_an_error_in_a_worker_reaches_the_caller(threads: int) -> None:
    torch.set_num_threads(threads)
    logits, target = torch.randn(5000, 40), torch.randint(40, (5000,))
    target[4999] = 40
    for _ in range(3):
        with pytest.raises(IndexError, match="40"):
            F.cross_entropy(logits, target)
    target[4999] = 39
    assert F.cross_entropy(logits, target).isfinite()
