"""What compare.py found, as pictures: bars a suite, curves a sweep."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from baselines import BASELINES, OURS
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter
from report import busy

COLOURS = {
    "fused": "#1b7f5c",
    "in place": "#8fd0b5",
    "eager": "#9a9a9a",
    "compile": "#5b7fb5",
    "torchvision": "#c9954c",
    "liger": "#b5564c",
    "quack": "#8a63a8",
    "apex": "#c77fa5",
}
MARKERS = dict(zip(COLOURS, "osD^vP*X", strict=True))


def draw(report: dict[str, Any], folder: Path) -> Iterator[Path]:
    """Writes a PNG a suite and a sweep; yields their paths."""
    for suite in dict.fromkeys(case["suite"] for case in report["cases"]):
        figure = _suite(suite, [case for case in report["cases"] if case["suite"] == suite], report)
        yield _save(figure, folder / f"{suite}.png")
    for name, sweep in report["sweeps"].items():
        yield _save(_sweep(name, sweep, report), folder / f"{name}.png")


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=100)
    return path


def _title(what: str, report: dict[str, Any]) -> str:
    environment = report["environment"]
    return (
        f"{what}\n{environment['device_name']}, {environment['threads']} thread(s), "
        f"torch {environment['torch']}, {environment['date'][:10]}"
        + (f"\n{busy(report)}" if busy(report) else "")
    )


def _names(cases: list[dict[str, Any]]) -> list[str]:
    return [name for name in (*OURS, *BASELINES) if any(name in case["implementations"] for case in cases)]


def _legend(figure: Figure, names: list[str]) -> None:
    handles = [Patch(color=COLOURS[name], label=name) for name in names]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(names), frameon=False)


# -- bars ------------------------------------------------------------------------------------------------------


def _suite(suite: str, cases: list[dict[str, Any]], report: dict[str, Any]) -> Figure:
    """Speed relative to the first baseline and peak memory of every case."""
    names = _names(cases)
    large = any(
        found["extra_bytes"] is not None for case in cases for found in case["implementations"].values()
    )
    figure = Figure(figsize=(12, 1.9 + len(cases) * (0.2 * len(names) + 0.12)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True) if large else [figure.subplots()]
    _speed_bars(panels[0], cases, names, report["baselines"][0] if report["baselines"] else None)
    if large:
        _memory_bars(panels[1], cases, names)
    for axes in panels:
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
    labels = [f"{case['label'].replace(', ', chr(10), 1)}, {case['inputs']}" for case in cases]
    panels[0].set_yticks(range(len(cases)), labels)
    panels[0].set_ylim(len(cases) - 0.5, -0.5)
    _legend(figure, names)
    figure.suptitle(_title(suite, report), fontsize=11)
    return figure


def _places(names: list[str]) -> Iterator[tuple[str, float, float]]:
    """For each implementation where its bar is in the row of a case, and how thick."""
    bar = 0.8 / len(names)
    for index, name in enumerate(names):
        yield name, (index - (len(names) - 1) / 2) * bar, bar


def _speed_bars(axes: Axes, cases: list[dict[str, Any]], names: list[str], baseline: str | None) -> None:
    for name, place, bar in _places(names):
        for row, case in enumerate(cases):
            ratio = case["speedup"].get(name, {}).get(baseline)
            if ratio is None:
                continue
            # On a log axis a bar has no natural zero: it grows from 1, where both are equally fast.
            bars = axes.barh(row + place, ratio - 1, bar, left=1, color=COLOURS[name])
            # The bar of the baseline itself has no length: a tick says that it is there.
            if name == baseline:
                axes.plot([1, 1], [row + place - bar / 2, row + place + bar / 2], color=COLOURS[name], lw=4)
            text = f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}"
            axes.bar_label(bars, [text], padding=4, fontsize=8)
    ratios = [row[baseline] for case in cases for row in case["speedup"].values() if baseline in row]
    axes.set_xscale("log", base=2)
    axes.set_xlim(min(ratios, default=1) / 1.6, max([2, *ratios]) * 1.6)  # room for the labels
    axes.xaxis.set_major_formatter("{x:g}")
    axes.axvline(1, color="black", linewidth=0.8)
    with_gradient = [case["differentiable"] for case in cases]
    what = "forward + backward" if any(with_gradient) else "forward"
    if any(with_gradient) and not all(with_gradient):
        what += "\n(forward where there is no gradient)"
    axes.set_title(f"Speed of {what}, in times {baseline or 'nothing'}", fontsize=10)
    axes.set_xlabel("log axis; 1 is equally fast")


def _memory_bars(axes: Axes, cases: list[dict[str, Any]], names: list[str]) -> None:
    for name, place, bar in _places(names):
        for row, case in enumerate(cases):
            found = case["implementations"].get(name)
            if found and found["extra_bytes"] is not None:
                size = found["extra_bytes"] / case["logits_bytes"]
                bars = axes.barh(row + place, size, bar, color=COLOURS[name])
                axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
    axes.set_xlim(0, max(axes.get_xlim()[1], 2) * 1.05)
    if all(case["differentiable"] for case in cases):
        axes.axvline(1, color="black", linewidth=0.8, linestyle=":")
        axes.set_xlabel("dotted: the gradient alone")
    axes.set_title("Peak memory beyond the inputs,\nin sizes of the logits", fontsize=10)


# -- curves ----------------------------------------------------------------------------------------------------


def _sweep(name: str, sweep: dict[str, Any], report: dict[str, Any]) -> Figure:
    """Forward + backward over the sizes of one dimension, and the least time that memory allows."""
    points = sweep["points"]
    names = _names(points)
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    for implementation in names:
        found = [point for point in points if implementation in point["implementations"]]
        sizes = [point["dims"][sweep["dim"]] for point in found]
        times = [point["implementations"][implementation]["both"] for point in found]
        axes.plot(
            sizes,
            [time["median"] for time in times],
            color=COLOURS[implementation],
            marker=MARKERS[implementation],
            markersize=5,
            label=implementation,
        )
        axes.fill_between(
            sizes,
            [time["low"] for time in times],
            [time["high"] for time in times],
            color=COLOURS[implementation],
            alpha=0.2,
            linewidth=0,
        )
    sizes = [point["dims"][sweep["dim"]] for point in points]
    floor = [point["floor_bytes"] / report["copy_bytes_per_second"]["median"] for point in points]
    axes.plot(
        sizes, floor, "k--", linewidth=1.2, label="roofline: logits in and gradient out, as fast as a copy"
    )
    axes.set_xscale("log")
    axes.set_yscale("log")
    # A roofline far below every curve would squeeze them together.
    lowest = min(found["both"]["median"] for point in points for found in point["implementations"].values())
    axes.set_ylim(bottom=max(min(floor), lowest / 20))
    _mark_where_inputs_rotate(axes, points, sizes)
    axes.yaxis.set_major_formatter(EngFormatter("s"))
    axes.xaxis.set_major_locator(LogLocator(10, numticks=20))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(which="major", alpha=0.35)
    axes.grid(which="minor", alpha=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(f"{name} (log axis)")
    axes.set_ylabel("forward + backward: median, quartiles shaded (log axis)")
    figure.legend(frameon=False, loc="outside lower center", ncols=(len(names) + 2) // 2)
    fixed = ", ".join(f"{key} = {size}" for key, size in points[0]["dims"].items() if key != sweep["dim"])
    what = points[0]["label"].partition(f" {next(iter(points[0]['dims'].values()))} x ")[0]
    axes.set_title(_title(f"{what}, {points[0]['dtype']}, {fixed}, over {name}", report), fontsize=11)
    return figure


def _mark_where_inputs_rotate(axes: Axes, points: list[dict[str, Any]], sizes: list[int]) -> None:
    """A line between the last point with warm inputs and the first that reads them from memory."""
    warm = [size for size, point in zip(sizes, points, strict=True) if point["inputs"] == "warm"]
    if 0 < len(warm) < len(sizes):
        place = (warm[-1] * sizes[len(warm)]) ** 0.5
        axes.axvline(place, color="black", linewidth=0.8, linestyle=":")
        for text, side, shift in (("inputs in a cache", "right", -4), ("inputs in memory", "left", 4)):
            axes.annotate(
                text, (place, 0), (shift, 6), xycoords=("data", "axes fraction"),
                textcoords="offset points", ha=side, fontsize=8,
            )  # fmt: skip
