"""What only a GPU can show: determinism, graphs, streams, devices, launches, memory, device-side assertions.

Without one the same bodies run on the kernels' emulation (tests/cuda_on_cpu) as far as they go, so that they are
not broken when they meet their first GPU: a graph is then a call, a stream is none, a size is small.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from accuracy import draw
from cases import CASES, Case
from cuda_on_cpu import build
from cuda_on_cpu.emulated import emulated
from torch import Tensor

import fused_losses.functional as F
from fused_losses import IndexTarget, _ops

ROOT = Path(__file__).parents[1]
REAL = _ops.CUDA
DEVICE = "cuda" if REAL else "cpu"
RUNS = 20 if REAL else 2

needs_gpu = pytest.mark.skipif(not REAL, reason="no CUDA device, or built without CUDA")
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@pytest.fixture(scope="module", autouse=True)
def kernels() -> Iterator[None]:
    before = torch.get_default_device()
    torch.set_default_device(DEVICE)
    try:
        with nullcontext() if REAL else emulated(build.library(build.FOLDER)):
            yield
    finally:
        torch.set_default_device(before)


def synchronize() -> None:
    if REAL:
        torch.cuda.synchronize()


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """torch raises where it would make the host wait for the device."""
    synchronize()
    if REAL:
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if REAL:
            torch.cuda.set_sync_debug_mode("default")


def side_stream() -> AbstractContextManager[object]:
    if not REAL:
        return nullcontext()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    return torch.cuda.stream(stream)


def captured(step: Callable[[], None]) -> Callable[[], None]:
    """A CUDA graph of `step`, to be replayed."""
    if not REAL:
        return step
    with side_stream():
        for _ in range(3):  # what allocates on a first call has done so
            step()
    synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def kernels_of(step: Callable[[], None]) -> list[str]:
    """The names of what `step` launches on the device, copies and fills left out."""
    from torch.profiler import ProfilerActivity, profile

    step()
    synchronize()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * REAL
    with profile(activities=activities) as profiler:
        step()
        synchronize()
    events = [
        event for event in profiler.events() or [] if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    return [event.name for event in events if not event.name.startswith(("Mem", "cuda"))]


def train(case: Case, logits: Tensor, options: dict[str, object]) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().requires_grad_()
    loss = case.ours(leaf, **options)
    (gradient,) = torch.autograd.grad(loss, leaf, torch.full_like(loss, 0.75))
    return loss.detach(), gradient


@each_case
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16] if REAL else [torch.bfloat16]
)
def test_the_same_bits_every_time(case: Case, dtype: torch.dtype) -> None:
    logits, options = case.make(dtype)
    first = train(case, logits, options)
    for _ in range(RUNS):
        for again, before in zip(train(case, logits, options), first, strict=True):
            assert torch.equal(again, before)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("shape", [(5000, 10), (300, 1000), (64, 3, 33), (40, 32001)])
def test_the_same_bits_of_many_blocks(shape: tuple[int, ...], reduction: str) -> None:
    if not REAL:
        shape = (50, *shape[1:-1], min(shape[-1], 2051))
    logits, index = draw(shape, "ordinary", torch.bfloat16)
    targets = torch.rand(shape, dtype=torch.bfloat16)
    runs = []
    for _ in range(RUNS):
        leaf = logits.clone().requires_grad_()
        loss = F.cross_entropy(leaf, index, label_smoothing=0.1, reduction=reduction)
        loss = loss + F.sigmoid_focal_loss(leaf, targets, reduction=reduction)
        loss.backward()
        assert leaf.grad is not None
        runs.append((loss.detach(), leaf.grad))
    for loss, gradient in runs[1:]:
        assert torch.equal(loss, runs[0][0])
        assert torch.equal(gradient, runs[0][1])


@each_case
def test_graph(case: Case) -> None:
    """Captured once, replayed on other numbers in the same memory."""
    logits, options = case.make(torch.float32)
    static = logits.clone().requires_grad_()
    static.grad = torch.zeros_like(static)
    results: dict[str, Tensor] = {}

    def step() -> None:
        assert static.grad is not None
        static.grad.zero_()
        loss = case.ours(static, **options).mean()
        loss.backward()
        results["loss"] = loss.detach()

    replay = captured(step)
    for _ in range(3):
        other, _ = case.make(torch.float32)
        with torch.no_grad():
            static.copy_(other)
        replay()
        synchronize()
        eager = other.clone().requires_grad_()
        expected = case.ours(eager, **options).mean()
        expected.backward()
        assert torch.equal(results["loss"], expected.detach())
        assert torch.equal(static.grad, eager.grad)


@each_case
def test_side_stream(case: Case) -> None:
    logits, options = case.make(torch.float32)
    expected = train(case, logits, options)
    synchronize()
    with side_stream():
        found = train(case, logits, options)
    synchronize()
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


@needs_gpu
def test_kernels_wait_for_the_current_stream() -> None:
    """The logits are still being made when the loss is asked for: on another stream it would read the old ones."""
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        logits = torch.zeros(4096, 1000)
        torch.cuda._sleep(50_000_000)
        logits[:, 0] = 100
        loss = F.cross_entropy(logits, torch.zeros(4096, dtype=torch.long))
    stream.synchronize()
    assert loss.item() < 1e-6


@needs_gpu
@pytest.mark.skipif(REAL and torch.cuda.device_count() < 2, reason="one CUDA device")
@each_case
def test_second_device(case: Case) -> None:
    """The tensors' device counts, not the current one."""
    logits, options = case.make(torch.float32)
    expected = train(case, logits, options)

    def there(value: object) -> object:
        return value.to("cuda:1") if isinstance(value, Tensor) else value

    moved = {name: there(value) for name, value in options.items()}
    found = train(case, logits.to("cuda:1"), moved)
    assert torch.cuda.current_device() == 0
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.device == torch.device("cuda:1")
        assert torch.equal(ours.cpu(), theirs.cpu())


