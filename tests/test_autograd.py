from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accuracy import DTYPES, REDUCTIONS
from cases import CASES, IN_PLACE_CASES, Case
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.fx.experimental.proxy_tensor import make_fx

import fused_losses.functional as F

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
every_in_place_case = pytest.mark.parametrize("case", IN_PLACE_CASES, ids=lambda case: case.name)
every_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
MODIFIED = "modified by an inplace operation"


def gradient_of(loss: Tensor, leaf: Tensor, upstream: Tensor, **options: Any) -> Tensor:
    return torch.autograd.grad(loss, leaf, upstream, **options)[0]


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    tolerance = TOLERANCE[ours.dtype]
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@every_case
@every_reduction
def test_gradcheck(case: Case, reduction: str) -> None:
    logits, options = case.make(torch.float64)
    logits.requires_grad_()
    # The order of a sum may differ by a rounding between two calls on differently aligned memory.
    settings = {"nondet_tol": 1e-14}
    assert gradcheck(lambda x: case.ours(x, **options, reduction=reduction), logits, **settings)
    assert gradgradcheck(lambda x: case.ours(x, **options, reduction=reduction), logits, **settings)


@every_case
@every_reduction
@every_dtype
def test_second_derivatives_are_torchs(case: Case, reduction: str, dtype: torch.dtype) -> None:
    logits, options = case.make(dtype)
    results = []
    upstream = direction = None
    for loss_of in (case.ours, case.theirs):
        leaf = logits.clone().requires_grad_()
        loss = loss_of(leaf, **options, reduction=reduction)
        if upstream is None:
            upstream, direction = torch.randn_like(loss).detach(), torch.randn_like(logits)
        scale = upstream.clone().requires_grad_()
        gradient = gradient_of(loss, leaf, scale, create_graph=True)
        assert gradient.requires_grad
        results.append((gradient.detach(), *torch.autograd.grad(gradient, (leaf, scale), direction)))
    if dtype in (torch.float32, torch.float64):
        for ours, theirs in zip(*results, strict=True):
            assert_close(ours, theirs)
    else:
        # Plain torch rounds after each of its many operations: nothing to hold a second derivative against.
        exact_leaf = logits.double().requires_grad_()
        wide = {
            name: o.double() if isinstance(o, Tensor) and o.dtype == dtype else o
            for name, o in options.items()
        }
        assert upstream is not None
        assert direction is not None
        exact = gradient_of(
            case.theirs(exact_leaf, **wide, reduction=reduction),
            exact_leaf,
            upstream.double(),
            create_graph=True,
        )
        (second,) = torch.autograd.grad(exact, exact_leaf, direction.double())
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close(results[0][0].double(), exact.detach(), rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(results[0][1].double(), second, rtol=tolerance, atol=tolerance)


@every_case
@every_reduction
def test_gradient_penalty(case: Case, reduction: str) -> None:
    """A training step on loss + |gradient|^2, from logits that are not a leaf."""
    data, options = case.make(torch.float64)
    results = []
    for loss_of in (case.ours, case.theirs):
        leaf = data.clone().requires_grad_()
        logits = leaf * 0.9 + 0.01
        loss = loss_of(logits, **options, reduction=reduction).sum()
        (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
        (loss + gradient.square().sum()).backward()
        results.append(leaf.grad)
    assert_close(*results)


@every_case
@every_reduction
@every_dtype
def test_backward_twice(case: Case, reduction: str, dtype: torch.dtype) -> None:
    logits, options = case.make(dtype)
    leaf = logits.requires_grad_()
    loss = case.ours(leaf, **options, reduction=reduction)
    first_upstream, second_upstream = torch.randn_like(loss), torch.randn_like(loss)
    first = gradient_of(loss, leaf, first_upstream, retain_graph=True)
    kept = first.clone()
    second = gradient_of(loss, leaf, second_upstream, retain_graph=True)
    third = gradient_of(loss, leaf, first_upstream)
    assert torch.equal(first, kept)
    assert torch.equal(third, kept)
    expected = gradient_of(case.ours(leaf, **options, reduction=reduction), leaf, second_upstream)
    assert torch.equal(second, expected)


@every_case
@every_reduction
def test_gradients_accumulate_and_share_no_memory(case: Case, reduction: str) -> None:
    logits, options = case.make(torch.float32)
    leaf = logits.requires_grad_()
    upstream = torch.tensor(1.0)
    loss = case.ours(leaf, **options, reduction=reduction)
    loss.backward(upstream.expand_as(loss), retain_graph=True)
    assert leaf.grad is not None
    once = leaf.grad.clone()
    leaf.grad.mul_(100)  # what an optimizer or gradient clipping does
    leaf.grad = None
    loss.backward(upstream.expand_as(loss), retain_graph=True)
    loss.backward(upstream.expand_as(loss))
    torch.testing.assert_close(leaf.grad, 2 * once)


@every_case
@every_reduction
def test_a_gradient_is_the_callers_to_change(case: Case, reduction: str) -> None:
    logits, options = case.make(torch.float32)
    leaf = logits.requires_grad_()
    loss = case.ours(leaf, **options, reduction=reduction)
    first = gradient_of(loss, leaf, torch.ones_like(loss), retain_graph=True)
    kept = first.clone()
    first.zero_()
    assert torch.equal(gradient_of(loss, leaf, torch.ones_like(loss)), kept)


@every_case
@every_reduction
@pytest.mark.parametrize("upstream", [0.0, -0.3, 1e8])
def test_upstream_gradient(case: Case, reduction: str, upstream: float) -> None:
    logits, options = case.make(torch.float64)
    results = []
    for loss_of in (case.ours, case.theirs):
        leaf = logits.clone().requires_grad_()
        (loss_of(leaf, **options, reduction=reduction).sum() * upstream).backward()
        assert leaf.grad is not None
        results.append(leaf.grad / (upstream or 1))
    assert_close(*results)


@every_case
@every_reduction
def test_loss_edited_in_place(case: Case, reduction: str) -> None:
    """YOLO's `loss *= hyp`: the value is the caller's to change, before backward and after."""
    logits, options = case.make(torch.float64)
    results = []
    for loss_of in (case.ours, case.theirs):
        leaf = logits.clone().requires_grad_()
        loss = loss_of(leaf, **options, reduction=reduction)
        loss *= 0.05
        loss += 1
        loss.sum().backward()
        assert leaf.grad is not None
        results.append(leaf.grad)
    assert_close(*results)


@every_case
def test_strided_upstream_gradient(case: Case) -> None:
    logits, options = case.make(torch.float64)
    leaf = logits.requires_grad_()
    loss = case.ours(leaf, **options, reduction="none")
    upstream = torch.randn_like(loss)
    strided = torch.stack([upstream, torch.full_like(upstream, float("nan"))], -1)[..., 0]
    expected = gradient_of(loss, leaf, upstream, retain_graph=True)
    torch.testing.assert_close(gradient_of(loss, leaf, strided, retain_graph=True), expected)
    ones = torch.ones((), dtype=loss.dtype).expand_as(loss)
    torch.testing.assert_close(
        gradient_of(loss, leaf, ones, retain_graph=True), gradient_of(loss, leaf, ones.contiguous())
    )


@every_case
@every_reduction
def test_nothing_is_stored_without_gradient(case: Case, reduction: str) -> None:
    logits, options = case.make(torch.float32)
    stored: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        stored.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        plain_loss = case.ours(logits, **options, reduction=reduction)
        with torch.no_grad():
            loss = case.ours(logits.clone().requires_grad_(), **options, reduction=reduction)
    assert not stored
    assert loss.grad_fn is None
    assert plain_loss.grad_fn is None
    assert not loss.requires_grad
    leaf = logits.clone().requires_grad_()
    torch.testing.assert_close(case.ours(leaf, **options, reduction=reduction).detach(), loss)


@every_case
@every_reduction
def test_inference_mode(case: Case, reduction: str) -> None:
    logits, options = case.make(torch.float32)
    with torch.inference_mode():
        loss = case.ours(logits, **options, reduction=reduction)
    torch.testing.assert_close(loss.clone(), case.ours(logits, **options, reduction=reduction))


@every_case
@every_reduction
def test_inputs_are_left_alone(case: Case, reduction: str) -> None:
    logits, options = case.make(torch.float32)
    before = copy.deepcopy((logits, options))
    leaf = logits.requires_grad_()
    loss = case.ours(leaf, **options, reduction=reduction)
    gradient_of(loss, leaf, torch.randn_like(loss))
    torch.testing.assert_close((leaf.detach(), options), before, rtol=0, atol=0)


@every_case
def test_logits_changed_before_backward(case: Case) -> None:
    """The gradient of a loss that keeps its logits cannot be had once they are overwritten: torch's error."""
    logits, options = case.make(torch.float32)
    logits = logits.requires_grad_() * 1
    loss = case.ours(logits, **options, reduction="none")
    logits.zero_()
    with pytest.raises(RuntimeError, match=MODIFIED):
        loss.sum().backward()


@every_case
@every_reduction
def test_targets_changed_before_backward(case: Case, reduction: str) -> None:
    """Either the gradient is right or torch's error comes; never a gradient for targets of another batch."""
    logits, options = case.make(torch.float64)
    name = "targets" if "targets" in options else "target"
    leaf = logits.requires_grad_()
    right = gradient_of(
        case.ours(leaf, **options, reduction=reduction).sum(), leaf, torch.tensor(1.0).double()
    )
    loss = case.ours(leaf, **options, reduction=reduction)
    options[name].zero_()
    if right_or_modified_error(loss.sum(), leaf):
        assert leaf.grad is not None
        assert_close(leaf.grad, right)


def right_or_modified_error(loss: Tensor, leaf: Tensor) -> bool:
    """Run backward; False where an error about tensors changed in place came instead of a gradient."""
    try:
        loss.backward()
    except RuntimeError as error:
        if "inplace operation" not in str(error):
            raise
        return False
    return leaf.grad is not None


def in_place(case: Case, reduction: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights, the logits made from them, the loss with inplace_backward, and the weights' right gradient."""
    data, options = case.make(dtype)
    weights = data.clone().requires_grad_()
    case.ours(weights * 1.5, **options, reduction=reduction).sum().backward()
    assert weights.grad is not None
    right, weights.grad = weights.grad, None
    logits = weights * 1.5
    loss = case.ours(logits, **options, reduction=reduction, inplace_backward=True)
    return weights, logits, loss, right


@every_in_place_case
@every_reduction
@every_dtype
def test_in_place_gradient_is_right(case: Case, reduction: str, dtype: torch.dtype) -> None:
    weights, logits, loss, right = in_place(case, reduction, dtype)
    expected = case.ours(weights.detach() * 1.5, **case_options(case, dtype), reduction=reduction)
    assert loss.shape == expected.shape
    loss.sum().backward()
    assert weights.grad is not None
    assert_close(weights.grad, right)
    # The gradient by the logits lies where the logits lay.
    assert_close(logits.detach() * 1.5, right)


def case_options(case: Case, dtype: torch.dtype) -> dict[str, Any]:
    return case.make(dtype)[1]


@every_in_place_case
@every_reduction
def test_in_place_with_an_upstream_gradient(case: Case, reduction: str) -> None:
    weights, _, loss, right = in_place(case, reduction, torch.float64)
    (loss.sum() * -0.3).backward()
    assert weights.grad is not None
    assert_close(weights.grad, -0.3 * right)


@every_in_place_case
@every_reduction
def test_in_place_on_a_leaf(case: Case, reduction: str) -> None:
    logits, options = case.make(torch.float32)
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        case.ours(
            logits.requires_grad_(), **options, reduction=reduction, inplace_backward=True
        ).sum().backward()


@every_in_place_case
@every_reduction
def test_in_place_on_a_view_of_a_leaf(case: Case, reduction: str) -> None:
    logits, options = case.make(torch.float32)
    leaf = torch.stack([logits, logits]).requires_grad_()
    before = leaf.detach().clone()
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        case.ours(leaf[1], **options, reduction=reduction, inplace_backward=True).sum().backward()
    assert torch.equal(leaf, before)


@every_in_place_case
@every_reduction
def test_in_place_on_logits_their_maker_keeps(case: Case, reduction: str) -> None:
    """exp's backward needs its own result, which is where the gradient goes."""
    logits, options = case.make(torch.float32)
    leaf = logits.requires_grad_()
    loss = case.ours(leaf.exp(), **options, reduction=reduction, inplace_backward=True)
    with pytest.raises(RuntimeError, match=MODIFIED):
        loss.sum().backward()


@every_in_place_case
@every_reduction
def test_in_place_twice(case: Case, reduction: str) -> None:
    _, _, loss, _ = in_place(case, reduction, torch.float32)
    loss.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=MODIFIED):
        loss.sum().backward()


@every_in_place_case
@every_reduction
def test_in_place_and_logits_changed_before_backward(case: Case, reduction: str) -> None:
    _, logits, loss, _ = in_place(case, reduction, torch.float32)
    with torch.no_grad():
        logits.zero_()
    with pytest.raises(RuntimeError, match=MODIFIED):
        loss.sum().backward()


@every_in_place_case
@every_reduction
@pytest.mark.parametrize("earlier", [True, False])
def test_in_place_with_another_user_of_the_logits(case: Case, reduction: str, earlier: bool) -> None:
    """Another function that kept the logits for its own backward gets torch's error, or was right before."""
    data, options = case.make(torch.float64)
    results = []
    for keyword in ({}, {"inplace_backward": True}):
        weights = data.clone().requires_grad_()
        logits = weights * 1.5
        other = logits.square().sum() if earlier else torch.tensor(0.0)
        loss = case.ours(logits, **options, reduction=reduction, **keyword).sum()
        other = other if earlier else logits.square().sum()
        if not right_or_modified_error(loss + other, weights):
            assert keyword, "without inplace_backward nothing may be modified"
            return
        assert weights.grad is not None
        results.append(weights.grad)
    assert_close(*results)


@every_in_place_case
@every_reduction
def test_in_place_without_gradient(case: Case, reduction: str) -> None:
    logits, options = case.make(torch.float32)
    before = logits.clone()
    expected = case.ours(logits, **options, reduction=reduction)
    with torch.no_grad():
        loss = case.ours(logits, **options, reduction=reduction, inplace_backward=True)
    assert torch.equal(loss, expected)
    assert torch.equal(logits, before)


@every_in_place_case
@every_reduction
def test_in_place_and_second_derivatives(case: Case, reduction: str) -> None:
    """Right, or an error: the logits that a second derivative needs are gone."""
    data, options = case.make(torch.float64)
    leaf = data.clone().requires_grad_()
    expected = gradient_of(
        case.ours(leaf * 1.5, **options, reduction=reduction).sum(),
        leaf,
        torch.tensor(1.0).double(),
        create_graph=True,
    )
    (expected_second,) = torch.autograd.grad(expected.square().sum(), leaf)
    leaf = data.clone().requires_grad_()
    try:
        loss = case.ours(leaf * 1.5, **options, reduction=reduction, inplace_backward=True).sum()
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
        (second,) = torch.autograd.grad(gradient.square().sum(), leaf)
    except RuntimeError:
        return
    assert_close(second, expected_second)


@every_in_place_case
@every_reduction
def test_in_place_on_logits_that_retain_their_gradient(case: Case, reduction: str) -> None:
    data, options = case.make(torch.float64)
    results = []
    for keyword in ({}, {"inplace_backward": True}):
        leaf = data.clone().requires_grad_()
        logits = leaf * 0.9
        logits.retain_grad()
        case.ours(logits, **options, **keyword, reduction=reduction).sum().backward()
        results.append((leaf.grad, logits.grad))
    for ours, theirs in zip(*results, strict=True):
        assert_close(ours, theirs)


class NoGradient(torch.autograd.Function):
    """What a loss is logged by, say."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> None:
        return None


@every_case
@every_reduction
def test_no_upstream_gradient_is_no_gradient(case: Case, reduction: str) -> None:
    """And not one of zeros, with which an optimizer would take a step of weight decay."""
    logits, options = case.make(torch.float64)
    leaf = logits.clone().requires_grad_()
    NoGradient.apply(case.ours(leaf, **options, reduction=reduction)).sum().backward()
    assert leaf.grad is None


@every_case
@every_reduction
def test_make_fx(case: Case, reduction: str) -> None:
    """It runs backward with tensors of which no number may be read."""
    logits, options = case.make(torch.float64)

    def gradient(x: Tensor) -> Tensor:
        loss = case.ours(x * 0.9 + 0.01, **options, reduction=reduction).sum() * 2
        return torch.autograd.grad(loss, x)[0]

    leaf = logits.clone().requires_grad_()
    assert_close(make_fx(gradient)(leaf)(leaf), gradient(leaf))


@every_in_place_case
@every_reduction
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", [1.0, 0.3])
def test_in_place_on_a_view(case: Case, reduction: str, dtype: torch.dtype, factor: float) -> None:
    """A slice of the network's output, as detection heads have it: the rest of the tensor stays as it is."""
    data, options = case.make(dtype)
    weights = torch.cat([data, data], data.dim() - 1).requires_grad_()
    results = []
    for inplace in (False, True):
        output = weights * 2
        logits = output[..., data.shape[-1] :]
        loss = case.ours(logits, **options, reduction=reduction, inplace_backward=inplace).sum() * factor
        results.append(torch.autograd.grad(loss, weights)[0])
        rest, before = (x.detach()[..., : data.shape[-1]] for x in (output, weights * 2))
        assert torch.equal(rest, before)
    assert_close(*results)


@every_in_place_case
@every_reduction
def test_in_place_on_logits_marked_as_negated(case: Case, reduction: str) -> None:
    data, options = case.make(torch.float32)
    results = []
    for inplace in (False, True):
        leaf = data.clone().requires_grad_()
        logits = torch.complex(torch.zeros_like(leaf), -leaf).conj().imag
        assert logits.is_neg()
        loss = case.ours(logits, **options, reduction=reduction, inplace_backward=inplace)
        results.append(torch.autograd.grad(loss.sum() * 3, leaf)[0])
    assert_close(*results)


@every_reduction
def test_in_place_beside_a_target_in_the_same_memory(reduction: str) -> None:
    leaf = torch.randn(20, 7).requires_grad_()
    results = []
    for inplace in (False, True):
        values = leaf.sigmoid() * 1
        loss = F.binary_cross_entropy_with_logits(
            values[1:], values.detach()[:-1], reduction=reduction, inplace_backward=inplace
        )
        results.append((loss.detach(), torch.autograd.grad(loss.sum() * 3, leaf)[0]))
    for ours, theirs in zip(*results, strict=True):
        assert_close(ours, theirs)


def pooled(tensor: Tensor) -> Tensor:
    """In rows of a larger pool, as an offload has it."""
    pool = torch.full((tensor.shape[0], 2 * tensor[0].numel() + 1), 7, dtype=tensor.dtype)
    view = pool[:, : tensor[0].numel()]
    return view.copy_(tensor.flatten(1)).view(tensor.shape)


@every_case
@every_reduction
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("keep", [pooled, Tensor.clone])
def test_hooks_on_saved_tensors(
    case: Case, reduction: str, inplace: bool, keep: Callable[[Tensor], Tensor]
) -> None:
    """What a hook gives back is its own: of any strides, with other things around it, and to be left as it is."""
    if inplace and not case.in_place:
        pytest.skip("it has no inplace_backward")
    data, options = case.make(torch.float32)
    expected = data.clone().requires_grad_()
    (case.theirs(expected, **options, reduction=reduction).sum() * 3).backward()
    store: list[tuple[Tensor, Tensor]] = []

    def pack(tensor: Tensor) -> int:
        kept = keep(tensor.detach()) if tensor.dim() > 1 else tensor.detach().clone()
        whole = kept if kept._base is None else kept._base
        store.append((kept, whole.clone()))
        return len(store) - 1

    leaf = data.clone().requires_grad_()
    logits = leaf * 1
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda place: store[place][0]):
        keywords = {"inplace_backward": True} if inplace else {}
        loss = case.ours(logits, **options, reduction=reduction, **keywords)
    assert store
    (loss.sum() * 3).backward()
    assert leaf.grad is not None
    assert_close(leaf.grad, expected.grad)
    for kept, before in store:
        assert torch.equal(kept if kept._base is None else kept._base, before)


@every_in_place_case
def test_an_error_of_a_hook_is_no_objection(case: Case) -> None:
    data, options = case.make(torch.float32)
    calls: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        calls.append(1)
        raise RuntimeError("disk full")

    for inplace in (False, True):
        logits = data.clone().requires_grad_() * 1
        calls.clear()
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with hooks, pytest.raises(RuntimeError, match="disk full"):
            case.ours(logits, **options, inplace_backward=inplace)
        assert len(calls) == 1


@every_case
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_an_upstream_gradient_of_several_tensors(case: Case, reduction: str) -> None:
    """A subclass that runs each op once for every tensor in it."""
    two = pytest.importorskip("torch.testing._internal.two_tensor").TwoTensor
    data, options = case.make(torch.float64)
    leaf = data.clone().requires_grad_()
    loss = case.ours(leaf, **options, reduction=reduction)
    factors, ones = (
        two(torch.full_like(loss, a), torch.full_like(loss, b)) for a, b in ((2.0, 3.0), (1.0, 1.0))
    )
    gradient = torch.autograd.grad(loss * factors, leaf, ones)[0]
    once = gradient_of(case.ours(leaf, **options, reduction=reduction), leaf, torch.ones_like(loss))
    assert_close(gradient.a, 2 * once)
    assert_close(gradient.b, 3 * once)


@every_case
@every_reduction
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_hooks_and_retained_gradients(case: Case, reduction: str, create_graph: bool) -> None:
    data, options = case.make(torch.float64)
    results = []
    for loss_of in (case.ours, case.theirs):
        leaf = data.clone().requires_grad_()
        logits = leaf * 0.9 + 0.01
        logits.retain_grad()
        logits.register_hook(lambda gradient: gradient * 2)
        loss_of(logits, **options, reduction=reduction).sum().backward(create_graph=create_graph)
        assert leaf.grad is not None
        assert logits.grad is not None
        results.append((leaf.grad.detach(), logits.grad.detach()))
        leaf.grad = logits.grad = None  # else they and their graph hold each other
    for ours, theirs in zip(*results, strict=True):
        assert_close(ours, theirs)


@every_case
@every_reduction
def test_gradient_by_the_targets(case: Case, reduction: str) -> None:
    logits, options = case.make(torch.float64)
    name = "targets" if "targets" in options else "target"
    if not options[name].is_floating_point():
        pytest.skip("class indices have no gradient")
    results = []
    for loss_of in (case.ours, case.theirs):
        leaf, target = logits.clone().requires_grad_(), options[name].clone().requires_grad_()
        loss = loss_of(leaf, **(options | {name: target}), reduction=reduction).sum()
        results.append(torch.autograd.grad(loss, (leaf, target)))
    for ours, theirs in zip(*results, strict=True):
        assert_close(ours, theirs)
    # and by the targets alone
    target = options[name].clone().requires_grad_()
    (alone,) = torch.autograd.grad(
        case.ours(logits, **(options | {name: target}), reduction=reduction).sum(), target
    )
    assert_close(alone, results[1][1])
