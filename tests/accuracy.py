"""The accuracy rule, and the inputs it is asked on.

Errors are against fp64, element by element, in units in the last place (ulp) of the dtype at the exact value.
Elements below eps times the largest one are measured at that bound: their last digits reach no sum they are
part of. The largest error of ours may be that of torch's own in the same dtype, plus one ulp.

Where a gradient is the difference of two rounded numbers (p - t with a soft target or a smoothed label) it
can come out near zero, and how many of its own digits are right is luck, for torch and for us. Such gradients
are measured in ulp of the largest one: the caller says `cancels=True`; where the value is such a difference too,
`value_cancels=True`.

Among few elements the largest error is luck too. Tests of shapes and strides ask whether every element is the
right one, at LUCK ulp; the rule itself is asked of MANY elements, different ones, measured
by their own size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LOW_DTYPES = [torch.float32, torch.bfloat16, torch.float16]
REDUCTIONS = ["mean", "sum", "none"]
# The gradient made in the forward pass, and made in backward; one width of numbers each.
TWO_PATHS = [(torch.float32, "mean"), (torch.bfloat16, "none")]
CLASSES = [1, 2, 3, 15, 16, 17, 31, 33, 127, 1000, 50257]

MANY, LUCK = 1000, 16

Loss = Callable[..., Tensor]


def assert_accurate(
    ours: Loss,
    theirs: Loss,
    logits: Tensor,
    *,
    exact: Loss | None = None,
    cancels: bool = False,
    value_cancels: bool = False,
    **options: Any,
) -> None:
    """Hold ours against theirs, both called with (logits, **options), in value and in every gradient.

    `exact` is what to call in fp64: theirs unless given. Gradients are taken by the logits and by every
    option that requires one, with a random upstream gradient.
    """
    wide = {name: _upcast(option) for name, option in options.items()}
    own, upstream = _differentiate(ours, logits, options, None)
    torchs, _ = _differentiate(theirs, logits, options, upstream)
    right, _ = _differentiate(exact or theirs, _upcast(logits), wide, upstream)
    for name in own:
        difference = value_cancels if name == "the loss" else cancels
        floor = 1.0 if difference else torch.finfo(own[name].dtype).eps
        _assert_no_worse(name, own[name], torchs[name], right[name], floor)


def assert_gradient_of_any_size(loss_of: Callable[[Tensor], Tensor], data: Tensor, upstream: float) -> None:
    """The gradient of an unreduced loss, with an upstream gradient far from 1, against the one it has in fp64."""
    gradients = []
    for dtype in (data.dtype, torch.float64):
        logits = data.detach().to(dtype).requires_grad_()
        loss = loss_of(logits)
        gradients.append(torch.autograd.grad(loss, logits, torch.full_like(loss, upstream))[0].double())
    ours, exact = gradients
    assert (ours - exact).abs().max() <= 4 * torch.finfo(data.dtype).eps * exact.abs().max()


def ulps(result: Tensor, exact: Tensor, dtype: torch.dtype, floor: float | None = None) -> Tensor:
    """The error of result in units in the last place of dtype; 0 where exact is not finite in dtype.

    `floor`: the part of the largest element below which all are measured at that bound; eps unless given.
    """
    info = torch.finfo(dtype)
    finite = exact.to(dtype).isfinite()
    magnitude = exact.abs().where(finite, 0)
    bound = magnitude.amax() * (info.eps if floor is None else floor) if magnitude.numel() else 0
    _, exponent = torch.frexp(magnitude.clamp_min(bound))
    ulp = torch.ldexp(torch.full_like(magnitude, info.eps), exponent - 1)
    ulp = ulp.clamp_min(info.smallest_normal * info.eps)
    return ((result.double() - exact).abs() / ulp).where(finite, 0)


def draw(shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits of `shape`, classes along dimension 1 (0 if it is the only one), and class indices for them."""
    class_dim = min(1, len(shape) - 1)
    classes = shape[class_dim]
    rows = (*shape[:class_dim], *shape[class_dim + 1 :])
    logits = torch.randn(shape, dtype=torch.float64) * 2
    index = torch.randint(classes, rows)
    if kind == "confident":
        logits = torch.randn(shape, dtype=torch.float64) * 0.1
        logits.scatter_(class_dim, index.unsqueeze(class_dim), math.log(999 * max(classes - 1, 1)))
    elif kind == "extreme":
        logits = torch.where(torch.rand(shape) < 0.3, 1e4 * torch.randint(-1, 2, shape), logits)
    elif kind == "minus infinity first":
        block = classes // 2
        index = torch.randint(block, classes, rows)
        logits.narrow(class_dim, 0, block).fill_(-math.inf)
    elif kind != "ordinary":
        raise ValueError(kind)
    return logits.to(dtype), index


