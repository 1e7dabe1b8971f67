"""patch_torch: every way of holding torch's functions leads to ours, and back."""

from __future__ import annotations

import functools
import inspect
import subprocess
import sys
import textwrap
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as torch_functional
from cases import autocast
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy, binary_cross_entropy_with_logits, cross_entropy
from torch.overrides import TorchFunctionMode

from fused_losses import patch_torch

FUNCTIONS = [cross_entropy, binary_cross_entropy, binary_cross_entropy_with_logits]
every_function = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)


def batch(function: Any) -> tuple[Tensor, Tensor]:
    if function is cross_entropy:
        return torch.randn(6, 5, requires_grad=True), torch.tensor([0, 4, 2, 1, 3, 3])
    data = torch.randn(6, 5)
    return (data.sigmoid() if function is binary_cross_entropy else data).requires_grad_(), torch.rand(6, 5)


def is_fused(loss: Tensor) -> bool:
    return type(loss.grad_fn).__name__ in ("StoredBackward", "RecomputedBackward")


def state(function: Any) -> tuple[Any, ...]:
    return (
        function.__code__,
        function.__defaults__,
        function.__kwdefaults__,
        function.__closure__,
        dict(vars(function)),
        inspect.signature(function),
    )


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    def names() -> dict[str, Any]:
        return {
            name: value for name, value in vars(torch_functional).items() if name != "__warningregistry__"
        }

    before = [state(function) for function in FUNCTIONS], names()
    yield
    assert ([state(function) for function in FUNCTIONS], names()) == before


@every_function
def test_by_name_by_module_in_a_local_and_in_a_partial(function: Any) -> None:
    input, target = batch(function)
    local = function
    partial = functools.partial(function, reduction="sum")
    plain = function(input, target)
    assert not is_fused(plain)
    with patch_torch():
        for loss in (
            function(input, target),
            getattr(torch_functional, function.__name__)(input, target),
            local(input=input, target=target),
        ):
            assert is_fused(loss)
            torch.testing.assert_close(loss, plain)
        assert is_fused(partial(input, target))
        assert is_fused(partial(input, target, reduction="none"))
    assert not is_fused(partial(input, target))
    torch.testing.assert_close(
        torch.autograd.grad(loss, input)[0], torch.autograd.grad(plain, input)[0]
    )  # of the fused one, after the patch has ended


@every_function
def test_arguments_by_position_and_name(function: Any) -> None:
    input, target = batch(function)
    weight = torch.rand(5)
    calls: list[Callable[[], Tensor]] = [
        lambda: function(input, target, weight),
        lambda: function(input, target, weight=weight, reduction="none"),
        lambda: function(input, target, size_average=False),
        lambda: function(input, target, None, None, reduce=False),
    ]
    if function is cross_entropy:
        calls.append(lambda: function(input, target, weight, None, 2, None, "sum", 0.1))
    if function is binary_cross_entropy_with_logits:
        calls.append(lambda: function(input, target, None, None, None, "sum", weight))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for call in calls:
            with patch_torch():
                fused = call()
            assert is_fused(fused)
            torch.testing.assert_close(fused, call())


@pytest.mark.parametrize("criterion", [nn.CrossEntropyLoss, nn.BCELoss, nn.BCEWithLogitsLoss])
def test_criterion_classes_of_torch(criterion: Any) -> None:
    function = {
        nn.CrossEntropyLoss: cross_entropy,
        nn.BCELoss: binary_cross_entropy,
        nn.BCEWithLogitsLoss: binary_cross_entropy_with_logits,
    }[criterion]
    input, target = batch(function)
    before = criterion()
    with patch_torch():
        assert is_fused(before(input, target))
        assert is_fused(criterion(weight=torch.rand(5))(input, target))  # built in every forward
    assert not is_fused(before(input, target))


@every_function
def test_nothing_else_changes(function: Any) -> None:
    others = {
        name: value.__code__
        for name, value in vars(torch_functional).items()
        if inspect.isfunction(value) and value not in FUNCTIONS
    }
    outside = state(function)
    source = inspect.getsource(function)
    with patch_torch():
        assert state(function)[1:] == outside[1:]  # all but the code
        assert inspect.getsource(function) == source
        assert all(getattr(torch_functional, name).__code__ is code for name, code in others.items())


def test_nesting() -> None:
    input, target = batch(cross_entropy)
    outer, inner = patch_torch(), patch_torch()
    with outer:
        with inner, outer:
            assert is_fused(cross_entropy(input, target))
        assert is_fused(cross_entropy(input, target))
        inner.enable()
    assert is_fused(cross_entropy(input, target))
    inner.disable()
    assert not is_fused(cross_entropy(input, target))


def test_switch() -> None:
    input, target = batch(cross_entropy)
    patch = patch_torch()
    patch.disable()  # never enabled: nothing to end
    assert patch.enable() is patch
    patch.enable()
    assert is_fused(cross_entropy(input, target))
    patch.disable()
    assert not is_fused(cross_entropy(input, target))
    patch.disable()
    with patch_torch():
        patch.disable()
        assert is_fused(cross_entropy(input, target))


