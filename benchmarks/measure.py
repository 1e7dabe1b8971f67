"""Time, peak memory and error of one loss: forward and backward, nothing around them."""

from __future__ import annotations

import gc
import multiprocessing
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import torch
from baselines import implementation, overwrites_logits
from cases import Case
from torch import Tensor


class Call:
    """One implementation on the inputs of one case, or on several sets of them in turn.

    The gradient is asked for with `torch.autograd.grad`: nobody keeps or accumulates it, so there is none to clear,
    and what overwrites the logits is asked the same way as what does not.
    """

    def __init__(self, case: Case, name: str, *sets: tuple[Tensor, ...]):
        self.differentiable = case.loss.differentiable
        self.overwrites = overwrites_logits(name)
        self.sets = [(logits.detach().requires_grad_(self.differentiable), *rest) for logits, *rest in sets]
        logits = self.sets[0][0]
        self.function = implementation(case, name, str(logits.device))
        self.arguments = case.arguments(logits.dtype, str(logits.device))
        self.backlog = 2**18  # cycles the device waits before a round on CUDA
        self.queued_ahead = True

    def ready(self, index: int = 0) -> tuple[Tensor, ...]:
        """What forward takes: a leaf, the logits, the rest. Logits that will be overwritten are a copy of the leaf."""
        leaf, *rest = self.sets[index]
        return leaf, leaf.clone() if self.overwrites else leaf, *rest

    def forward(self, leaf: Tensor, logits: Tensor, *rest: Tensor) -> Tensor:
        loss = self.function(logits, *rest, **self.arguments)
        return loss.sum() if loss.dim() and self.differentiable else loss

    def backward(self, loss: Tensor, leaf: Tensor) -> Tensor | None:
        return torch.autograd.grad(loss, leaf)[0] if self.differentiable else None

    def __call__(self) -> tuple[Tensor, Tensor | None]:
        """Value and gradient."""
        ready = self.ready()
        loss = self.forward(*ready)
        return loss.detach(), self.backward(loss, ready[0])


# -- caches ----------------------------------------------------------------------------------------------------


def last_level_cache(device: str) -> int:
    """Bytes of the last-level caches that this process reaches, all of them together; 32 MB where nobody says."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    found: dict[str, tuple[int, int]] = {}
    for index in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index*"):
        cpu = int(index.parts[-3].removeprefix("cpu"))
        if cpu in os.sched_getaffinity(0):
            read = {name: (index / name).read_text().strip() for name in ("level", "size", "shared_cpu_list")}
            size = int(read["size"].removesuffix("K")) * 1024
            found[f"L{read['level']} of {read['shared_cpu_list']}"] = int(read["level"]), size
    last = max((level for level, _ in found.values()), default=0)
    return sum(size for level, size in found.values() if level == last) or 2**25


def input_sets(case: Case, device: str, cache: int) -> list[tuple[Tensor, ...]]:
    """The inputs once, or as many times over as it takes to fill the last-level cache twice.

    A network leaves small logits in the cache for the loss: they stay there, warm. Logits from an eighth of the
    cache on would share it with the network; every call reads a set that the calls since its last use have evicted.
    """
    inputs = case.inputs(device)
    if is_warm(case, cache):
        return [inputs]
    size = sum(x.numel() * x.itemsize for x in inputs)
    return [inputs, *(tuple(x.clone() for x in inputs) for _ in range(ceil(2 * cache / size) - 1))]


def is_warm(case: Case, cache: int) -> bool:
    return case.logits_bytes < cache / 8


class Copy:
    """Bytes a second, read and written, of a large copy into memory that is already mapped: what we call 100%."""

    def __init__(self, device: str, cache: int):
        self.device = device
        self.size = max(2**28 if device == "cuda" else 2**27, 4 * cache)
        self.source = torch.ones(self.size // 4, device=device)
        self.target = torch.zeros_like(self.source)
        self.samples: list[float] = []

    def sample(self, times: int = 3) -> None:
        for _ in range(times):
            start = _mark(self.device)
            self.target.copy_(self.source)
            end = _mark(self.device)
            if self.device == "cuda":
                torch.cuda.synchronize()
            self.samples.append(2 * self.size / _seconds(start, end))


# -- time ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spread:
    """Median and quartiles over the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: list[float]) -> Spread:
        if len(samples) == 1:
            samples = samples * 2
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, low, high)


def busy_seconds() -> tuple[float, float]:
    """CPU time so far: of every process on this machine, as far as the system says, and of this one."""
    own = sum(os.times()[:2])
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return own, own
    ticks = [int(field) for field in fields]
    idle = ticks[3] + ticks[4]
    return (sum(ticks[:8]) - idle) / os.sysconf("SC_CLK_TCK"), own


def _mark(device: str) -> Any:
    if device == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(start: Any, end: Any) -> float:
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3


def _run(call: Call, turns: int, device: str) -> list[tuple[Any, Any, Any]]:
    """Marks before, between and after forward and backward, `turns` times through the sets of inputs."""
    marks = []
    for _ in range(turns):
        # All copies first: a set that was copied just before its call would be warm.
        turn = [call.ready(index) for index in range(len(call.sets))]
        for ready in turn:
            start = _mark(device)
            loss = call.forward(*ready)
            middle = _mark(device)
            gradient = call.backward(loss, ready[0])
            marks.append((start, middle, _mark(device)))
            del loss, gradient  # or freeing them would count as part of the next forward
    return marks


