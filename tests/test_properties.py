"""Any combination of options, shapes, dtypes and strides that hypothesis thinks of, against torch in fp64."""

from __future__ import annotations

from typing import Any

import plain
import torch
import torch.nn.functional as torch_functional
from accuracy import REDUCTIONS, arrange
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import fused_losses.functional as F
from fused_losses import reference

settings.register_profile(
    "suite", max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("suite")

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}
dtypes = st.sampled_from([torch.float64, torch.float64, torch.float32, torch.bfloat16, torch.float16])
layouts = st.sampled_from(["contiguous", "transposed", "misaligned", "sliced", "stepped", "expanded"])
reductions = st.sampled_from(REDUCTIONS)
sizes = st.integers(0, 5)
classes = st.one_of(st.integers(1, 9), st.sampled_from([15, 16, 17, 33, 70]))


@st.composite
def class_shapes(draw: st.DrawFn) -> tuple[int, ...]:
    count = draw(classes)
    return draw(st.sampled_from([(count,), (draw(sizes), count, *draw(st.lists(sizes, max_size=3)))]))


element_shapes = st.lists(sizes, max_size=4).map(tuple)


@st.composite
def tensors(draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype, *, unit: bool = False) -> Tensor:
    generator = torch.Generator(torch.get_default_device()).manual_seed(draw(st.integers(0, 2**16)))
    if unit:
        tensor = torch.rand(shape, generator=generator, dtype=torch.float64)
        tensor = tensor.round() if draw(st.booleans()) else tensor
    else:
        scale = draw(st.sampled_from([0.1, 3.0, 30.0]))
        tensor = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
    tensor = tensor.to(dtype)
    return arrange(tensor, draw(layouts)) if len(shape) > 1 and tensor.numel() else tensor


@st.composite
def broadcastable(draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    if draw(st.booleans()):
        return None
    skipped = draw(st.integers(0, len(shape)))
    smaller = tuple(draw(st.sampled_from([1, size])) for size in shape[skipped:])
    return draw(tensors(smaller, dtype, unit=True)) * 3


def assert_same(ours: Any, theirs: Any, logits: Tensor, options: dict[str, Any]) -> None:
    """theirs is called in fp64; upstream gradients are random."""
    leaf, exact_leaf = logits.detach().requires_grad_(), logits.detach().double().requires_grad_()
    wide = {
        name: option.double() if isinstance(option, Tensor) and option.is_floating_point() else option
        for name, option in options.items()
    }
    loss, exact = ours(leaf, **options), theirs(exact_leaf, **wide)
    assert loss.dtype == logits.dtype
    assert loss.shape == exact.shape
    upstream = torch.linspace(-1, 2, max(loss.numel(), 1), dtype=torch.float64)[: loss.numel()].reshape(
        loss.shape
    )
    upstream = upstream.to(loss.dtype)
    (gradient,) = torch.autograd.grad(loss, leaf, upstream)
    (exact_gradient,) = torch.autograd.grad(exact, exact_leaf, upstream.double())
    tolerance = TOLERANCE[logits.dtype]
    for result, right in ((loss, exact), (gradient, exact_gradient)):
        torch.testing.assert_close(
            result.detach().double(),
            right.detach(),
            rtol=tolerance,
            # a few roundings of the largest term of what may be a difference
            atol=tolerance * max(1.0, *(abs(bound) for bound in extremes(right))) / 10,
            equal_nan=True,
        )


def extremes(tensor: Tensor) -> tuple[float, float]:
    finite = tensor[tensor.isfinite()]
    return (finite.min().item(), finite.max().item()) if finite.numel() else (0.0, 0.0)


def rows_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:1] + shape[2:] if len(shape) > 1 else ()


@st.composite
def index_of(draw: st.DrawFn, shape: tuple[int, ...], ignore_index: int) -> Tensor:
    count = shape[min(1, len(shape) - 1)]
    generator = torch.Generator(torch.get_default_device()).manual_seed(draw(st.integers(0, 2**16)))
    index = torch.randint(count, rows_of(shape), generator=generator)
    ignored = torch.rand(rows_of(shape), generator=generator) < draw(st.sampled_from([0, 0.3, 1]))
    return index.masked_fill(ignored, ignore_index)


