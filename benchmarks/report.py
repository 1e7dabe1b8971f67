"""What compare.py found, as a table, as JSON and as a picture. All of them read the same dictionary."""

from __future__ import annotations

import math
import os
import platform
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from cases import OURS
from rich.console import Console
from rich.table import Table
from rich.text import Text

import fused_losses
import fused_losses._C as native

COLOURS = {
    "fused": "#1b7f5c",
    "in place": "#8fd0b5",
    "eager": "#b0b0b0",
    "compile": "#5b7fb5",
    "torchvision": "#c9954c",
}


def environment(device: str) -> dict[str, Any]:
    """All that a reader needs to judge whether the numbers concern his machine."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device,
        "device_name": torch.cuda.get_device_name() if device == "cuda" else _cpu_model(),
        "cpu": _cpu_model(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "fused_losses": fused_losses.__version__,
        "fused_losses_cpu_level": native.cpu_level(),
        "fused_losses_cuda_architectures": native.cuda_architectures(),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def geometric_means(cases: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Speed-up of each of ours over each baseline, over the cases both of them ran."""
    ratios: dict[str, dict[str, list[float]]] = {}
    for case in cases:
        for ours, speedups in case["speedup"].items():
            for baseline, ratio in speedups.items():
                ratios.setdefault(ours, {}).setdefault(baseline, []).append(ratio)
    return {
        ours: {baseline: math.exp(sum(map(math.log, found)) / len(found)) for baseline, found in row.items()}
        for ours, row in ratios.items()
    }


# -- table -----------------------------------------------------------------------------------------------------

COLUMNS = {"": 11, "forward": 8, "backward": 8, "both": 8, "±": 4, "ratio": 7, "GB/s": 6, "of copy": 7,
           "memory": 9, "value": 7, "gradient": 8}  # fmt: skip
NOTES = (
    "Times are medians over the rounds, ± half the distance of their quartiles; ratio is to the first baseline. "
    "GB/s counts the logits read once and the gradient written once, whatever was moved; what fits a cache can "
    "exceed the copy. memory is the peak beyond the inputs, the gradient included. value and gradient are the "
    "largest errors against fp64, relative to the largest element."
)


def _seconds(value: float) -> str:
    unit, scale = next(
        ((u, s) for u, s in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)) if value >= s), ("ns", 1e-9)
    )
    digits = max(0, 2 - int(math.log10(value / scale))) if value > 0 else 0
    return f"{value / scale:.{digits}f} {unit}"


def _bytes(value: int | None) -> str:
    return "-" if value is None else f"{value / 1e6:.1f} MB"


def print_report(console: Console, report: dict[str, Any]) -> None:
    environment = report["environment"]
    console.print(
        f"{environment['device_name']}, {environment['threads']} thread(s), torch {environment['torch']}, "
        f"fused_losses on {environment['fused_losses_cpu_level']}; "
        f"a large copy moves {report['copy_bytes_per_second'] / 1e9:.1f} GB/s",
        highlight=False,
    )
    for index, case in enumerate(report["cases"]):
        baseline = case["ratio_to"]
        table = Table(
            title=Text(case["label"], style="bold"),
            title_justify="left",
            box=None,
            padding=(0, 1, 0, 0),
            show_header=index == 0,
        )
        for heading, width in COLUMNS.items():
            table.add_column(heading, width=width, justify="right" if heading else "left", no_wrap=True)
        for name, found in case["implementations"].items():
            both = found["both"]["median"]
            spread = (found["both"]["high"] - found["both"]["low"]) / 2 / both
            ratio = case["implementations"][baseline]["both"]["median"] / both if baseline else math.nan
            table.add_row(
                name,
                *(_seconds(found[part]["median"]) for part in ("forward", "backward", "both")),
                f"{spread:.0%}" if spread < 1 else ">99%",
                f"{ratio:.2f}x" if baseline else "-",
                f"{found['bytes_per_second'] / 1e9:.2f}",
                f"{found['bytes_per_second'] / report['copy_bytes_per_second']:.0%}",
                _bytes(found["extra_bytes"]),
                f"{found['value_error']:.0e}",
                f"{found['gradient_error']:.0e}",
                style="green" if name in OURS else "",
            )
        console.print(table)
    if report["cases"]:
        console.print(f"\n{NOTES}", style="dim", highlight=False)
    for ours, row in report["geometric_mean"].items():
        for baseline, ratio in row.items():
            count = sum(baseline in case["speedup"].get(ours, {}) for case in report["cases"])
            console.print(
                f"{ours}: {ratio:.2f} times as fast as {baseline} (geometric mean of {count} cases)",
                style="bold",
            )
    for entry in report["left_out"]:
        console.print(f"left out: {entry['name']}: {entry['reason']}", style="yellow", highlight=False)


# -- picture ---------------------------------------------------------------------------------------------------


def draw(report: dict[str, Any], path: Path) -> None:
    """Speed-up and peak memory of every case, side by side."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    cases = report["cases"]
    names = [name for name in COLOURS if any(name in case["implementations"] for case in cases)]
    bar = 0.8 / len(names)
    figure = Figure(figsize=(14, 2.2 + len(cases) * (0.2 * len(names) + 0.1)), layout="constrained")
    speed, memory = figure.subplots(1, 2, sharey=True)
    for index, name in enumerate(names):
        for row, case in enumerate(cases):
            found = case["implementations"].get(name)
            if not found:
                continue
            place = row + (index - (len(names) - 1) / 2) * bar
            style = {"color": COLOURS[name]}
            if case["ratio_to"] not in (None, name):
                ratio = case["implementations"][case["ratio_to"]]["both"]["median"] / found["both"]["median"]
                # On a log axis a bar has no natural zero: it grows from 1, where both are equally fast.
                bars = speed.barh(place, ratio - 1, bar, left=1, **style)
                speed.bar_label(
                    bars, [f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}"], padding=3, fontsize=8
                )
            # Resident size counts whole pages and what the interpreter does meanwhile: too coarse for small logits.
            if found["extra_bytes"] is not None and case["logits_bytes"] >= 1_000_000:
                bars = memory.barh(place, found["extra_bytes"] / case["logits_bytes"], bar, **style)
                memory.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
    speed.set_yticks(range(len(cases)), [case["label"] for case in cases])
    speed.set_ylim(len(cases) - 0.5, -0.5)
    speed.set_xscale("log", base=2)
    speed.xaxis.set_major_formatter("{x:g}")
    low, high = speed.get_xlim()
    speed.set_xlim(min(low, 0.8), max(high, 2) * 1.2)
    speed.axvline(1, color="black", linewidth=0.8)
    baselines = sorted({case["ratio_to"] for case in cases} - {None})
    speed.set_title(f"Speed of forward + backward, in times {' or '.join(baselines)}", fontsize=11)
    speed.set_xlabel("log axis")
    memory.set_xlim(0, max(memory.get_xlim()[1], 2) * 1.05)
    memory.axvline(1, color="black", linewidth=0.8, linestyle=":")
    memory.set_title("Peak memory beyond the inputs, in sizes of the logits", fontsize=11)
    memory.set_xlabel("dotted: the gradient alone; logits under 1 MB left out")
    for axes in (speed, memory):
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
    handles = [Patch(color=COLOURS[name], label=name) for name in names]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(names), frameon=False)
    environment = report["environment"]
    figure.suptitle(
        f"{environment['device_name']}, {environment['threads']} thread(s), torch {environment['torch']}, "
        f"{environment['date'][:10]}"
    )
    figure.savefig(path, dpi=110)
