"""What the compiled Functions do that those of Python do not: take arguments as the ops' schemas have them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo.compiled_autograd as compiled_autograd
from torch import Tensor

import fused_losses.functional as F
from fused_losses._ops import by_number, native_autograd

# On the CPU on every machine: a class index out of range would end a CUDA context.
LOGITS = torch.randn(5, 4, generator=torch.Generator("cpu").manual_seed(1), device="cpu")
TARGET = torch.tensor([0, 1, 2, 3, 0], device="cpu")
OPTIONS = (1, -100, 0.1)  # mean, ignore_index, label_smoothing
CROSS_ENTROPY = next(
    number for number, loss in by_number.items() if loss.name == "cross_entropy" and not loss.wide
)


def test_it_is_there() -> None:
    assert native_autograd is not None
    for reduction, name in (("mean", "Stored"), ("none", "Recomputed")):
        loss = F.cross_entropy(LOGITS.clone().requires_grad_(), TARGET, reduction=reduction)
        assert loss.grad_fn is not None
        assert loss.grad_fn.name() == f"torch::autograd::CppNode<{name}Backward>"


def stored(*arguments: Any) -> Tensor:
    assert native_autograd is not None
    value: Tensor = native_autograd.stored(*arguments)
    return value


@pytest.mark.parametrize(
    "options",
    [(1, -100, np.float32(0)), (np.int64(1), np.int32(-100), 0), (1, -100, torch.tensor(0.0, device="cpu"))],
)
def test_numbers_of_other_types(options: tuple[Any, ...]) -> None:
    value = stored(CROSS_ENTROPY, LOGITS.clone().requires_grad_(), (TARGET, None), options)
    torch.testing.assert_close(value, torch.nn.functional.cross_entropy(LOGITS, TARGET))


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((999, LOGITS, (TARGET, None), OPTIONS), IndexError),
        ((-1, LOGITS, (TARGET, None), OPTIONS), IndexError),
        (("cross_entropy", LOGITS, (TARGET, None), OPTIONS), TypeError),
        ((CROSS_ENTROPY, None, (TARGET, None), OPTIONS), RuntimeError),
        ((CROSS_ENTROPY, LOGITS, (None, None), OPTIONS), RuntimeError),
        ((CROSS_ENTROPY, [1.0], (TARGET, None), OPTIONS), TypeError),
        ((CROSS_ENTROPY, LOGITS, (TARGET, 1.0), OPTIONS), TypeError),
        ((CROSS_ENTROPY, LOGITS, (TARGET,), OPTIONS), ValueError),
        ((CROSS_ENTROPY, LOGITS, (TARGET, None), OPTIONS[:2]), ValueError),
        ((CROSS_ENTROPY, LOGITS, (TARGET, None), ("mean", -100, 0.0)), TypeError),
        ((CROSS_ENTROPY, LOGITS, (TARGET, None), (1, 0.5, 0.0)), TypeError),
        ((CROSS_ENTROPY, LOGITS, (TARGET, None), (1, 2**70, 0.0)), OverflowError),
        ((CROSS_ENTROPY, LOGITS, (TARGET, None), (1, -100, "much")), TypeError),
        ((CROSS_ENTROPY, LOGITS, [TARGET, None], OPTIONS), TypeError),
        ((CROSS_ENTROPY, LOGITS, (TARGET, None)), TypeError),
        ((CROSS_ENTROPY, LOGITS, (TARGET + 4, None), OPTIONS), IndexError),
    ],
    ids=lambda argument: argument.__name__ if isinstance(argument, type) else "",
)
def test_errors(arguments: tuple[Any, ...], error: type[Exception]) -> None:
    with pytest.raises(error):
        stored(*arguments)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_an_error_of_the_second_derivative_reaches_the_caller(
    reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> Tensor:
        raise LookupError("by the test")

    monkeypatch.setattr("fused_losses._autograd.differentiable_by_number", fail)
    logits = LOGITS.clone().requires_grad_()
    loss = F.cross_entropy(logits, TARGET, reduction=reduction).sum()
    with pytest.raises(LookupError, match="by the test"):
        torch.autograd.grad(loss, logits, create_graph=True)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_autograd(reduction: str, inplace: bool) -> None:
    layer = torch.nn.Linear(4, 4, device="cpu")

    def gradient_of(loss: Any, **keywords: Any) -> Tensor:
        layer.zero_grad()
        loss(layer(LOGITS), TARGET, reduction=reduction, **keywords).sum().backward()
        assert layer.weight.grad is not None
        return layer.weight.grad.clone()

    expected = gradient_of(torch.nn.functional.cross_entropy)
    with compiled_autograd._enable(torch.compile(backend="eager")):  # type: ignore[no-untyped-call]
        for _ in range(2):
            torch.testing.assert_close(gradient_of(F.cross_entropy, inplace_backward=inplace), expected)