@given(st.data())
def test_cross_entropy_with_indices(data: st.DataObject) -> None:
    shape, dtype = data.draw(class_shapes()), data.draw(dtypes)
    count = shape[min(1, len(shape) - 1)]
    options: dict[str, Any] = {
        "ignore_index": data.draw(st.sampled_from([-100, 0, count - 1, 255])),
        "weight": data.draw(st.none() | tensors((count,), dtype, unit=True)),
        "label_smoothing": data.draw(st.sampled_from([0.0, 0.1, 1.0])),
        "reduction": data.draw(reductions),
    }
    options["target"] = data.draw(index_of(shape, options["ignore_index"]))
    assert_same(F.cross_entropy, torch_functional.cross_entropy, data.draw(tensors(shape, dtype)), options)


@given(st.data())
def test_cross_entropy_with_probabilities(data: st.DataObject) -> None:
    shape, dtype = data.draw(class_shapes()), data.draw(dtypes)
    count = shape[min(1, len(shape) - 1)]
    options = {
        "target": data.draw(tensors(shape, dtype, unit=True)),
        "weight": data.draw(st.none() | tensors((count,), dtype, unit=True)),
        "label_smoothing": data.draw(st.sampled_from([0.0, 0.1, 1.0])),
        "reduction": data.draw(reductions),
    }
    assert_same(F.cross_entropy, torch_functional.cross_entropy, data.draw(tensors(shape, dtype)), options)


@given(st.data())
def test_bce_with_logits(data: st.DataObject) -> None:
    shape, dtype = data.draw(element_shapes), data.draw(dtypes)
    options = {
        "target": data.draw(tensors(shape, dtype, unit=True)),
        "weight": data.draw(broadcastable(shape, dtype)),
        "pos_weight": data.draw(broadcastable(shape, dtype)),
        "reduction": data.draw(reductions),
    }
    assert_same(
        F.binary_cross_entropy_with_logits,
        torch_functional.binary_cross_entropy_with_logits,
        data.draw(tensors(shape, dtype)),
        options,
    )


@given(st.data())
def test_bce(data: st.DataObject) -> None:
    shape, dtype = data.draw(element_shapes), data.draw(dtypes)
    options = {
        "target": data.draw(tensors(shape, dtype, unit=True)),
        "weight": data.draw(broadcastable(shape, dtype)),
        "reduction": data.draw(reductions),
    }
    probabilities = data.draw(tensors(shape, dtype, unit=True)) * 0.75 + 0.125
    assert_same(F.binary_cross_entropy, torch_functional.binary_cross_entropy, probabilities, options)


@given(st.data())
def test_sigmoid_focal(data: st.DataObject) -> None:
    shape, dtype = data.draw(element_shapes), data.draw(dtypes)
    options = {
        "targets": data.draw(tensors(shape, dtype, unit=True)),
        "alpha": data.draw(st.sampled_from([-1, 0.0, 0.25, 1.0])),
        "gamma": data.draw(st.sampled_from([0, 0.5, 1, 1.5, 2, 2.5, 4.0])),
        "reduction": data.draw(reductions),
    }

    def exact(x: Tensor, targets: Tensor, alpha: float, gamma: float, reduction: str) -> Tensor:
        # The plain formula has nan gradients where a sigmoid is 0 or 1 to the last bit.
        balance = (alpha, 1 - alpha) if alpha >= 0 else (1, 1)
        return reference.sigmoid_focal_loss(x, targets, None, None, *balance, gamma, reduction)

    assert_same(F.sigmoid_focal_loss, exact, data.draw(tensors(shape, dtype)), options)


@given(st.data())
def test_softmax_focal(data: st.DataObject) -> None:
    shape, dtype = data.draw(class_shapes()), data.draw(dtypes)
    count = shape[min(1, len(shape) - 1)]
    options: dict[str, Any] = {
        "ignore_index": data.draw(st.sampled_from([-100, 0, count - 1, 255])),
        "alpha": data.draw(st.none() | st.just(0.25) | tensors((count,), dtype, unit=True)),
        "gamma": data.draw(st.sampled_from([1, 1.5, 2, 2.5, 4.0])),
        "reduction": data.draw(reductions),
    }
    options["target"] = data.draw(index_of(shape, options["ignore_index"]))
    logits = data.draw(tensors(shape, dtype)).clamp(-8, 8)
    assert_same(F.softmax_focal_loss, plain.softmax_focal_loss, logits, options)