def memory() -> int:
    return torch.cuda.mem_get_info()[0] if REAL else 0


@pytest.mark.parametrize("layout", ["rows", "long rows", "columns", "elements"])
def test_more_than_2_to_the_31_elements(layout: str) -> None:
    """The last rows lie beyond what an int counts. They are held against the same rows by themselves."""
    if REAL and memory() < 24 << 30:
        pytest.skip("less than 24 GiB free")
    rows, classes = {"rows": (21_500_000, 100), "long rows": (16_500, 131_071)}.get(
        layout, (4, (1 << 29) + 8)
    )
    if layout == "columns":
        rows, classes = 2, 3
    positions = (1 << 31) // 6 + 1000
    if not REAL:
        rows, classes, positions = min(rows, 40), min(classes, 2051), 100
    shape = (rows, classes, positions) if layout == "columns" else (rows, classes)
    logits = torch.empty(shape, dtype=torch.bfloat16).normal_()
    assert not REAL or logits.numel() > 2**31
    last = (slice(-1, None), slice(None), slice(-7, None)) if layout == "columns" else (slice(-1, None),)
    if layout == "elements":
        targets = torch.zeros((), dtype=torch.bfloat16).expand(shape)
        call, options = F.binary_cross_entropy_with_logits, {"target": targets}
        part_options = {"target": targets[last]}
    else:
        index = torch.randint(classes, (*shape[:1], *shape[2:]))
        call, options = F.cross_entropy, {"target": index}
        part_options = {"target": index[last[0]] if len(shape) == 2 else index[last[0], last[2]]}
    leaf = logits.requires_grad_()
    (gradient,) = torch.autograd.grad(call(leaf, reduction="sum", **options), leaf)
    part = logits.detach()[last].clone().requires_grad_()
    (expected,) = torch.autograd.grad(call(part, reduction="sum", **part_options), part)
    # A long row's first pack begins elsewhere than its clone's, and so do all others: its sum is of other parts.
    torch.testing.assert_close(gradient[last], expected, rtol=2**-7 if layout == "long rows" else 0, atol=0)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "loss", [F.binary_cross_entropy_with_logits, F.sigmoid_focal_loss, F.varifocal_loss, F.quality_focal_loss]
)
def test_a_detectors_targets(loss: Callable[..., Tensor], dtype: torch.dtype) -> None:
    """An index target, its dense form, and every element by itself ("none"): a kernel each, of many packs a thread."""
    anchors, classes = (32 if REAL else 1, 8400 if REAL else 700), 80
    labels = torch.randint(classes, anchors).where(torch.rand(anchors) < 0.01, -1)
    logits = torch.randn(*anchors, classes, dtype=dtype) - 4
    dense, _ = IndexTarget(labels).dense(classes, dtype=dtype)
    leaf = logits.requires_grad_()
    elements = loss(leaf, dense, reduction="none")
    (expected,) = torch.autograd.grad(elements, leaf, torch.ones_like(elements))
    for target in (IndexTarget(labels), dense):
        total = loss(leaf, target, reduction="sum")
        (gradient,) = torch.autograd.grad(total, leaf)
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(gradient, expected, rtol=8 * eps, atol=0)
        torch.testing.assert_close(total.double(), elements.double().sum(), rtol=4 * eps, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_grad_scaler(reduction: str) -> None:
    """fp16 under a loss scale: mean / N is below fp16's smallest number unless the scale comes in before rounding."""
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**14)
    rows = 20000 if REAL else 500
    logits, index = draw((rows, 100), "ordinary", torch.float16)
    leaf = logits.requires_grad_()
    scaler.scale(F.cross_entropy(leaf, index, reduction="mean")).backward()
    wide = logits.detach().double().requires_grad_()
    (torch.nn.functional.cross_entropy(wide, index) * 2.0**14).backward()
    assert leaf.grad is not None
    assert wide.grad is not None
    torch.testing.assert_close(leaf.grad.double(), wide.grad, rtol=2e-3, atol=1e-7)