def test_decorator() -> None:
    input, target = batch(cross_entropy)

    @patch_torch()
    def loss(depth: int) -> Tensor:
        return cross_entropy(input, target) if depth == 0 else loss(depth - 1)

    assert is_fused(loss(0))
    assert is_fused(loss(3))
    assert not is_fused(cross_entropy(input, target))


def test_a_decorated_function_that_runs_later_is_refused() -> None:
    def generator() -> Iterator[int]:
        yield 1

    async def coroutine() -> None: ...

    for function in (generator, coroutine, nn.Linear):
        with pytest.raises(TypeError, match=r"(generator|coroutine|Linear)(.|\n)*with patch_torch"):
            patch_torch()(function)


def test_a_patch_that_fails_half_way_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before = [state(function) for function in FUNCTIONS]
    monkeypatch.setattr(torch_functional, "binary_cross_entropy", lambda *args: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="leaves"):
            patch_torch().enable()
    assert [state(function) for function in FUNCTIONS] == before
    with pytest.warns(UserWarning, match="leaves") as caught, patch_torch():
        assert state(cross_entropy) != before[0]
    assert caught[0].filename == __file__
    assert [state(function) for function in FUNCTIONS] == before


def test_ends_with_an_exception() -> None:
    input, target = batch(cross_entropy)
    with pytest.raises(ValueError, match="target"), patch_torch():
        cross_entropy(input, target[:1])
    with pytest.raises(RuntimeError, match="mine"), patch_torch(), patch_torch():
        raise RuntimeError("mine")
    assert not is_fused(cross_entropy(input, target))


def test_threads() -> None:
    input, target = (tensor.detach() for tensor in batch(cross_entropy))
    expected = cross_entropy(input, target)
    errors: list[BaseException] = []
    stop = threading.Event()

    def call() -> None:
        try:
            while not stop.is_set():
                torch.testing.assert_close(cross_entropy(input, target), expected)
        except BaseException as error:
            errors.append(error)

    def switch() -> None:
        try:
            for _ in range(300):
                with patch_torch():
                    logits = input.clone().requires_grad_()
                    assert is_fused(cross_entropy(logits, target))
        except BaseException as error:
            errors.append(error)

    callers = [threading.Thread(target=call) for _ in range(2)]
    switchers = [threading.Thread(target=switch) for _ in range(4)]
    for thread in callers + switchers:
        thread.start()
    for thread in switchers:
        thread.join()
    stop.set()
    for thread in callers:
        thread.join()
    assert not errors


@every_function
def test_fallbacks_do_not_come_back(function: Any) -> None:
    """What ours pass on to torch's functions must reach torch's."""
    input, target = batch(function)
    with patch_torch():
        assert function(input.detach().to("meta"), target.to("meta")).is_meta
        with autocast():
            if function is not binary_cross_entropy:  # which torch refuses under autocast
                function(input.detach(), target)
        hessian = torch.func.hessian(lambda x: function(x, target))(input.detach())
        assert hessian.shape == (6, 5, 6, 5)
        # the second derivative of the fused loss, which is that of its meaning in plain torch
        (gradient,) = torch.autograd.grad(function(input, target), input, create_graph=True)
        second = torch.autograd.grad(gradient.sum(), input)[0]
    (gradient,) = torch.autograd.grad(function(input, target), input, create_graph=True)
    torch.testing.assert_close(second, torch.autograd.grad(gradient.sum(), input)[0])


@every_function
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_torch_compile(function: Any, backend: str) -> None:
    torch._dynamo.reset()
    input, target = batch(function)

    def loss(x: Tensor) -> Tensor:
        return 2 * function(x**3 if function is binary_cross_entropy else 3 * x, target)

    expected = (loss(input), torch.autograd.grad(loss(input), input)[0])
    compiled = torch.compile(loss, backend=backend, fullgraph=True)
    for patched in (True, False, True):
        if patched:
            with patch_torch():
                value = compiled(input)
        else:
            value = compiled(input)
        torch.testing.assert_close((value, torch.autograd.grad(value, input)[0]), expected)
    torch._dynamo.reset()
    with patch_torch():  # inside what is compiled
        criterion = torch.compile(
            lambda x, t: function(x, t, reduction="none").sum(), backend=backend, fullgraph=True
        )
        torch.testing.assert_close(criterion(input, target), function(input, target, reduction="sum"))
    torch._dynamo.reset()


class Doubled(Tensor):
    """A subclass that has an own idea of cross entropy."""

    seen: list[Any] = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(func)
        result = super().__torch_function__(func, types, args, kwargs or {})
        return 2 * result if func in FUNCTIONS else result


@every_function
def test_tensor_subclasses_see_torchs_function(function: Any) -> None:
    input, target = (tensor.detach() for tensor in batch(function))
    expected = 2 * function(input, target)
    Doubled.seen.clear()
    with patch_torch():
        result = function(input.as_subclass(Doubled), target)
    assert type(result) is Doubled
    assert function in Doubled.seen  # not a function of ours, nor a copy
    torch.testing.assert_close(result.as_subclass(Tensor), expected)


