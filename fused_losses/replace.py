"""`replace_criterion`: swaps the criteria that an object holds for ours, in place."""

from __future__ import annotations

import argparse
import copy
import functools
import inspect
import sys
import types
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from . import functional
from .adapters import ADAPTERS, Adapter
from .bce import BCELoss, BCEWithLogitsLoss
from .cross_entropy import CrossEntropyLoss

Put = Callable[[Any], object]  # puts another object where a holder has this one
Ours = type[nn.Module] | Callable[..., Any]  # a class of ours, or the function of an adapter

_OURS: dict[type[nn.Module], type[nn.Module]] = {
    nn.CrossEntropyLoss: CrossEntropyLoss,
    nn.BCEWithLogitsLoss: BCEWithLogitsLoss,
    nn.BCELoss: BCELoss,
}
_FORWARDS = {theirs: theirs.forward for theirs in _OURS}
_CALL = nn.Module.__call__
_FUSED_BEFORE = "fused before"


@dataclass(frozen=True)
class Found:
    where: str  # "obj.heads[0].loss"
    what: str  # "torch.nn.CrossEntropyLoss"
    then: str  # what it is now, or why it is left alone


@dataclass
class Report:
    """What `replace_criterion` found. `restore()` undoes it; `print` shows it."""

    replaced: list[Found] = field(default_factory=list)
    left_alone: list[Found] = field(default_factory=list)
    fused_before: list[Found] = field(default_factory=list)
    dry_run: bool = False
    _undo: list[Callable[[], object]] = field(default_factory=list, repr=False)

    def restore(self) -> None:
        """Puts everything back, in the reverse order. Another call changes nothing."""
        while self._undo:
            self._undo.pop()()

    def __bool__(self) -> bool:
        return bool(self.replaced)

    def __str__(self) -> str:
        found = self.replaced + self.left_alone + self.fused_before
        if not found:
            return "replace_criterion found no criterion"
        verb = "would replace" if self.dry_run else "replaced"
        counts = [f"{verb} {len(self.replaced)}"]
        counts += [f"left {len(self.left_alone)} alone"] if self.left_alone else []
        counts += [f"{len(self.fused_before)} fused before"] if self.fused_before else []
        where = max(len(one.where) for one in found)
        what = max(len(one.what) for one in found)
        lines = [
            f"  {one.where:{where}}  {one.what:{what}}  {arrow} {one.then}"
            for arrow, group in (
                ("->", self.replaced),
                ("left alone:", self.left_alone),
                ("is", self.fused_before),
            )
            for one in group
        ]
        return "\n".join([f"replace_criterion {', '.join(counts)}", *lines])


def replace_criterion(obj: Any, *, dry_run: bool = False) -> Report:
    """Swaps every criterion that `obj` holds for its fused equivalent, in place.

    ::

        report = replace_criterion(trainer)
        print(report)       # what, where, and why not
        report.restore()    # as it was

    A criterion of torch's becomes ours by its class: the object stays, with its buffers, hooks and everyone who holds
    it. Criteria of other libraries are recognised by class name and attributes (`fused_losses.adapters`), and swapped
    only if their results on a few numbers are those of the fused loss; `register_adapter` adds others. A reference to
    `torch.nn.functional.cross_entropy` and its like is exchanged where it is held. What has a forward of its own is
    left alone and named.

    Args:
        obj: a criterion, a module, or any object: its submodules, attributes, slots, lists, tuples, sets, dicts,
            dataclasses, partials, bound methods and the closures and defaults of functions are searched, cycles
            included. Not searched: tensors, datasets, Python modules, objects of torch's or the standard library's
            classes, and containers of more than 10 000 entries.
        dry_run: changes nothing; the report says what would be done.

    Returns:
        A `Report`. It is true if anything was replaced. A second call finds all fused and changes nothing.

    Warns:
        UserWarning: no criterion was found.
    """
    walk = _Walk(Report(dry_run=dry_run))
    walk.search(obj)
    report = walk.report
    if not (report.replaced or report.left_alone or report.fused_before):
        warnings.warn(
            f"replace_criterion found no criterion in this {_name(type(obj))}. One that is built in every forward, or a "
            "function that is called by its name, is reached by fused_losses.patch_torch()",
            stacklevel=2,
        )
    return report


