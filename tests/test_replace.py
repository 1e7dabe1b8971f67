"""replace_criterion: what it finds, what stays, what it leaves alone, and the way back."""

from __future__ import annotations

import copy
import functools
import gc
import io
import pickle
import types
import unittest.mock
import weakref
from collections import OrderedDict, deque, namedtuple
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as torch_functional
from third_party import yolov5
from torch import Tensor, nn

import fused_losses
import fused_losses.functional as F
from fused_losses import replace_criterion

PAIRS = {
    nn.CrossEntropyLoss: fused_losses.CrossEntropyLoss,
    nn.BCEWithLogitsLoss: fused_losses.BCEWithLogitsLoss,
    nn.BCELoss: fused_losses.BCELoss,
}
every_pair = pytest.mark.parametrize(
    ("theirs", "ours"), PAIRS.items(), ids=lambda cls: cls.__module__.split(".")[0]
)


def batch(theirs: Any) -> tuple[Tensor, Tensor]:
    if theirs is nn.CrossEntropyLoss:
        return torch.randn(6, 5, requires_grad=True), torch.tensor([0, 1, 2, 3, 4, 1])
    data = torch.randn(6, 5)
    return (data.sigmoid() if theirs is nn.BCELoss else data).requires_grad_(), torch.rand(6, 5)


def is_fused(loss: Tensor) -> bool:
    return type(loss.grad_fn).__name__ in ("StoredBackward", "RecomputedBackward")


class Own(nn.CrossEntropyLoss):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return 2 * super().forward(input, target)


class Renamed(nn.CrossEntropyLoss):
    """A subclass that only chooses options."""

    def __init__(self) -> None:
        super().__init__(label_smoothing=0.1)
        self.note = "mine"


# A criterion


@every_pair
def test_a_bare_criterion(theirs: Any, ours: Any) -> None:
    input, target = batch(theirs)
    criterion = theirs(weight=torch.rand(5), reduction="sum")
    alias, weight, expected = criterion, criterion.weight, criterion(input, target)
    report = replace_criterion(criterion)
    assert type(alias) is ours
    assert alias.weight is weight
    loss = alias(input, target)
    assert is_fused(loss)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, input), torch.autograd.grad(expected, input))
    assert [(one.where, one.what) for one in report.replaced] == [("obj", f"torch.nn.{theirs.__name__}")]
    assert f"-> fused_losses.{ours.__name__}" in str(report)
    report.restore()
    assert type(criterion) is theirs
    assert not is_fused(criterion(input, target))


@every_pair
def test_hooks_buffers_and_state_survive(theirs: Any, ours: Any) -> None:
    criterion = theirs(weight=torch.rand(5))
    criterion.extra = ["kept"]
    calls: list[str] = []
    criterion.register_forward_pre_hook(lambda module, args: calls.append("before"))
    criterion.register_forward_hook(lambda module, args, output: calls.append("after"))
    criterion.eval()
    attributes, state, shown = dict(vars(criterion)), criterion.state_dict(), repr(criterion)
    reference = weakref.ref(criterion)
    replace_criterion(criterion)
    assert vars(criterion) == attributes
    assert criterion.state_dict().keys() == state.keys()
    assert criterion.state_dict()["weight"].data_ptr() == state["weight"].data_ptr()
    assert repr(criterion) == shown
    assert isinstance(criterion, theirs)
    assert reference() is criterion
    criterion(*batch(theirs))
    assert calls == ["before", "after"]
    theirs(weight=torch.rand(5)).load_state_dict(criterion.state_dict())
    assert criterion.double().weight.dtype == torch.float64


@every_pair
def test_copies_of_a_replaced_criterion(theirs: Any, ours: Any) -> None:
    input, target = batch(theirs)
    criterion = theirs(weight=torch.rand(5), reduction="none")
    replace_criterion(criterion)
    saved = io.BytesIO()
    torch.save(criterion, saved)
    saved.seek(0)
    for other in (
        copy.deepcopy(criterion),
        copy.copy(criterion),
        pickle.loads(pickle.dumps(criterion)),
        torch.load(saved, weights_only=False),
    ):
        assert type(other) is ours
        assert torch.equal(other(input, target), criterion(input, target))


def test_a_pickle_of_torchs_becomes_ours() -> None:
    criterion = pickle.loads(pickle.dumps(nn.CrossEntropyLoss(label_smoothing=0.1)))
    replace_criterion(criterion)
    assert is_fused(criterion(*batch(nn.CrossEntropyLoss)))