KINDS = ["ordinary", "confident", "extreme", "minus infinity first"]


def arrange(tensor: Tensor, layout: str) -> Tensor:
    """The same values in another place of memory, with nan around them (a copied row for "expanded")."""
    if layout == "contiguous":
        return tensor
    if layout == "transposed":
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "expanded":
        return tensor[:1].expand_as(tensor)
    if layout == "channels last":
        return tensor.contiguous(memory_format=torch.channels_last)
    *outer, last = tensor.shape
    if layout == "misaligned":
        view = tensor.new_full((tensor.numel() + 1,), math.nan)[1:].view(tensor.shape)
    elif layout == "sliced":
        view = tensor.new_full((*outer, last + 5), math.nan)[..., 5:]
    elif layout == "stepped":
        view = tensor.new_full((*outer, 2 * last), math.nan)[..., ::2]
    else:
        raise ValueError(layout)
    return view.copy_(tensor)


LAYOUTS = ["contiguous", "transposed", "expanded", "misaligned", "sliced", "stepped"]


def layouts_of(*shapes: tuple[int, ...]) -> list[tuple[tuple[int, ...], str]]:
    """Every shape with every layout it can have."""
    return [
        (shape, layout)
        for shape in shapes
        for layout in LAYOUTS + (["channels last"] if len(shape) == 4 else [])
        if len(shape) > 1 or layout not in ("transposed", "expanded")
    ]


def _differentiate(
    loss: Loss, logits: Tensor, options: dict[str, Any], upstream: Tensor | None
) -> tuple[dict[str, Tensor], Tensor]:
    """The loss and its gradients, by name, and the upstream gradient they were made with."""
    leaves = {"logits": logits.detach().requires_grad_()}
    for name, option in options.items():
        if isinstance(option, Tensor) and option.requires_grad:
            leaves[name] = option.detach().requires_grad_()
    given = options | {name: leaf for name, leaf in leaves.items() if name in options}
    value = loss(leaves["logits"], **given)
    if upstream is None:
        upstream = _random_sign(value) * (1 + torch.rand_like(value)).detach()
    gradients = torch.autograd.grad(value, list(leaves.values()), upstream.to(value.dtype))
    results = {"the loss": value.detach()}
    for name, gradient in zip(leaves, gradients, strict=True):
        results[f"the gradient by {name}"] = gradient
    return results, upstream


def _random_sign(tensor: Tensor) -> Tensor:
    return torch.randint_like(tensor.detach(), 2) * 2 - 1


def _upcast(option: Any) -> Any:
    if isinstance(option, Tensor) and option.is_floating_point():
        return option.detach().double().requires_grad_(option.requires_grad)
    return option


def _assert_no_worse(what: str, ours: Tensor, theirs: Tensor, exact: Tensor, floor: float) -> None:
    dtype = ours.dtype
    assert ours.dtype == theirs.dtype, f"{what} is {ours.dtype}, torch's is {theirs.dtype}"
    assert ours.shape == theirs.shape, f"{what} has shape {ours.shape}, torch's has {theirs.shape}"
    if not ours.numel():
        return
    expected = exact.to(dtype)
    finite = expected.isfinite()
    wrong = finite & ~ours.isfinite() | (expected.isinf() & (theirs == expected) & (ours != expected))
    assert not wrong.any(), f"{what} is {ours[wrong][0]} where {exact[wrong][0]} is right"
    if dtype == torch.float64:
        # The exact value is torch's own here, with what it rounds away: log p of 0.999 has lost four digits.
        largest = exact[finite].abs().max().item() if finite.any() else 0.0
        torch.testing.assert_close(ours[finite], exact[finite], rtol=1e-11, atol=1e-13 * largest)
        return
    errors = ulps(ours, exact, dtype, floor)
    theirs_at_most = ulps(theirs, exact, dtype, floor).where(theirs.isfinite(), 0).max()
    size = exact.abs().where(finite, 0)
    counted = (size > 0) & (size >= size.max() * floor / 4)
    many = size[counted].unique().numel() >= MANY and theirs.isfinite().any()
    allowed = theirs_at_most + (1 if many else LUCK)
    at = errors.argmax()
    assert errors.max() <= allowed, (
        f"{what} is {errors.max():.3g} ulp off, torch's at most {theirs_at_most:.3g}: {ours.flatten()[at]} for "
        f"{exact.flatten()[at]:.9g}, torch says {theirs.flatten()[at]}"
    )