@pytest.mark.parametrize("gradient", [False, True])
@each_case
def test_no_synchronisation(case: Case, gradient: bool) -> None:
    logits, options = case.make(torch.float32)
    leaf = logits.requires_grad_(gradient)
    with no_synchronisation():
        loss = case.ours(leaf, **options)
        if gradient:
            loss.sum().backward()


@pytest.mark.parametrize(("dtype", "launches"), [(torch.float32, 3), (torch.float16, 4)])
@pytest.mark.parametrize("loss", ["cross_entropy", "bce_with_logits", "softmax_focal", "sigmoid_focal"])
def test_launches(loss: str, dtype: torch.dtype, launches: int) -> None:
    """Ours, and none of torch's but the fill of the upstream gradient with 1."""
    logits, index = draw((64, 10), "ordinary", dtype)
    targets = torch.rand(64, 10).to(dtype)
    call: dict[str, Callable[[Tensor], Tensor]] = {
        "cross_entropy": lambda x: F.cross_entropy(x, index),
        "bce_with_logits": lambda x: F.binary_cross_entropy_with_logits(x, targets),
        "softmax_focal": lambda x: F.softmax_focal_loss(x, index),
        "sigmoid_focal": lambda x: F.sigmoid_focal_loss(x, targets, reduction="mean"),
    }
    leaf, one = logits.requires_grad_(), torch.ones((), dtype=dtype)

    def step() -> None:
        torch.autograd.grad(call[loss](leaf), leaf, one)

    names = kernels_of(step)
    ours = [name for name in names if "fused_losses" in name]
    assert not REAL or ours, names
    assert len(names) <= launches, names
    assert len(names) == len(ours), names


@needs_gpu
@each_case
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_peak_memory(case: Case, reduction: str) -> None:
    """The gradient, and nothing else of its size."""
    if case.name == "cross_entropy_probabilities":
        logits = torch.randn(2048, 4096)
        options: dict[str, object] = {"target": logits.softmax(1)}
    elif "cross_entropy" in case.name or case.name == "softmax_focal":
        logits = torch.randn(2048, 4096)
        options = {"target": torch.randint(4096, (2048,))}
    else:
        logits = torch.rand(2048, 4096)
        options = {"targets" if "focal" in case.name else "target": torch.rand(2048, 4096).round()}
    leaf = logits.requires_grad_()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = case.ours(leaf, reduction=reduction, **options)
    loss.backward()
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before
    assert extra < 1.02 * logits.nbytes


ASSERTS = """
import torch
import fused_losses.functional as F
device = {device!r}
logits, target = torch.randn(4, 5, device=device), torch.tensor([0, 1, {target}, 2], device=device)
probabilities = torch.full((4, 5), 1.5, device=device)
{call}
if device == "cuda":
    torch.cuda.synchronize()
print("nobody noticed")
"""


@pytest.mark.parametrize(
    ("call", "said", "target"),
    [
        *(
            (
                "F.cross_entropy(logits, target)",
                "target {target} is out of bounds: input has 5 classes",
                wrong,
            )
            for wrong in ([5, -1, 2**40] if REAL else [5])
        ),
        (
            "F.cross_entropy(logits, target, reduction='none')",
            "target {target} is out of bounds: input has 5 classes",
            5,
        ),
        ("F.softmax_focal_loss(logits, target)", "target {target} is out of bounds: input has 5 classes", 5),
        ("F.binary_cross_entropy(probabilities, torch.rand(4, 5, device=device))", "1.5", 0),
    ],
)
def test_assertions(call: str, said: str, target: int) -> None:
    """A device-side assertion ends a process's use of the GPU: each has its own."""
    program = ASSERTS.format(device=DEVICE, target=target, call=call)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    printed = done.stdout + done.stderr
    assert done.returncode == 1, printed  # Python's own exit after an exception, and no crash
    assert said.format(target=target).lower() in printed.lower()
    assert "nobody noticed" not in printed
    if REAL:
        assert "device-side assert" in printed