class _Walk:
    def __init__(self, report: Report) -> None:
        self.report = report
        self.functions = _functions()
        self.ours = dict.fromkeys(self.functions.values())
        self.seen: dict[int, Any] = {}  # by id; holds the objects, so that no id comes twice
        self.tuples: dict[int, tuple[Any, Any]] = {}  # by id: a tuple, and the one that takes its place

    def search(self, root: Any) -> None:
        if _is_function_of(root, self.functions):
            self.leave("obj", root, "a function has no place to be exchanged in; patch_torch() reaches it")
        pending: deque[tuple[str, Any, Put | None]] = deque([("obj", root, None)])
        while pending:
            where, value, put = pending.popleft()
            if put is not None:
                value = self.exchange(where, value, put)
            if id(value) in self.seen:
                continue
            self.seen[id(value)] = value
            if issubclass(type(value), type) and value in _OURS:
                self.leave(where, value, "a class; patch_torch() reaches the criteria it builds")
            if not _is_searched(value):
                continue
            self.criterion(where, value)
            pending.extend((where + suffix, child, put) for suffix, child, put in _children(value))

    def exchange(self, where: str, value: Any, put: Put) -> Any:
        """Has our function held where torch's is, and another tuple where one holds torch's."""
        before = len(self.report.replaced)
        new = self.substitute(where, value)
        if new is value or self.report.dry_run:
            return value
        try:
            put(new)
        except Exception as error:  # read-only
            for one in self.report.replaced[before:]:
                why_not = f"its holder does not let it go: {error}"
                self.report.left_alone.append(Found(one.where, one.what, why_not))
            del self.report.replaced[before:]
            return value
        self.report._undo.append(functools.partial(put, value))
        return new

    def substitute(self, where: str, value: Any) -> Any:
        if _is_function_of(value, self.functions):
            ours = self.functions[value]
            self.report.replaced.append(Found(where, _name(value), _name(ours)))
            return ours
        if _is_function_of(value, self.ours):
            self.report.fused_before.append(Found(where, _name(value), _FUSED_BEFORE))
        if type(value) is tuple or (issubclass(type(value), tuple) and hasattr(value, "_make")):
            if id(value) not in self.tuples:
                items = [self.substitute(f"{where}[{i}]", item) for i, item in enumerate(value)]
                same = all(new is old for new, old in zip(items, value, strict=True))
                make = tuple if type(value) is tuple else value._make
                self.tuples[id(value)] = value, value if same else make(items)
            return self.tuples[id(value)][1]
        return value

    def criterion(self, where: str, value: Any) -> None:
        theirs = type(value)
        ours, why_not = _equivalent(value)
        if why_not == _FUSED_BEFORE:
            self.report.fused_before.append(Found(where, _name(theirs), why_not))
        elif why_not:
            self.leave(where, theirs, why_not)
        elif ours is not None:
            try:
                if not self.report.dry_run:
                    _set_class(value, _OURS.get(theirs) or derive(theirs, ours))  # type: ignore[arg-type]
                    self.report._undo.append(functools.partial(_set_class, value, theirs))
            except TypeError as error:  # a class of C, or with slots, or that no one may derive from
                self.leave(where, theirs, f"its class cannot be exchanged: {error}")
            else:
                self.report.replaced.append(Found(where, _name(theirs), _name(ours)))

    def leave(self, where: str, what: Any, why_not: str) -> None:
        self.report.left_alone.append(Found(where, _name(what), why_not))


