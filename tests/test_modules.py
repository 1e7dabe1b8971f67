from __future__ import annotations

import copy
import inspect
import io
import pickle
import warnings
from typing import Any

import plain
import pytest
import torch
from torch import Tensor, nn

import fused_losses
import fused_losses.functional as F

PAIRS = [
    (fused_losses.CrossEntropyLoss, nn.CrossEntropyLoss, torch.nn.functional.cross_entropy),
    (
        fused_losses.BCEWithLogitsLoss,
        nn.BCEWithLogitsLoss,
        torch.nn.functional.binary_cross_entropy_with_logits,
    ),
    (fused_losses.BCELoss, nn.BCELoss, torch.nn.functional.binary_cross_entropy),
]
every_pair = pytest.mark.parametrize(("ours", "theirs"), [pair[:2] for pair in PAIRS])


def batch(theirs: Any) -> tuple[Tensor, Tensor]:
    if theirs is nn.CrossEntropyLoss:
        return torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 4, 1])
    data = torch.randn(6, 5)
    return (data.sigmoid() if theirs is nn.BCELoss else data), torch.rand(6, 5)


def options_of(theirs: Any) -> list[dict[str, Any]]:
    options: list[dict[str, Any]] = [
        {},
        {"weight": torch.rand(5)},
        {"reduction": "sum"},
        {"reduction": "none"},
    ]
    if theirs is nn.CrossEntropyLoss:
        options += [{"ignore_index": 1}, {"label_smoothing": 0.1, "weight": torch.rand(5)}]
    if theirs is nn.BCEWithLogitsLoss:
        options += [{"pos_weight": torch.rand(5)}]
    return options


@every_pair
def test_constructor_is_torchs(ours: Any, theirs: Any) -> None:
    own = inspect.signature(ours).parameters
    for (name, parameter), (their_name, their_parameter) in zip(
        own.items(), inspect.signature(theirs).parameters.items(), strict=False
    ):
        assert (name, parameter.default) == (their_name, their_parameter.default)
        assert parameter.kind == their_parameter.kind
    extra = list(own.values())[len(inspect.signature(theirs).parameters) :]
    assert all(parameter.kind is inspect.Parameter.KEYWORD_ONLY for parameter in extra)


@pytest.mark.parametrize(("ours", "theirs"), [(getattr(F, pair[2].__name__), pair[2]) for pair in PAIRS])
def test_functional_signature_is_torchs(ours: Any, theirs: Any) -> None:
    own = inspect.signature(ours).parameters
    torchs = inspect.signature(theirs).parameters
    assert list(own)[: len(torchs)] == list(torchs)
    assert all(own[name].default == parameter.default for name, parameter in torchs.items())
    assert all(own[name].kind is inspect.Parameter.KEYWORD_ONLY for name in list(own)[len(torchs) :])


@every_pair
def test_results_and_gradients(ours: Any, theirs: Any) -> None:
    for options in options_of(theirs):
        data, target = batch(theirs)
        results = []
        for criterion in (ours(**options), theirs(**options)):
            leaf = data.clone().requires_grad_()
            loss = criterion(leaf, target)
            results.append((loss.detach(), *torch.autograd.grad(loss.sum(), leaf)))
        torch.testing.assert_close(*results)


@every_pair
def test_is_a_torch_criterion(ours: Any, theirs: Any) -> None:
    for options in options_of(theirs):
        mine, torchs = ours(**options), theirs(**options)
        assert isinstance(mine, theirs)
        assert repr(mine) == repr(torchs)
        assert mine.state_dict().keys() == torchs.state_dict().keys()
        for key, value in torchs.__dict__.items():
            if key not in ("_buffers", "training"):
                assert mine.__dict__[key] == value or key.startswith("_"), key


@every_pair
def test_state_dict_goes_both_ways(ours: Any, theirs: Any) -> None:
    mine, torchs = ours(weight=torch.rand(5)), theirs(weight=torch.rand(5))
    data, target = batch(theirs)
    torchs.load_state_dict(mine.state_dict())
    torch.testing.assert_close(mine(data, target), torchs(data, target))
    other = theirs(weight=torch.rand(5))
    mine.load_state_dict(other.state_dict())
    torch.testing.assert_close(mine(data, target), other(data, target))


def every_module() -> list[tuple[nn.Module, Any]]:
    return [
        *((ours(weight=torch.rand(5)), theirs) for ours, theirs, _ in PAIRS),
        (fused_losses.CrossEntropyLoss(inplace_backward=True), nn.CrossEntropyLoss),
        (fused_losses.SigmoidFocalLoss(0.3, 1.5, "sum"), nn.BCEWithLogitsLoss),
        (fused_losses.SoftmaxFocalLoss(1.5, torch.rand(5), 3, "sum"), nn.CrossEntropyLoss),
        (fused_losses.SoftmaxFocalLoss(alpha=0.3), nn.CrossEntropyLoss),
        (
            fused_losses.FocalLoss(nn.BCEWithLogitsLoss(pos_weight=torch.rand(5)), 1.5, 0.4),
            nn.BCEWithLogitsLoss,
        ),
    ]


