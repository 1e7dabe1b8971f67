"""Compares fused_losses with what else computes the same loss: time, memory and error on your machine.

python benchmarks/compare.py
python benchmarks/compare.py --suite detection --baselines eager,compile --plot pictures
python benchmarks/compare.py --case "ce:N=4096,C=80,dtype=bf16,label_smoothing=0.1"
python benchmarks/compare.py --sweep classes --case "ce:N=256,C=10,dtype=bf16" --plot pictures
python benchmarks/compare.py --diff before.json after.json
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

try:
    from baselines import BASELINES, OURS, Unavailable
    from cases import DTYPES, LOSSES, SUITES, SWEEPS, Case, CaseError
except ImportError as error:
    sys.exit(f"fused_losses cannot be imported ({error}); run: pip install --no-build-isolation .")
from environment import environment
from measure import (
    Call,
    Copy,
    PeakMemory,
    Spread,
    busy_seconds,
    error,
    exact,
    input_sets,
    is_warm,
    last_level_cache,
    times,
)
from report import geometric_means, print_diff, print_report

INTERRUPTED = 130  # the exit status, as a shell has it


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Compares fused_losses with other implementations of the same losses.",
        epilog=f"losses of --case: {', '.join(LOSSES)}; e.g. ce:N=2,C=19,H=256,W=512,ignore_index=255",
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--suite", choices=[*SUITES, "all"], help="all, unless --case or --sweep is given")
    parser.add_argument("--case", action="append", metavar="CASE", help="instead of a suite; may be repeated")
    parser.add_argument(
        "--sweep",
        action="append",
        choices=SWEEPS,
        help="time over many sizes of --case, or of cross entropy; may be repeated",
    )
    parser.add_argument(
        "--baselines",
        default="eager",
        help=f"any of {','.join(BASELINES)}; what is not installed is left out",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="for every case, instead of its own")
    parser.add_argument("--rounds", type=int, help="rounds the medians are taken over; 11, or 5 with --quick")
    parser.add_argument(
        "--quick", action="store_true", help="fewer and shorter rounds, half the sizes of a sweep"
    )
    parser.add_argument("--threads", type=int, help="CPU threads, otherwise torch's choice")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured")
    parser.add_argument(
        "--plot", type=Path, metavar="DIR", help="write a picture for each suite and sweep there"
    )
    parser.add_argument(
        "--diff",
        type=Path,
        nargs=2,
        metavar=("A", "B"),
        help="set two files of --json side by side; runs nothing",
    )
    options = parser.parse_args(arguments)
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    options.rounds = (5 if options.quick else 11) if options.rounds is None else options.rounds
    for name in ("rounds", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    options.baselines = list(dict.fromkeys(filter(None, map(str.strip, options.baselines.split(",")))))
    if unknown := [name for name in options.baselines if name not in BASELINES]:
        parser.error(f"--baselines: no {unknown[0]!r}; there are {', '.join(BASELINES)}")
    if options.suite and options.case and not options.sweep:
        parser.error("--case takes the place of a suite: leave out --suite")
    try:
        _choose_cases(options)
    except CaseError as error:
        parser.error(str(error))
    return options


def _choose_cases(options: argparse.Namespace) -> None:
    """The cases a suite, and the points a sweep."""
    cases = [Case.parse(spec, options.dtype) for spec in options.case or []]
    for case in cases:
        _require_served(case)
    options.suites, options.sweeps = {}, {}
    if cases and not options.sweep:
        options.suites["cases"] = cases
    elif options.suite or not options.sweep:
        for suite in SUITES if options.suite in (None, "all") else [options.suite]:
            options.suites[suite] = [Case.parse(spec, options.dtype) for spec in SUITES[suite]]
    for sweep in options.sweep or []:
        dim, sizes, default = SWEEPS[sweep]
        base = cases or [Case.parse(default, options.dtype)]
        if len(base) > 1:
            raise CaseError(f"--sweep {sweep}: one --case, not {len(base)}")
        if dim not in base[0].dims:
            raise CaseError(f"--sweep {sweep}: {base[0].spec} has no {dim}")
        chosen = sorted({*sizes[::2], sizes[-1]}) if options.quick else sizes
        options.sweeps[sweep] = [base[0].sized(**{dim: size}) for size in chosen]


def _require_served(case: Case) -> None:
    """Ends now what the loss would refuse after other cases have been measured."""
    small = case.small()
    try:
        Call(small, "fused", small.inputs("cpu"))()
    except (RuntimeError, ValueError) as error:
        raise CaseError(f"case {case.spec!r}: {error}") from None


class Comparison:
    """What stays the same from case to case, and what was left out."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.device = options.device
        self.environment = environment(self.device, last_level_cache(self.device))
        self.cache = self.environment["last_level_cache_bytes"]
        self.copy = Copy(self.device, self.cache)
        self.peak = PeakMemory(self.device)
        self.left_out: dict[str, str] = {}
        self.by_others = self.elapsed = 0.0

    def measure(self, case: Case, with_memory: bool = True) -> dict[str, Any]:
        """Everything about one case; what cannot run goes to `left_out` with its reason."""
        self.copy.sample()
        sets = input_sets(case, self.device, self.cache)
        calls, found = self._first_calls(case, sets)
        spreads = self._times(calls)
        for name, call in calls.items():
            found[name] |= {part: asdict(spread) for part, spread in spreads[name].items()}
            found[name]["bytes_per_second"] = case.floor_bytes / spreads[name]["both"].median
            found[name]["queued_ahead"] = call.queued_ahead
            found[name]["extra_bytes"] = self.peak(case, name) if with_memory else None
        return {
            "case": case.spec,
            "label": case.label,
            "shape": case.shape,
            "dims": case.dims,
            "dtype": case.dtype,
            "logits_bytes": case.logits_bytes,
            "floor_bytes": case.floor_bytes,
            "inputs": "warm" if is_warm(case, self.cache) else "rotating",
            "input_sets": len(sets),
            "differentiable": case.loss.differentiable,
            "implementations": found,
            "speedup": {
                name: {
                    base: spreads[base]["both"].median / spreads[name]["both"].median
                    for base in self.options.baselines
                    if base in calls
                }
                for name in calls
            },
        }

    def _times(self, calls: dict[str, Call]) -> dict[str, dict[str, Spread]]:
        """The times, and how much of the machine other processes took meanwhile."""
        (everyone, own), start = busy_seconds(), time.perf_counter()
        spreads = times(calls, self.device, self.options.rounds, 0.01 if self.options.quick else 0.1)
        everyone_after, own_after = busy_seconds()
        self.by_others += max(0.0, (everyone_after - everyone) - (own_after - own))
        self.elapsed += time.perf_counter() - start
        return spreads

    def _first_calls(
        self, case: Case, sets: list[tuple[torch.Tensor, ...]]
    ) -> tuple[dict[str, Call], dict[str, dict[str, Any]]]:
        """The implementations that run, after a call that compiled them, and the errors of that call."""
        value, gradient = exact(case, sets[0])
        calls: dict[str, Call] = {}
        found: dict[str, dict[str, Any]] = {}
        for name in [*self.options.baselines, *OURS]:
            try:
                call = Call(case, name, *sets)
                start = time.perf_counter()
                result = call()
                if self.device == "cuda":
                    torch.cuda.synchronize()
                found[name] = {
                    "first_call": time.perf_counter() - start,
                    "value_error": error(result[0], value),
                    "gradient_error": error(result[1], gradient),
                }
                calls[name] = call
            except Unavailable as reason:
                self.left_out.setdefault(name, str(reason))
            except Exception as reason:
                if name in OURS:
                    raise
                message = str(reason).partition("\n")[0] or type(reason).__name__
                self.left_out[f"{name} on {case.label}"] = message
        return calls, found

    def run(self, progress: Progress) -> dict[str, Any]:
        chosen = [*self.options.suites.values(), *self.options.sweeps.values()]
        task = progress.add_task("", total=sum(map(len, chosen)))

        def measure(case: Case, with_memory: bool) -> dict[str, Any]:
            progress.update(task, description=case.label)
            if not progress.console.is_terminal:
                progress.console.print(case.label, highlight=False)
            measured = self.measure(case, with_memory)
            progress.advance(task)
            return measured

        cases: list[dict[str, Any]] = []
        sweeps: dict[str, Any] = {}
        try:
            for suite, chosen_cases in self.options.suites.items():
                for case in chosen_cases:
                    cases.append({"suite": suite} | measure(case, True))
            for sweep, chosen_cases in self.options.sweeps.items():
                points: list[dict[str, Any]] = []
                sweeps[sweep] = {"dim": SWEEPS[sweep][0], "points": points}
                for case in chosen_cases:
                    points.append(measure(case, False))
        except KeyboardInterrupt:
            sweeps = {name: sweep for name, sweep in sweeps.items() if sweep["points"]}
            if not cases and not sweeps:
                raise
            self.left_out["the rest"] = "interrupted"
        self.peak.close()
        return {
            "environment": self.environment,
            "rounds": self.options.rounds,
            "quick": self.options.quick,
            "baselines": self.options.baselines,
            "cpu_taken_by_others": self.by_others / (self.elapsed * (os.cpu_count() or 1)),
            "copy_bytes_per_second": asdict(Spread.of(self.copy.samples)),
            "cases": cases,
            "sweeps": sweeps,
            "geometric_mean": geometric_means(cases),
            "left_out": [{"name": name, "reason": reason} for name, reason in self.left_out.items()],
        }


