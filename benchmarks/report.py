"""What compare.py found, as tables in a terminal. pictures.py draws the same dictionary."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

from baselines import OURS
from rich.console import Console
from rich.table import Table
from rich.text import Text

NOTES = (
    "Times are medians over interleaved rounds of each round's median call, ± half the distance of the quartiles; 2.00x under times "
    "eager is twice as fast as eager. GB/s counts the logits read once and the gradient written once, whatever was "
    "moved; of copy is its share of a large copy's. Warm inputs are the same in every call and sit in a cache, where GB/s can exceed the "
    "copy; rotating ones are several sets in turn, twice the last-level cache together, so that every call reads "
    "memory. In place works on a copy made outside of the clock. memory is the peak beyond the inputs, the gradient "
    "included; on a CPU, logits under 1 MB are below what can be measured. Errors are the largest of value and of gradient against fp64, relative to the largest element."
)


def geometric_means(cases: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Speed-up of each of ours over each baseline, over the losses both ran: for each suite, and for all."""
    ratios: dict[str, dict[str, dict[str, list[float]]]] = {}
    for case in cases:
        for ours in OURS if case["differentiable"] else ():
            for baseline, ratio in case["speedup"].get(ours, {}).items():
                for suite in (case["suite"], "all"):
                    row = ratios.setdefault(suite, {}).setdefault(ours, {})
                    row.setdefault(baseline, []).append(ratio)
    return {
        suite: {
            ours: {
                baseline: math.exp(sum(map(math.log, found)) / len(found)) for baseline, found in row.items()
            }
            for ours, row in rows.items()
        }
        for suite, rows in ratios.items()
    }


# -- numbers ---------------------------------------------------------------------------------------------------


def seconds(value: float) -> str:
    if value == 0:
        return "0"
    unit, scale = next(
        ((u, s) for u, s in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)) if value >= s), ("ns", 1e-9)
    )
    digits = max(0, 2 - int(math.log10(value / scale)))
    return f"{value / scale:.{digits}f} {unit}"


def _bytes(value: int | None) -> str:
    return "-" if value is None else f"{value / 1e6:.{0 if value >= 1e8 else 1}f} MB"


def _spread(found: dict[str, float]) -> str:
    spread = (found["high"] - found["low"]) / 2 / found["median"]
    return f"{spread:.0%}" if spread < 1 else ">99%"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x" if value < 100 else f"{value:.0f}x"


def _error(value: float | None) -> str:
    return "-" if value is None else f"{value:.0e}"


def state(case: dict[str, Any]) -> str:
    """Whether the inputs were in a cache."""
    return case["inputs"] if case["input_sets"] == 1 else f"{case['inputs']} over {case['input_sets']} sets"


# -- tables ----------------------------------------------------------------------------------------------------


def _table(title: Text, columns: dict[str, int], show_header: bool) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0), show_header=show_header)
    for index, (heading, width) in enumerate(columns.items()):
        table.add_column(heading, width=width, justify="right" if index else "left", no_wrap=True)
    return table


def _title(case: dict[str, Any]) -> Text:
    return Text.assemble((case["label"], "bold"), (f"  {state(case)}", "dim"))


def _baselines(report: dict[str, Any]) -> list[str]:
    """Those that ran somewhere, in the order they were asked for."""
    points = _points(report)
    return [name for name in report["baselines"] if any(name in case["implementations"] for case in points)]