def test_a_subclass_without_a_forward_of_its_own() -> None:
    input, target = batch(nn.CrossEntropyLoss)
    criterion = Renamed()
    expected, shown = criterion(input, target), repr(criterion)
    report = replace_criterion(criterion)
    assert isinstance(criterion, Renamed)
    assert isinstance(criterion, fused_losses.CrossEntropyLoss)
    assert (repr(criterion), criterion.note) == (shown, "mine")
    for other in (criterion, copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert type(other) is type(criterion)
        assert is_fused(other(input, target))
        torch.testing.assert_close(other(input, target), expected)
    assert not replace_criterion(criterion)
    report.restore()
    assert type(criterion) is Renamed


@pytest.mark.parametrize("name", ["class_dim", "inplace_backward"])
def test_an_attribute_that_ours_would_take_for_its_own(name: str) -> None:
    class Theirs(nn.BCEWithLogitsLoss):
        pass

    criterion = Theirs()
    setattr(criterion, name, 1)
    report = replace_criterion([criterion])
    assert type(criterion) is Theirs
    assert name in report.left_alone[0].then


class Reduced(nn.CrossEntropyLoss):
    def __init__(self, note: str) -> None:
        super().__init__()
        self.note = note

    def __reduce__(self) -> Any:
        return type(self), (self.note,)


def test_a_subclass_that_says_how_to_copy_it() -> None:
    criterion = Reduced("mine")
    replace_criterion(criterion)
    for again in (copy.deepcopy(criterion), copy.copy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert again.note == "mine"
        assert isinstance(again, Reduced)
        assert isinstance(again, fused_losses.CrossEntropyLoss)


def test_a_class_that_registers_what_derives_from_it() -> None:
    registry = {}

    class Registered(nn.CrossEntropyLoss):
        def __init_subclass__(cls) -> None:
            registry[cls.__name__] = cls

    class One(Registered):
        pass

    criterion = One()
    replace_criterion(criterion)
    assert isinstance(criterion, fused_losses.CrossEntropyLoss)
    assert registry == {"One": One}


def test_a_function_kept_as_a_static_method() -> None:
    class Head:
        loss = staticmethod(torch_functional.cross_entropy)

    report = replace_criterion(Head())
    assert Head.loss is F.cross_entropy
    assert Head().loss is F.cross_entropy
    report.restore()
    assert Head.loss is Head().loss is torch_functional.cross_entropy


def test_a_holder_that_does_not_let_go_is_left_alone_and_named() -> None:
    class ReadOnly(dict):
        def __setitem__(self, key: Any, value: Any) -> None:
            raise TypeError("read-only")

    held = ReadOnly(function=torch_functional.cross_entropy)
    report = replace_criterion([nn.CrossEntropyLoss(), held, nn.BCELoss()])
    assert [one.where for one in report.replaced] == ["obj[0]", "obj[2]"]
    assert [one.then for one in report.left_alone] == ["its holder does not let it go: read-only"]
    assert held["function"] is torch_functional.cross_entropy
    report.restore()


def test_a_forward_of_its_own_is_left_alone_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class OwnCall(nn.CrossEntropyLoss):
        def __call__(self, input: Tensor, target: Tensor) -> Tensor:
            return 3 * super().__call__(input, target)

    patched = nn.CrossEntropyLoss()
    patched.forward = lambda input, target: input.sum()
    fused = fused_losses.CrossEntropyLoss()
    fused.__class__ = type("Mine", (fused_losses.CrossEntropyLoss,), {"forward": Own.forward})
    holder = {
        "own": Own(),
        "call": OwnCall(),
        "patched": patched,
        "fused": fused,
        "good": nn.CrossEntropyLoss(),
    }
    classes = {name: type(one) for name, one in holder.items()}
    report = replace_criterion(holder)
    assert type(holder.pop("good")) is fused_losses.CrossEntropyLoss
    assert {name: type(one) for name, one in holder.items()} == {name: classes[name] for name in holder}
    assert {one.where for one in report.left_alone} == {f"obj[{name!r}]" for name in holder}
    assert "left alone: its forward is its own" in str(report)
    assert "test_replace.Own" in str(report)

    monkeypatch.setattr(nn.BCELoss, "forward", lambda self, input, target: input.sum())
    criterion = nn.BCELoss()
    assert not replace_criterion(criterion)
    assert type(criterion) is nn.BCELoss


# Where it looks


class Pair(NamedTuple):
    loss: Any
    scale: float


@dataclass(frozen=True)
class Frozen:
    loss: Any
    scale: float = 1.0


@dataclass
class Config:
    losses: list[Any] = field(default_factory=list)


class Slots:
    __slots__ = ("__private", "empty", "loss")

    def __init__(self, loss: Any) -> None:
        self.loss = loss
        self.__private = loss


class Slotted(Slots):
    pass


class Plain:
    def __init__(self, loss: Any) -> None:
        self.loss = loss

    def step(self, input: Tensor, target: Tensor) -> Tensor:
        return self.loss(input, target)


class Head(nn.Module):
    def __init__(self, loss: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.loss = loss


def closure(loss: Any) -> Any:
    def step(input: Tensor, target: Tensor) -> Tensor:
        return loss(input, target)

    return step


def default(loss: Any) -> Any:
    def step(input: Tensor, target: Tensor, loss: Any = loss, *, other: Any = loss) -> Tensor:
        return loss(input, target)

    return step


def attribute(loss: Any) -> Any:
    def step(input: Tensor, target: Tensor) -> Tensor:
        return step.loss(input, target)  # type: ignore[attr-defined]

    step.loss = loss  # type: ignore[attr-defined]
    return step


def wrapped(loss: Any) -> Any:
    return functools.wraps(closure(loss))(lambda: None)


def a_class_attribute(loss: Any) -> Any:
    return type("Trainer", (), {"loss": loss, "method": lambda self: None, "__module__": __name__})()


def a_cycle(loss: Any) -> Any:
    holder: dict[str, Any] = {"loss": loss}
    holder["me"] = [holder]
    return holder


HOLDERS = {
    "module": Head,
    "nested modules": lambda loss: nn.Sequential(nn.Linear(2, 2), Head(nn.ModuleDict({"a": Head(loss)}))),
    "module's list": lambda loss: Head([loss]),
    "data parallel": lambda loss: nn.DataParallel(Head(loss)),
    "attribute": Plain,
    "slot": Slots,
    "slots and dict": Slotted,
    "class attribute": a_class_attribute,
    "list": lambda loss: [1, [loss]],
    "tuple": lambda loss: (1, (loss, 2)),
    "named tuple": lambda loss: Pair(loss, 2.0),
    "set": lambda loss: {loss},
    "deque": lambda loss: deque([loss]),
    "dict": lambda loss: {"a": {3: loss}},
    "ordered dict": lambda loss: OrderedDict(a=loss),
    "dataclass": lambda loss: Config([loss]),
    "frozen dataclass": lambda loss: Frozen(loss),
    "namespace": lambda loss: types.SimpleNamespace(loss=loss),
    "partial": lambda loss: functools.partial(loss),
    "partial's argument": lambda loss: functools.partial(print, loss),
    "partial's keyword": lambda loss: functools.partial(print, loss=loss),
    "bound method": lambda loss: Plain(loss).step,
    "closure": closure,
    "closure of a closure": lambda loss: closure(closure(loss)),
    "default": default,
    "function attribute": attribute,
    "wrapped": wrapped,
    "cycle": a_cycle,
}
every_holder = pytest.mark.parametrize("kind", HOLDERS)


@every_holder
def test_every_place_a_criterion_is_held(kind: str) -> None:
    criterion = nn.CrossEntropyLoss()
    holder = HOLDERS[kind](criterion)
    before = pickle.dumps(holder) if kind in ("module", "dict", "list", "frozen dataclass") else None

    report = replace_criterion(holder, dry_run=True)
    assert len(report.replaced) == 1
    assert "would replace 1" in str(report)
    assert type(criterion) is nn.CrossEntropyLoss
    report.restore()
    assert before is None or pickle.dumps(holder) == before

    report = replace_criterion(holder)
    assert type(criterion) is fused_losses.CrossEntropyLoss
    assert len(report.replaced) == 1
    assert not report.left_alone
    again = replace_criterion(holder)
    assert not again
    assert [one.where for one in again.fused_before] == [one.where for one in report.replaced]
    assert "replaced 0, 1 fused before" in str(again)
    again.restore()
    assert type(criterion) is fused_losses.CrossEntropyLoss
    report.restore()
    report.restore()
    assert type(criterion) is nn.CrossEntropyLoss
    assert before is None or pickle.dumps(holder) == before


FUNCTION_HOLDERS = {
    kind: make for kind, make in HOLDERS.items() if kind not in ("class attribute", "set", "nested modules")
}


def functions_in(holder: Any) -> list[Any]:
    """By the garbage collector, which knows nothing of replace_criterion."""
    known = [torch_functional.cross_entropy, F.cross_entropy]
    seen, pending, found = {}, [holder], []
    while pending:
        value = pending.pop()
        if id(value) in seen:
            continue
        seen[id(value)] = value
        if any(value is one for one in known):
            found.append(value)
        elif not isinstance(value, (types.ModuleType, type, types.CodeType)) and value is not globals():
            pending += [one for one in gc.get_referents(value) if one is not vars(torch_functional)]
    return found


@pytest.mark.parametrize("kind", FUNCTION_HOLDERS)
def test_every_place_a_function_is_held(kind: str) -> None:
    holder = HOLDERS[kind](torch_functional.cross_entropy)
    identity = id(holder)
    if kind in ("tuple", "named tuple"):  # what holds the tuple is told to hold another
        holder = [holder]
    report = replace_criterion(holder, dry_run=True)
    assert report
    assert set(functions_in(holder)) == {torch_functional.cross_entropy}
    report = replace_criterion(holder)
    assert set(functions_in(holder)) == {F.cross_entropy}
    again = replace_criterion(holder)
    assert not again
    assert again.fused_before
    report.restore()
    assert set(functions_in(holder)) == {torch_functional.cross_entropy}
    assert kind in ("tuple", "named tuple") or id(holder) == identity


def test_functions_of_each_name() -> None:
    names = ["cross_entropy", "binary_cross_entropy", "binary_cross_entropy_with_logits"]
    table = {name: getattr(torch_functional, name) for name in names}
    report = replace_criterion(table)
    assert table == {name: getattr(F, name) for name in names}
    assert "torch.nn.functional.binary_cross_entropy " in str(report)
    report.restore()
    assert table == {name: getattr(torch_functional, name) for name in names}


def test_tuples_are_rebuilt_only_where_a_function_is_held() -> None:
    Point = namedtuple("Point", "loss scale")
    with_function = Point(torch_functional.cross_entropy, (1, 2))
    without = Point(nn.CrossEntropyLoss(), (1, 2))
    nested = (without, [1], (with_function,))
    holder = {"a": with_function, "b": with_function, "c": without, "d": nested, "plain": (1, 2)}
    before = dict(holder)
    report = replace_criterion(holder)
    assert holder["c"] is without
    assert holder["plain"] is before["plain"]
    assert type(holder["a"]) is Point
    assert holder["a"].loss is F.cross_entropy
    assert holder["a"].scale is with_function.scale
    assert holder["a"] is holder["b"] is holder["d"][2][0]  # shared objects stay shared
    assert holder["d"][0] is without
    assert holder["d"][1] is nested[1]
    report.restore()
    assert all(holder[key] is before[key] for key in before)


def test_shared_objects_stay_shared() -> None:
    loss = nn.CrossEntropyLoss()
    partial = functools.partial(torch_functional.cross_entropy, reduction="sum")
    holder = {"a": loss, "b": [loss], "c": Plain(loss), "p": partial, "q": (partial,)}
    report = replace_criterion(holder)
    assert holder["a"] is holder["b"][0] is holder["c"].loss is loss
    assert holder["p"] is holder["q"][0] is partial
    assert (partial.func, partial.keywords) == (F.cross_entropy, {"reduction": "sum"})
    assert len(report.replaced) == 2
    report.restore()
    assert partial.func is torch_functional.cross_entropy


def test_a_wrapped_criterion_and_its_wrapper() -> None:
    focal = yolov5.FocalLoss(nn.BCEWithLogitsLoss())
    report = replace_criterion(Head(focal))
    assert [one.where for one in report.replaced] == ["obj.loss", "obj.loss.loss_fcn"]
    report.restore()
    assert type(focal) is yolov5.FocalLoss
    assert type(focal.loss_fcn) is nn.BCEWithLogitsLoss
    unknown = type("Mine", (yolov5.QFocalLoss,), {})(nn.BCEWithLogitsLoss())
    x, t = torch.randn(6, 5, requires_grad=True), torch.rand(6, 5)
    expected = unknown(x, t)
    replace_criterion(unknown)
    assert type(unknown.loss_fcn) is fused_losses.BCEWithLogitsLoss
    torch.testing.assert_close(unknown(x, t), expected)
    torch.testing.assert_close(
        torch.autograd.grad(unknown(x, t), x), torch.autograd.grad(expected, x), rtol=1e-5, atol=1e-7
    )


# Where it does not look


class Proxy:
    """Pretends to be a module, as mocks and lazy objects do."""

    def __init__(self) -> None:
        self.loss = nn.CrossEntropyLoss()

    @property
    def __class__(self) -> Any:
        return nn.Module


class Watched(dict[str, Any]):
    def items(self) -> Any:
        raise AssertionError("would load from a disk")


class Touchy:
    """Has properties and a __getattr__ that must not be called."""

    def __init__(self) -> None:
        self.loss = nn.CrossEntropyLoss()

    @property
    def expensive(self) -> Any:
        raise AssertionError("a property was read")

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"{name} was asked for")

    def __eq__(self, other: object) -> bool:
        raise AssertionError("compared")

    __hash__ = None  # type: ignore[assignment]


def test_nothing_is_called_on_the_way() -> None:
    touchy, proxy, watched = Touchy(), Proxy(), Watched(loss=nn.CrossEntropyLoss())
    mock = unittest.mock.MagicMock(spec=nn.Module)
    assert replace_criterion([touchy, proxy, watched, mock])
    assert type(touchy.loss) is type(proxy.loss) is type(watched["loss"]) is fused_losses.CrossEntropyLoss


class Images(torch.utils.data.Dataset[Any]):
    def __init__(self, loss: Any) -> None:
        self.loss = loss


def test_not_searched() -> None:
    loss = nn.CrossEntropyLoss()
    module = types.ModuleType("a_module")
    module.loss = loss  # type: ignore[attr-defined]
    tensor = torch.zeros(3)
    tensor.loss = loss  # type: ignore[attr-defined]
    for holder in (
        module,
        tensor,
        Images(loss),
        [*range(10_001), loss],
        torch.utils.data.DataLoader(Images(loss)),
    ):
        with pytest.warns(UserWarning, match="no criterion"):
            assert not replace_criterion([holder])
    assert type(loss) is nn.CrossEntropyLoss


@pytest.mark.parametrize("obj", [None, 3, "loss", [], {}, nn.Linear(2, 2), object(), Plain(None), print, len])
def test_finding_nothing_is_said_loudly(obj: Any) -> None:
    with pytest.warns(UserWarning, match=r"found no criterion.*patch_torch"):
        report = replace_criterion(obj)
    assert not report
    assert "no criterion" in str(report)
    report.restore()


def test_what_cannot_be_exchanged_is_named() -> None:
    report = replace_criterion(torch_functional.cross_entropy)
    assert not report
    assert "patch_torch() reaches it" in str(report)
    report = replace_criterion({"cls": nn.CrossEntropyLoss})
    assert "torch.nn.CrossEntropyLoss" in str(report)
    assert "patch_torch() reaches the criteria it builds" in str(report)


def test_a_long_chain_does_not_overflow_the_stack() -> None:
    links: list[list[Any]] = [[nn.CrossEntropyLoss()]]
    for _ in range(5_000):
        links.append([links[-1]])
    assert replace_criterion(links.pop())


def test_what_was_compiled_before_notices() -> None:
    torch._dynamo.reset()
    input, target = batch(nn.CrossEntropyLoss)
    criterion = nn.CrossEntropyLoss()
    compiled = torch.compile(lambda x: 2 * criterion(x, target), backend="aot_eager")
    expected = compiled(input)
    report = replace_criterion(criterion)
    for _ in range(2):
        torch.testing.assert_close(compiled(input), expected)
        torch.testing.assert_close(
            torch.autograd.grad(compiled(input), input),
            torch.autograd.grad(2 * criterion(input, target), input),
        )
        report.restore()
    torch._dynamo.reset()


def test_a_training_program() -> None:
    """Two trainers from one seed, one with its criterion replaced: the same weights."""

    class Trainer:
        def __init__(self) -> None:
            torch.manual_seed(0)
            self.model = nn.Linear(8, 4)
            self.criteria = {"ce": nn.CrossEntropyLoss(label_smoothing=0.1), "bce": nn.BCEWithLogitsLoss()}
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)

        def fit(self) -> Tensor:
            for _ in range(20):
                x, y = torch.randn(16, 8), torch.randint(4, (16,))
                logits = self.model(x)
                loss = self.criteria["ce"](logits, y)
                loss += 0.5 * self.criteria["bce"](logits, nn.functional.one_hot(y, 4).float())
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
            return self.model.weight.detach()

    expected = Trainer().fit()
    trainer = Trainer()
    assert len(replace_criterion(trainer).replaced) == 2
    torch.testing.assert_close(trainer.fit(), expected)
