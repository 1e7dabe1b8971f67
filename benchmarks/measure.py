"""Time, peak memory and error of one loss: forward and backward, nothing around them."""

from __future__ import annotations

import gc
import multiprocessing
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cases import Case, implementation
from torch import Tensor


class _Layer(torch.autograd.Function):
    """Stands for the network before the loss: its output is no leaf, and the gradient goes no further."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor) -> Tensor:
        return leaf.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> None:  # type: ignore[override]
        return None


class Call:
    """One implementation on the inputs of one case."""

    def __init__(self, case: Case, name: str, logits: Tensor, target: Tensor):
        self.function = implementation(case, name)
        self.in_place = name == "in place"
        self.leaf = logits.detach().requires_grad_()
        self.target = target
        self.arguments = case.arguments(logits.dtype, str(logits.device))

    def logits(self) -> Tensor:
        """Logits without a gradient. In place they are a fresh copy, since a leaf may not be overwritten."""
        self.leaf.grad = None
        return _Layer.apply(self.leaf) if self.in_place else self.leaf

    def forward(self, logits: Tensor) -> Tensor:
        loss = self.function(logits, self.target, **self.arguments)
        return loss.sum() if loss.dim() else loss

    def backward(self, loss: Tensor, logits: Tensor) -> Tensor | None:
        loss.backward()
        return logits.detach() if self.in_place else logits.grad

    def __call__(self) -> tuple[Tensor, Tensor]:
        """Value and gradient."""
        logits = self.logits()
        loss = self.forward(logits)
        gradient = self.backward(loss, logits)
        assert gradient is not None
        return loss.detach(), gradient


# -- time ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spread:
    """Seconds a call: median and quartiles over the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: list[float]) -> Spread:
        if len(samples) == 1:
            samples = samples * 2
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, low, high)


def _mark(device: str) -> Any:
    if device == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(start: Any, end: Any) -> float:
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3


def _round(call: Call, number: int, device: str) -> tuple[float, float]:
    """Mean seconds of forward and of backward over `number` calls."""
    marks = []
    for _ in range(number):
        logits = call.logits()
        start = _mark(device)
        loss = call.forward(logits)
        middle = _mark(device)
        call.backward(loss, logits)
        marks.append((start, middle, _mark(device)))
        del loss, logits  # or freeing them would count as part of the next forward
    if device != "cpu":
        torch.cuda.synchronize()
    forward = sum(_seconds(start, middle) for start, middle, _ in marks)
    backward = sum(_seconds(middle, end) for _, middle, end in marks)
    return forward / number, backward / number


def times(
    calls: dict[str, Call], device: str, rounds: int, round_seconds: float
) -> dict[str, dict[str, Spread]]:
    """Forward, backward and both for each call, measured in turns so that a busy moment hits all alike.

    A round lasts about `round_seconds` for each call. Where a single call takes longer than that, three rounds
    have to do once all of them together have had the time that `rounds` should have taken.
    """
    numbers = {
        name: max(1, min(10_000, int(round_seconds / sum(_round(call, 1, device)))))
        for name, call in calls.items()
    }
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    order = list(calls)
    start = time.perf_counter()
    for done in range(rounds):
        if done >= 3 and time.perf_counter() - start > rounds * round_seconds * len(calls):
            break
        for name in order:
            samples[name].append(_round(calls[name], numbers[name], device))
        order = order[1:] + order[:1]
    return {
        name: {
            "forward": Spread.of([forward for forward, _ in pairs]),
            "backward": Spread.of([backward for _, backward in pairs]),
            "both": Spread.of([forward + backward for forward, backward in pairs]),
        }
        for name, pairs in samples.items()
    }


def copy_bandwidth(device: str, size: int = 2**27, rounds: int = 9) -> float:
    """Bytes a second, read and written, of one large copy into memory that is already mapped."""
    source = torch.ones(size // 4, device=device)
    target = torch.zeros_like(source)
    samples = []
    for _ in range(rounds):
        start = _mark(device)
        target.copy_(source)
        end = _mark(device)
        if device != "cpu":
            torch.cuda.synchronize()
        samples.append(_seconds(start, end))
    return 2 * size / statistics.median(samples)


# -- error -----------------------------------------------------------------------------------------------------


def exact(case: Case, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Value and gradient in fp64, from the same rounded logits."""
    return Call(case, "eager", logits.double(), target.double() if target.is_floating_point() else target)()


def error(result: Tensor, reference: Tensor) -> float:
    """Largest error, relative to the largest element of the reference."""
    return float((result.double() - reference).abs().max() / reference.abs().max())


# -- peak memory -----------------------------------------------------------------------------------------------


def _status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def _peak_extra_bytes(spec: str, name: str, device: str, threads: int) -> int:
    torch.set_num_threads(threads)
    case = Case.parse(spec)
    call = Call(case, name, *case.inputs(device))
    # Code, thread stacks and pools are not the loss's memory; compiled code exists for one shape only.
    warm = call if name == "compile" else Call(case.small(), name, *case.small().inputs(device))
    warm()
    logits = call.logits()
    gc.collect()
    if device == "cpu":
        before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        call.backward(call.forward(logits), logits)
        return _status("VmHWM") - before
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call.backward(call.forward(logits), logits)
    return torch.cuda.max_memory_allocated() - before


class PeakMemory:
    """Measures each peak in a process of its own, forked from one that has imported torch and run nothing."""

    def __init__(self, device: str):
        self.device = device
        # With glibc's moving threshold, whether freed memory counts would depend on the sizes freed before.
        os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "65536")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "fused_losses"])
        self.pool = ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1)

    def __call__(self, case: Case, name: str) -> int | None:
        """Bytes beyond the inputs at the highest point of one forward and backward; None where nobody counts."""
        if self.device == "cpu" and not os.access("/proc/self/clear_refs", os.W_OK):
            return None
        return self.pool.submit(
            _peak_extra_bytes, case.spec, name, self.device, torch.get_num_threads()
        ).result()

    def close(self) -> None:
        self.pool.shutdown()