@pytest.mark.parametrize("index", range(8))
def test_copies(index: int) -> None:
    module, like = every_module()[index]
    data, target = batch(like)
    expected = module(data, target)
    saved = io.BytesIO()
    torch.save(module, saved)
    saved.seek(0)
    copies = [
        copy.deepcopy(module),
        copy.copy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(saved, weights_only=False),
    ]
    for other in copies:
        assert type(other) is type(module)
        assert repr(other) == repr(module)
        assert torch.equal(other(data, target), expected)


@pytest.mark.parametrize("index", range(8))
def test_buffers_move_with_the_module(index: int) -> None:
    module, like = every_module()[index]
    data, target = batch(like)
    target = target.double() if target.is_floating_point() else target
    assert module.double()(data.double(), target).dtype == torch.float64


def test_focal_modules() -> None:
    data, soft, index = torch.randn(6, 5), torch.rand(6, 5), torch.tensor([0, 1, 2, 3, 4, 1])
    torch.testing.assert_close(
        fused_losses.SigmoidFocalLoss()(data, soft), plain.sigmoid_focal_loss(data, soft, reduction="mean")
    )
    torch.testing.assert_close(
        fused_losses.SigmoidFocalLoss(alpha=-1, gamma=1.0, reduction="sum")(data, soft),
        plain.sigmoid_focal_loss(data, soft, -1, 1.0, "sum"),
    )
    alpha = torch.rand(5)
    torch.testing.assert_close(
        fused_losses.SoftmaxFocalLoss(1.0, alpha, 1, "sum")(data, index),
        plain.softmax_focal_loss(data, index, 1.0, alpha, 1, "sum"),
    )
    assert "alpha" in fused_losses.SoftmaxFocalLoss(alpha=alpha).state_dict()
    assert not fused_losses.SoftmaxFocalLoss().state_dict()
    assert "gamma=1.5" in repr(fused_losses.SigmoidFocalLoss(gamma=1.5))
    assert "gamma=1.5" in repr(fused_losses.SoftmaxFocalLoss(gamma=1.5))


@pytest.mark.parametrize("size_average", [None, True, False])
@pytest.mark.parametrize("reduce", [None, True, False])
@every_pair
def test_legacy_reduction(ours: Any, theirs: Any, reduce: bool | None, size_average: bool | None) -> None:
    data, target = batch(theirs)
    functional = {pair[1]: pair[2] for pair in PAIRS}[theirs]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        keywords = {"size_average": size_average, "reduce": reduce}
        expected = functional(data, target, **keywords)
        assert ours(**keywords).reduction == theirs(**keywords).reduction
        torch.testing.assert_close(ours(**keywords)(data, target), expected)
        torch.testing.assert_close(getattr(F, functional.__name__)(data, target, **keywords), expected)


@every_pair
def test_legacy_reduction_warns_as_torch(ours: Any, theirs: Any) -> None:
    with pytest.warns(UserWarning, match="size_average and reduce args will be deprecated"):
        ours(size_average=False)


@every_pair
def test_positional_arguments(ours: Any, theirs: Any) -> None:
    data, target = batch(theirs)
    functional = {pair[1]: pair[2] for pair in PAIRS}[theirs]
    weight = torch.rand(5)
    torch.testing.assert_close(
        getattr(F, functional.__name__)(data, target, weight), functional(data, target, weight)
    )
    torch.testing.assert_close(ours(weight)(data, target), theirs(weight)(data, target))


def test_in_place_backward_reaches_the_kernel() -> None:
    for module, target in (
        (fused_losses.CrossEntropyLoss(inplace_backward=True), torch.tensor([0, 1])),
        (fused_losses.BCEWithLogitsLoss(inplace_backward=True), torch.rand(2, 5)),
    ):
        logits = torch.randn(2, 5, requires_grad=True) * 2
        before = logits.detach().clone()
        module(logits, target).backward()
        assert not torch.equal(logits.detach(), before)


def test_public_names() -> None:
    names = {
        "CrossEntropyLoss",
        "BCEWithLogitsLoss",
        "BCELoss",
        "SigmoidFocalLoss",
        "SoftmaxFocalLoss",
        "FocalLoss",
    }
    assert names <= set(dir(fused_losses))
    for name in names:
        assert getattr(fused_losses, name).__doc__