def main() -> None:
    options = parse()
    console = Console()
    # Three baselines fit into 100 columns. A narrower terminal breaks lines, which loses no digits.
    needed = 100 + 8 * max(0, len(options.baselines) - 3)
    console.width = max(console.width, needed) if sys.stdout.isatty() else needed
    if options.diff:
        print_diff(console, *options.diff)
        return
    if options.threads:
        torch.set_num_threads(options.threads)
        if options.threads > (os.cpu_count() or 1):
            print(f"--threads {options.threads}: this machine has {os.cpu_count()} cores", file=sys.stderr)
    _require_writable(options)
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    progress = Progress(*columns, console=Console(stderr=True), transient=True)
    # torch.compile's own cache would hide how long it takes to compile.
    with progress, tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as fresh:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = fresh
        report = Comparison(options).run(progress)
    written = []
    if options.json:  # before anything is printed: to a pipe that may be closed
        options.json.write_text(json.dumps(report, indent=1) + "\n")
        written.append(options.json)
    if options.plot:
        from pictures import draw  # matplotlib takes a second

        written += draw(report, options.plot)
    print_report(console, report)
    for path in written:
        console.print(f"wrote {path}")
    if "the rest" in (entry["name"] for entry in report["left_out"]):
        sys.exit(INTERRUPTED)


def _require_writable(options: argparse.Namespace) -> None:
    """Ends now what could not be written in the end."""
    try:
        if options.plot:
            options.plot.mkdir(parents=True, exist_ok=True)
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.open("a").close()
    except OSError as error:
        sys.exit(f"compare.py: {error.filename} cannot be written to: {error.strerror}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