def _run_behind_backlog(call: Call, turns: int) -> list[tuple[Any, Any, Any]]:
    """The same on a device that is kept busy until all of it is queued.

    Otherwise the events around a short kernel would time how long the host takes to launch it. What synchronises
    with the device cannot be queued ahead: its times include its waiting, and `queued_ahead` says so.
    """
    while True:
        torch.cuda.synchronize()
        torch.cuda._sleep(call.backlog)
        awake = torch.cuda.Event()
        awake.record()
        marks = _run(call, turns, "cuda")
        call.queued_ahead = not awake.query()
        torch.cuda.synchronize()
        if call.queued_ahead or call.backlog >= 2**27:
            return marks
        call.backlog *= 2


def _round(call: Call, turns: int, device: str) -> tuple[float, float]:
    """Median seconds of forward and of backward, `turns` times through the sets of inputs.

    Not the mean: the system goes on with memory that the last implementation has freed, and the first calls of the
    next one wait for it, now and then ten times as long as they take.
    """
    marks = _run(call, turns, device) if device == "cpu" else _run_behind_backlog(call, turns)
    forward = statistics.median(_seconds(start, middle) for start, middle, _ in marks)
    return forward, statistics.median(_seconds(middle, end) for _, middle, end in marks)


def times(
    calls: dict[str, Call], device: str, rounds: int, round_seconds: float
) -> dict[str, dict[str, Spread]]:
    """Forward, backward and both for each call, measured in turns so that a busy moment hits all alike.

    A round lasts about `round_seconds` for each call. Where a single call takes longer than that, three rounds
    have to do once all of them together have had the time that `rounds` should have taken.
    """
    # A queue holds about a thousand launches: more calls than this could not wait behind a backlog.
    most = 10_000 if device == "cpu" else 16
    turns = {}
    for name, call in calls.items():
        seconds = sum(_round(call, 1, device)) * len(call.sets)
        turns[name] = max(1, min(most // len(call.sets), int(round_seconds / seconds)))
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    order = list(calls)
    gc.collect()
    gc.disable()  # as timeit does: a collection would hit whoever is being measured
    start = time.perf_counter()
    for done in range(rounds):
        if done >= 3 and time.perf_counter() - start > rounds * round_seconds * len(calls):
            break
        for name in order:
            samples[name].append(_round(calls[name], turns[name], device))
        order = order[1:] + order[:1]
    gc.enable()
    return {
        name: {
            "forward": Spread.of([forward for forward, _ in pairs]),
            "backward": Spread.of([backward for _, backward in pairs]),
            "both": Spread.of([forward + backward for forward, backward in pairs]),
        }
        for name, pairs in samples.items()
    }


# -- error -----------------------------------------------------------------------------------------------------


def exact(case: Case, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor | None]:
    """Value and gradient in fp64, from the same rounded inputs."""
    return Call(case, "eager", tuple(x.double() if x.is_floating_point() else x for x in inputs))()


def error(result: Tensor | None, reference: Tensor | None) -> float | None:
    """Largest error, relative to the largest element of the reference."""
    if result is None or reference is None:
        return None
    return float((result.double() - reference).abs().max() / reference.abs().max())


# -- peak memory -----------------------------------------------------------------------------------------------


def _status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def _peak_extra_bytes(spec: str, name: str, device: str, threads: int) -> int:
    torch.set_num_threads(threads)
    case = Case.parse(spec)
    call = Call(case, name, case.inputs(device))
    # Code, thread stacks and pools are not the loss's memory; compiled code exists for one shape only.
    warm = call if name == "compile" else Call(case.small(), name, case.small().inputs(device))
    warm()
    ready = call.ready()
    gc.collect()
    if device == "cpu":
        before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        call.backward(call.forward(*ready), ready[0])
        return _status("VmHWM") - before
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call.backward(call.forward(*ready), ready[0])
    peak = torch.cuda.max_memory_allocated()
    del ready, call, warm
    torch.cuda.empty_cache()  # what this process keeps is missing in the one that measures times
    return peak - before


class PeakMemory:
    """Measures peaks outside of this process: on a CPU each in one forked from one that has imported torch and run
    nothing; on CUDA, where the allocator counts, all in one, for it takes seconds to start."""

    def __init__(self, device: str):
        self.device = device
        # With glibc's moving threshold, whether freed memory counts would depend on the sizes freed before.
        os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "65536")
        # CUDA does not survive a fork, and asking whether there is a device may start it.
        context = multiprocessing.get_context("spawn" if device == "cuda" else "forkserver")
        if device == "cpu":
            context.set_forkserver_preload(["torch", "fused_losses"])
        self.pool = ProcessPoolExecutor(
            1, mp_context=context, max_tasks_per_child=None if device == "cuda" else 1
        )

    def __call__(self, case: Case, name: str) -> int | None:
        """Bytes beyond the inputs at the highest point of one forward and backward; None where nobody counts.

        On a CPU that is resident size, of whole pages and with what the interpreter does: too coarse below 1 MB.
        """
        if self.device == "cpu" and (
            case.logits_bytes < 1e6 or not os.access("/proc/self/clear_refs", os.W_OK)
        ):
            return None
        if self.device == "cuda":
            torch.cuda.empty_cache()  # what this process keeps for later is missing there
        return self.pool.submit(
            _peak_extra_bytes, case.spec, name, self.device, torch.get_num_threads()
        ).result()

    def close(self) -> None:
        self.pool.shutdown()