def _points(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Every case, those of sweeps included."""
    return [*report["cases"], *(point for sweep in report["sweeps"].values() for point in sweep["points"])]


def print_report(console: Console, report: dict[str, Any]) -> None:
    print_environment(console, report)
    _print_cases(console, report)
    for name, sweep in report["sweeps"].items():
        _print_sweep(console, name, sweep, report)
    if report["cases"] or report["sweeps"]:
        console.print(f"\n{NOTES}", style="dim", highlight=False)
    _print_remarks(console, report)
    means = report["geometric_mean"]
    for suite, rows in means.items() if len(means) > 2 else [("all", means["all"])] if means else []:
        for ours, row in rows.items():
            ratios = ", ".join(f"{ratio:.2f} x {baseline}" for baseline, ratio in row.items())
            console.print(f"geometric mean, {suite}: {ours} {ratios}", style="bold" if suite == "all" else "")
    for entry in report["left_out"]:
        console.print(f"left out: {entry['name']}: {entry['reason']}", style="yellow", highlight=False)


def print_environment(console: Console, report: dict[str, Any]) -> None:
    environment, copy = report["environment"], report["copy_bytes_per_second"]
    console.print(
        f"{environment['device_name']}, {environment['threads']} thread(s), torch {environment['torch']}, "
        f"fused_losses {environment['fused_losses_commit'] or environment['fused_losses']} "
        f"on {environment['fused_losses_cpu_level']}, {environment['date'][:10]}; "
        f"a large copy moves {copy['median'] / 1e9:.1f} GB/s ± {_spread(copy)}, "
        f"the last-level cache holds {environment['last_level_cache_bytes'] / 2**20:.0f} MiB",
        highlight=False,
    )
    if warning := busy(report):
        console.print(warning, style="red", highlight=False)


def busy(report: dict[str, Any]) -> str:
    """A warning where the machine was not ours."""
    taken = report["cpu_taken_by_others"]
    return f"Others took {taken:.0%} of the CPU time: these times are worth little." if taken > 0.05 else ""


def _print_cases(console: Console, report: dict[str, Any]) -> None:
    baselines = _baselines(report)
    columns = {"": max(map(len, ["in place", *baselines])), "forward": 7, "back-\nward": 7, "both": 7, "±": 4}
    columns |= {f"times\n{name}": max(7, len(name)) for name in baselines}
    columns |= {"GB/s": 5, "of\ncopy": 4, "memory": 7, "value\nerror": 5, "grad.\nerror": 5}
    suite = None
    for case in report["cases"]:
        if suite != case["suite"]:
            console.print(f"\n{case['suite']}", style="bold underline")
        table = _table(_title(case), columns, show_header=suite != case["suite"])
        suite = case["suite"]
        for name, found in case["implementations"].items():
            rate = found["bytes_per_second"]
            table.add_row(
                name,
                seconds(found["forward"]["median"]),
                seconds(found["backward"]["median"]) if case["differentiable"] else "-",
                seconds(found["both"]["median"]),
                _spread(found["both"]),
                *(_ratio(case["speedup"][name].get(baseline)) for baseline in baselines),
                f"{rate / 1e9:.{1 if rate < 1e12 else 0}f}",
                f"{rate / report['copy_bytes_per_second']['median']:.0%}",
                _bytes(found["extra_bytes"]),
                _error(found["value_error"]),
                _error(found["gradient_error"]),
                style="green" if name in OURS else "",
            )
        console.print(table)


def _print_sweep(console: Console, name: str, sweep: dict[str, Any], report: dict[str, Any]) -> None:
    """Forward + backward of every implementation, a line a size; the floor beside them."""
    names = [*_baselines(report), *OURS]
    columns = {name: 8, "inputs": 20} | {name: max(8, len(name)) for name in names} | {"at copy speed": 13}
    console.print(f"\n{name}, from {sweep['points'][0]['label']} on", style="bold underline")
    table = _table(Text(), columns, show_header=True)
    for case in sweep["points"]:
        found = case["implementations"]
        table.add_row(
            str(case["dims"][sweep["dim"]]),
            state(case),
            *(seconds(found[name]["both"]["median"]) if name in found else "-" for name in names),
            seconds(case["floor_bytes"] / report["copy_bytes_per_second"]["median"]),
        )
    console.print(table)


def _print_remarks(console: Console, report: dict[str, Any]) -> None:
    found = [case["implementations"] for case in report["cases"]]
    compiled = [row["compile"]["first_call"] for row in found if "compile" in row]
    if compiled:
        console.print(
            f"compile took {min(compiled):.1f} to {max(compiled):.1f} s a case before its first result; "
            "not counted above",
            style="dim",
            highlight=False,
        )
    if waiting := sorted({name for row in found for name in row if not row[name]["queued_ahead"]}):
        console.print(
            f"{', '.join(waiting)} could not be queued ahead of the device in every case: those times include "
            "waiting for the host",
            style="dim",
            highlight=False,
        )


# -- two runs side by side -------------------------------------------------------------------------------------

ENVIRONMENT = (
    "device_name",
    "threads",
    "torch",
    "fused_losses_commit",
    "fused_losses_cpu_level",
)


def print_diff(console: Console, a_path: Path, b_path: Path) -> None:
    """Forward + backward of what two reports have in common, and what changed by more than both spreads."""
    a, b = (_read(path) for path in (a_path, b_path))
    for letter, path, report in (("A", a_path, a), ("B", b_path, b)):
        environment = report["environment"]
        console.print(f"{letter}: {path}, {environment['date']}", style="bold", highlight=False)
    for key in ENVIRONMENT:
        before, after = a["environment"][key], b["environment"][key]
        if before != after:
            console.print(f"   {key}: {before} -> {after}", highlight=False)
    copies = [report["copy_bytes_per_second"]["median"] / 1e9 for report in (a, b)]
    console.print(f"   copy: {copies[0]:.1f} -> {copies[1]:.1f} GB/s", highlight=False)
    taken = [report["cpu_taken_by_others"] for report in (a, b)]
    console.print(f"   CPU time taken by others: {taken[0]:.0%} -> {taken[1]:.0%}", highlight=False)

    ratios: dict[str, list[float]] = {}
    others = {case["case"]: case for case in _points(b)}
    columns = {"": 12, "A": 9, "± A": 5, "B": 9, "± B": 5, "B is": 13}
    shown = False
    for case in {case["case"]: case for case in _points(a)}.values():
        other = others.pop(case["case"], None)
        if other is None:
            console.print(f"only in A: {case['label']}", style="yellow", highlight=False)
            continue
        table = _table(_title(case), columns, show_header=not shown)
        shown = True
        for name in [name for name in case["implementations"] if name in other["implementations"]]:
            before, after = (run["implementations"][name]["both"] for run in (case, other))
            ratios.setdefault(name, []).append(before["median"] / after["median"])
            verdict, style = _verdict(before, after)
            table.add_row(
                name,
                *(
                    seconds(before["median"]),
                    _spread(before),
                    seconds(after["median"]),
                    _spread(after),
                    verdict,
                ),
                style=style,
            )
        console.print(table)
    for case in others.values():
        console.print(f"only in B: {case['label']}", style="yellow", highlight=False)
    for name, found in ratios.items():
        mean = math.exp(sum(map(math.log, found)) / len(found))
        console.print(f"geometric mean of {len(found)}: {name} {mean:.2f} times as fast in B", style="bold")
    console.print("faster and slower: the quartiles of A and B do not overlap", style="dim")


def _read(path: Path) -> dict[str, Any]:
    try:
        report: dict[str, Any] = json.loads(path.read_text())
        _points(report), report["environment"]["date"]  # there, or this is something else
    except OSError as error:
        sys.exit(f"compare.py: {path} cannot be read: {error.strerror}")
    except (ValueError, KeyError, TypeError):
        sys.exit(f"compare.py: {path} is no file of --json")
    return report


def _verdict(before: dict[str, float], after: dict[str, float]) -> tuple[str, str]:
    if after["high"] < before["low"]:
        return f"{before['median'] / after['median']:.2f}x faster", "green"
    if after["low"] > before["high"]:
        return f"{after['median'] / before['median']:.2f}x slower", "red"
    return "the same", "dim"