@every_function
def test_modes_see_torchs_function(function: Any) -> None:
    seen = []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    input, target = batch(function)
    with patch_torch(), Mode():
        loss = function(input, target)
    assert function in seen
    assert is_fused(loss)


class Duck:
    """No tensor, but it takes part in torch's protocol."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func


@every_function
def test_other_classes_with_torch_function(function: Any) -> None:
    _, target = batch(function)
    assert function(Duck(), target) is function
    with patch_torch():
        assert function(Duck(), target) is function


def test_symbolic_trace() -> None:
    with patch_torch():
        traced = torch.fx.symbolic_trace(lambda x, t: cross_entropy(x, t, reduction="sum"))
        input, target = batch(cross_entropy)
        assert is_fused(traced(input, target))
    assert any(node.target is cross_entropy for node in traced.graph.nodes)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_torchscript() -> None:
    input, target = (tensor.detach() for tensor in batch(cross_entropy))
    expected = cross_entropy(input, target)
    with patch_torch():
        scripted = torch.jit.script(nn.CrossEntropyLoss())
        traced = torch.jit.trace(lambda x, t: cross_entropy(x, t), (input, target))
        torch.testing.assert_close(scripted(input, target), expected)
    torch.testing.assert_close(traced(input, target), expected)


def test_a_function_that_is_not_torchs_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
        return logits.sum()

    before = cross_entropy.__code__
    monkeypatch.setattr(torch_functional, "cross_entropy", cross_entropy)
    patch = patch_torch()
    with pytest.warns(UserWarning, match="cross_entropy"):
        patch.enable()
    try:
        assert torch_functional.cross_entropy(torch.ones(2), None) == 2
        assert is_fused(binary_cross_entropy(*batch(binary_cross_entropy)))
    finally:
        patch.disable()
    assert cross_entropy.__code__ is before
    monkeypatch.undo()


def test_who_exchanges_the_code_meanwhile_keeps_it() -> None:
    def other(input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing):  # type: ignore[no-untyped-def]
        return input

    original = cross_entropy.__code__
    try:
        with patch_torch():
            cross_entropy.__code__ = other.__code__
        assert cross_entropy.__code__ is other.__code__
    finally:
        cross_entropy.__code__ = original


TORCHVISION = '''
def sigmoid_focal_loss(inputs, targets, alpha=0.25, gamma=2, reduction="none"):
    """As torchvision's."""
    p = torch.sigmoid(inputs)
    ce = torch.nn.functional.binary_cross_entropy_with_logits(inputs, targets, reduction="none")
    p_t = p * targets + (1 - p) * (1 - targets)
    loss = ce * ((1 - p_t) ** gamma)
    if alpha >= 0:
        loss = (alpha * targets + (1 - alpha) * (1 - targets)) * loss
    if reduction == "mean":
        return loss.mean()
    return loss.sum() if reduction == "sum" else loss
'''


def test_torchvision(tmp_path: Any) -> None:
    """In a process that has a torchvision: the stand-in's module has the name of the real one."""
    package = tmp_path / "torchvision" / "ops"
    package.mkdir(parents=True)
    (tmp_path / "torchvision" / "__init__.py").touch()
    (package / "__init__.py").write_text("from .focal_loss import sigmoid_focal_loss\n")
    (package / "focal_loss.py").write_text("import torch\n" + TORCHVISION)
    program = """
        import torch
        from fused_losses import patch_torch
        from torchvision.ops import sigmoid_focal_loss as focal

        x = torch.randn(6, 5, requires_grad=True)
        t = torch.rand(6, 5).round()
        fused = lambda loss: type(loss.grad_fn).__name__ in ("StoredBackward", "RecomputedBackward")
        before = focal.__code__
        for options in ({}, {"reduction": "mean"}, {"alpha": -1, "gamma": 1.5, "reduction": "sum"}):
            expected = focal(x, t, **options)
            with patch_torch():
                loss = focal(x, t, **options)
                compiled = torch.compile(focal, backend="aot_eager")(x, t, **options)
            assert fused(loss) and not fused(focal(x, t, **options))
            torch.testing.assert_close(loss, expected)
            torch.testing.assert_close(compiled, expected)
            grads = [torch.autograd.grad(l.sum(), x)[0] for l in (loss, expected, compiled)]
            torch.testing.assert_close(grads[0], grads[1])
            torch.testing.assert_close(grads[2], grads[1])
        for args in ((x, t.double()), (x, t, 0.25, 2, "avg"), (x, t, 2.0), (x, t, 0.25, torch.tensor(2.0)),
                     (x.to("meta"), t.to("meta"))):
            expected = focal(*args)
            with patch_torch():
                loss = focal(*args)
            assert not fused(loss) and loss.dtype == expected.dtype and loss.shape == expected.shape
            if not loss.is_meta:
                torch.testing.assert_close(loss, expected)
        assert focal.__code__ is before
        print("done")
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env={"PYTHONPATH": f"{tmp_path}:{':'.join(sys.path)}", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert run.stdout == "done\n", run.stderr