def _equivalent(obj: Any) -> tuple[Ours | None, str]:
    """What computes the same as `obj`, or why nothing of ours takes its place. No criterion: neither."""
    cls = type(obj)
    if str(cls.__module__).partition(".")[0] == __package__ or "_fused_by" in vars(cls):
        return None, _FUSED_BEFORE if issubclass(cls, nn.Module) or "_fused_by" in vars(cls) else ""
    for theirs, ours in _OURS.items():
        if issubclass(cls, ours):
            return None, _FUSED_BEFORE if cls.forward is ours.forward else "its forward is its own"
        if issubclass(cls, theirs):
            if cls.forward is not _FORWARDS[theirs] or "forward" in vars(obj):
                return None, "its forward is its own"
            for name in inspect.get_annotations(ours):  # what our forward reads and torch's does not
                if hasattr(obj, name):
                    return None, f"its {name} is its own"
            return (ours, "") if cls.__call__ is _CALL else (None, "its __call__ is its own")
    why_not = ""
    for adapter in ADAPTERS:
        if cls.__name__ == adapter.class_name and all(hasattr(obj, name) for name in adapter.attributes):
            disagreement = _disagreement(obj, adapter)
            if not disagreement:
                return adapter.fused, ""
            why_not = why_not or disagreement
    return None, why_not


def _disagreement(obj: Any, adapter: Adapter) -> str:
    """Why the adapter's loss is not this criterion's; "" where value and gradient are the same."""
    if _method(type(obj)) in getattr(obj, "__dict__", ()):
        return "its forward is its own"
    if unknown := _unknown_attributes(obj, adapter):
        return f"{_name(adapter.fused)} does not know its {', '.join(unknown)}"
    original = getattr(type(obj), _method(type(obj)))
    for training in (True, False):  # some do one thing there and another here
        try:
            # A copy: some write to themselves, their alpha in the logits' dtype say.
            theirs = copy.copy(obj)
            if isinstance(theirs, nn.Module):
                theirs.training = training
            expected = _value_and_gradient(original, theirs, adapter.example(obj))
            fused = _value_and_gradient(adapter.fused, obj, adapter.example(obj))
            torch.testing.assert_close(fused, expected, **_TOLERANCE.get(expected[1].dtype, {}))
        except AssertionError:
            return f"its results are not those of {_name(adapter.fused)}"
        except Exception as error:
            return f"it could not be compared with {_name(adapter.fused)}: {error}"
    return ""


def _unknown_attributes(obj: Any, adapter: Adapter) -> list[str]:
    """What the original may read, and the adapter does not: an ignore_index or a reduction of its own."""
    if adapter.others is None:
        return []
    own = dict(getattr(obj, "__dict__", {}))
    if isinstance(obj, nn.Module):
        own |= obj._parameters | obj._buffers | obj._modules
    known = {"training", *adapter.attributes, *adapter.others}
    return sorted(name for name in own if not name.startswith("_") and name not in known)


# Tight enough to tell a (1 - p + 1e-6)^gamma from a (1 - p)^gamma.
_TOLERANCE: dict[torch.dtype, dict[str, Any]] = {
    torch.float64: {"rtol": 1e-7, "atol": 1e-10},
    torch.float32: {"rtol": 2e-5, "atol": 2e-7},
}


def _value_and_gradient(
    loss: Callable[..., Any], obj: Any, arguments: tuple[Any, ...]
) -> tuple[Tensor, Tensor]:
    logits = arguments[0].detach().clone().requires_grad_()
    with torch.enable_grad(), torch.autocast(logits.device.type, enabled=False):
        value = loss(obj, logits, *arguments[1:])
        if value is NotImplemented:
            raise ValueError("it does not serve this one")
        (gradient,) = torch.autograd.grad(value.sum(), logits)
    return value.detach(), gradient


def _method(theirs: type) -> str:
    """What an adapter takes the place of: forward, but for modules that override `__call__`, and other objects."""
    return "forward" if getattr(theirs, "__call__", None) is _CALL else "__call__"  # noqa: B004


