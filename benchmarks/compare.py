"""Compares fused_losses with what else computes the same loss: time, memory and error on your machine.

python benchmarks/compare.py
python benchmarks/compare.py --suite detection --baselines eager,compile --plot pictures
python benchmarks/compare.py --case "ce:N=4096,C=80,dtype=bf16,label_smoothing=0.1"
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

try:
    from cases import BASELINES, DTYPES, LOSSES, OURS, SUITES, Case, CaseError, Unavailable
except ImportError as error:
    sys.exit(f"fused_losses cannot be imported ({error}); run: pip install --no-build-isolation .")
from measure import Call, PeakMemory, copy_bandwidth, error, exact, times
from report import draw, environment, geometric_means, print_report


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Compares fused_losses with other implementations of the same losses.",
        epilog=f"losses of --case: {', '.join(LOSSES)}; e.g. ce:N=2,C=19,H=256,W=512,ignore_index=255",
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--suite", choices=[*SUITES, "all"], default="all")
    parser.add_argument("--case", action="append", metavar="CASE", help="instead of a suite; may be repeated")
    parser.add_argument(
        "--baselines", default="eager", help=f"any of {','.join(BASELINES)}; ratios are to the first"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="for every case, instead of its own")
    parser.add_argument("--rounds", type=int, help="rounds the medians are taken over; 11, or 5 with --quick")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds")
    parser.add_argument("--threads", type=int, help="CPU threads, otherwise torch's choice")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="write compare.png there")
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
    suites = SUITES if options.suite == "all" else [options.suite]
    specs = options.case or [spec for suite in suites for spec in SUITES[suite]]
    try:
        options.cases = [Case.parse(spec, options.dtype) for spec in specs]
    except CaseError as error:
        parser.error(str(error))
    options.baselines = list(dict.fromkeys(filter(None, options.baselines.split(","))))
    return options


def measure(
    case: Case, options: argparse.Namespace, peak: PeakMemory, left_out: dict[str, str]
) -> dict[str, Any]:
    """Everything about one case; baselines that cannot run go to `left_out` with their reason."""
    logits, target = case.inputs(options.device)
    reference = exact(case, logits, target)
    calls: dict[str, Call] = {}
    found: dict[str, dict[str, Any]] = {}
    for name in [*options.baselines, *OURS]:
        try:
            call = Call(case, name, logits, target)
            start = time.perf_counter()
            value, gradient = call()
            found[name] = {
                "first_call": time.perf_counter() - start,
                "value_error": error(value, reference[0]),
                "gradient_error": error(gradient, reference[1]),
            }
            calls[name] = call
        except Unavailable as reason:
            left_out.setdefault(name, str(reason))
        except Exception as reason:
            if name in OURS:
                raise
            left_out[f"{name} on {case.label}"] = str(reason).partition("\n")[0] or type(reason).__name__
    del reference, value, gradient
    spreads = times(calls, options.device, options.rounds, 0.01 if options.quick else 0.1)
    for name in calls:
        found[name] |= {part: asdict(spread) for part, spread in spreads[name].items()}
        found[name]["bytes_per_second"] = case.floor_bytes / spreads[name]["both"].median
        found[name]["extra_bytes"] = peak(case, name)
    baselines = [name for name in options.baselines if name in calls]
    return {
        "case": case.spec,
        "label": case.label,
        "shape": case.shape,
        "dtype": case.dtype,
        "logits_bytes": case.logits_bytes,
        "ratio_to": next(iter(baselines), None),
        "implementations": found,
        "speedup": {
            ours: {base: spreads[base]["both"].median / spreads[ours]["both"].median for base in baselines}
            for ours in OURS
            if ours in calls
        },
    }


def main() -> None:
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    console = Console() if sys.stdout.isatty() else Console(width=100)
    for path in (options.plot, options.json and options.json.parent):
        if path:
            path.mkdir(parents=True, exist_ok=True)
    peak = PeakMemory(options.device)
    left_out: dict[str, str] = {}
    cases: list[dict[str, Any]] = []
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("copy", total=len(options.cases))
        bandwidth = copy_bandwidth(options.device)
        for case in options.cases:
            progress.update(task, description=case.label)
            cases.append(measure(case, options, peak, left_out))
            progress.advance(task)
    peak.close()
    report = {
        "environment": environment(options.device),
        "rounds": options.rounds,
        "quick": options.quick,
        "copy_bytes_per_second": bandwidth,
        "cases": cases,
        "geometric_mean": geometric_means(cases),
        "left_out": [{"name": name, "reason": reason} for name, reason in left_out.items()],
    }
    print_report(console, report)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1))
        console.print(f"wrote {options.json}")
    if options.plot:
        draw(report, options.plot / "compare.png")
        console.print(f"wrote {options.plot / 'compare.png'}")


if __name__ == "__main__":
    main()