@functools.cache
def derive(theirs: Any, ours: Any) -> type:
    """The class of a criterion of class `theirs` that computes what `ours` does.

    It has the name of `theirs` and is a subclass of it, so `isinstance` and `repr` stay. Objects of it are copied and
    pickled as an object of `theirs` and the knowledge what it became.
    """
    body: dict[str, Any] = {
        "__module__": theirs.__module__,
        "__qualname__": theirs.__qualname__,
        "__doc__": theirs.__doc__,
        "__reduce_ex__": _reduce,
        "_fused_by": (theirs, ours),
    }
    if isinstance(ours, type):
        return _new_class(theirs.__name__, (theirs, ours), body)
    original = getattr(theirs, _method(theirs))
    parameters = list(inspect.signature(ours).parameters)[1:]

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if len(args) + len(kwargs) > len(parameters) or not kwargs.keys() <= set(parameters[len(args) :]):
            return original(self, *args, **kwargs)  # with a parameter of its own
        result = ours(self, *args, **kwargs)
        return original(self, *args, **kwargs) if result is NotImplemented else result

    body[_method(theirs)] = forward
    return _new_class(theirs.__name__, (theirs,), body)


class _NoHook:
    """Before a class in the order of bases, so that its own `__init_subclass__`, which may register what derives from
    it, hears nothing of ours. It has a __dict__, as they do: else no object could change from one class to the other."""

    def __init_subclass__(cls) -> None:
        pass


def _new_class(name: str, bases: tuple[type, ...], body: dict[str, Any]) -> type:
    return types.new_class(name, (_NoHook, *bases), exec_body=lambda names: names.update(body))


def _reduce(self: Any, protocol: Any) -> Any:
    derived = type(self)
    reduced = super(derived, self).__reduce_ex__(max(int(protocol), 2))
    if isinstance(reduced, str):  # a global's name
        return reduced
    theirs = derived._fused_by[0]
    make, *arguments = (theirs if item is derived else item for item in (reduced[0], *reduced[1]))
    return (_make, (derived._fused_by, make, tuple(arguments)), *reduced[2:])


def _make(fused_by: tuple[type, Ours], make: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    made = make(*arguments)
    if type(made) is fused_by[0]:
        _set_class(made, derive(*fused_by))  # type: ignore[arg-type]
    return made


def _set_class(obj: Any, cls: type) -> None:
    object.__setattr__(obj, "__class__", cls)


def _functions() -> dict[Any, Callable[..., Tensor]]:
    """torch's functions, and ours."""
    torchs = torch.nn.functional
    pairs: dict[Any, Callable[..., Tensor]] = {
        torchs.cross_entropy: functional.cross_entropy,
        torchs.binary_cross_entropy: functional.binary_cross_entropy,
        torchs.binary_cross_entropy_with_logits: functional.binary_cross_entropy_with_logits,
    }
    vision = sys.modules.get("torchvision.ops.focal_loss")
    if vision is not None:
        pairs[vision.sigmoid_focal_loss] = functional.sigmoid_focal_loss
    return pairs


def _is_function_of(value: Any, functions: dict[Any, Any]) -> bool:
    return type(value) is types.FunctionType and value in functions


def _name(what: Any) -> str:
    module = str(what.__module__)
    if module.startswith("torch.nn.modules."):
        module = "torch.nn"
    elif module.partition(".")[0] == __package__ and not module.endswith("adapters"):
        module = __package__ if isinstance(what, type) else f"{__package__}.functional"
    return f"{module}.{what.__qualname__}"


# What is searched

_CONTAINERS = (list, tuple, dict, set, frozenset, deque)
_MAX_ENTRIES = 10_000
_NAMESPACES = (types.SimpleNamespace, argparse.Namespace)
_NOT_SEARCHED = frozenset({*sys.stdlib_module_names, "torch", "numpy", __package__})
_MODULE_INTERNALS = frozenset(vars(nn.Module()))


def _is_searched(value: Any) -> bool:
    cls = type(value)
    if issubclass(cls, (torch.jit.ScriptModule, torch.utils.data.Dataset, Tensor, type)):
        return False
    if issubclass(cls, (nn.Module, types.MethodType, functools.partial, *_NAMESPACES)):
        return True
    if issubclass(cls, _CONTAINERS):
        return len(value) <= _MAX_ENTRIES
    return _is_users(value if cls is types.FunctionType else cls)


def _is_users(what: Any) -> bool:
    """Whether a class or a function is neither torch's nor Python's."""
    return str(what.__module__).partition(".")[0] not in _NOT_SEARCHED


def _children(value: Any) -> Iterator[tuple[str, Any, Put | None]]:
    """What an object holds: how it is written behind the object's name, the thing, and how to exchange it."""
    cls = type(value)  # isinstance would ask a proxy, or a mock, what it pretends to be
    if issubclass(cls, dict):
        for key, child in list(dict.items(value)):
            yield f"[{key!r}]", child, functools.partial(value.__setitem__, key)
    elif issubclass(cls, (list, deque)):
        for i, child in enumerate(list(value)):
            yield f"[{i}]", child, functools.partial(value.__setitem__, i)
    elif issubclass(cls, (tuple, set, frozenset)):
        for i, child in enumerate(value):
            yield f"[{i}]", child, None
    elif issubclass(cls, functools.partial):
        yield from _children_of_partial(value)
    elif cls is types.MethodType:
        yield ".__self__", value.__self__, None
        yield "", value.__func__, None
    elif cls is types.FunctionType:
        yield from _children_of_function(value)
    elif issubclass(cls, nn.Module):
        for name, child in value._modules.items():
            yield f".{name}", child, None
    yield from _attributes(value)


def _children_of_partial(value: functools.partial[Any]) -> Iterator[tuple[str, Any, Put | None]]:
    def set_function(new: Any) -> None:
        value.__setstate__((new, value.args, value.keywords, vars(value)))  # type: ignore[attr-defined]

    def set_arguments(new: Any) -> None:
        value.__setstate__((value.func, new, value.keywords, vars(value)))  # type: ignore[attr-defined]

    yield ".func", value.func, set_function
    yield ".args", value.args, set_arguments
    yield ".keywords", value.keywords, None


def _children_of_function(value: types.FunctionType) -> Iterator[tuple[str, Any, Put | None]]:
    for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
        try:
            yield f".<{name}>", cell.cell_contents, functools.partial(setattr, cell, "cell_contents")
        except ValueError:  # empty
            continue
    yield ".__defaults__", value.__defaults__, functools.partial(setattr, value, "__defaults__")
    yield ".__kwdefaults__", value.__kwdefaults__, None


def _attributes(value: Any) -> Iterator[tuple[str, Any, Put | None]]:
    """Of the instance, in its dict or in slots, and those of its classes that are no methods."""
    try:
        own = object.__getattribute__(value, "__dict__")
    except AttributeError:
        own = {}
    internals = _MODULE_INTERNALS if issubclass(type(value), nn.Module) else frozenset()
    for name, child in list(own.items()):
        if name not in internals:
            yield f".{name}", child, functools.partial(own.__setitem__, name)
    for cls in type(value).__mro__:
        if not _is_users(cls):
            continue
        for name, child in list(vars(cls).items()):
            if isinstance(child, types.MemberDescriptorType):
                try:
                    yield f".{name}", child.__get__(value), functools.partial(child.__set__, value)
                except AttributeError:  # an empty slot
                    continue
            elif name in own or name.startswith("__"):
                continue
            elif isinstance(child, staticmethod) and not _is_users(child.__func__):
                yield f".{name}", child.__func__, functools.partial(_set_static, cls, name)
            elif not hasattr(type(child), "__get__"):
                yield f".{name}", child, functools.partial(setattr, cls, name)


def _set_static(cls: type, name: str, function: Any) -> None:
    setattr(cls, name, staticmethod(function))
