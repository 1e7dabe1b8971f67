"""Writes the README's performance section from the newest result of each device, and of each instruction set of a CPU,
in benchmarks/results.

python benchmarks/readme_table.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from baselines import OURS
from report import busy, seconds

ROOT = Path(__file__).parent.parent
START = "<!-- what follows, up to the next such line, is written by benchmarks/readme_table.py -->"
END = "<!-- end -->"


def newest(results: Path) -> list[Path]:
    """The newest result of each device, a GPU's first, and of each level of the CPU kernels."""
    found: dict[tuple[str, str], tuple[str, Path]] = {}
    for path in results.glob("*/results.json"):
        environment = json.loads(path.read_text())["environment"]
        device = environment["device"]
        kind = device, environment["fused_losses_cpu_level"] if device == "cpu" else ""
        found[kind] = max(found.get(kind, ("", path)), (environment["date"], path))
    return [found[kind][1] for kind in sorted(found, reverse=True)]


def rewritten(readme: str, paths: list[Path]) -> str:
    """`readme` with the sections of these results between its markers."""
    before, _, rest = readme.partition(START)
    _, end, after = rest.partition(END)
    if not end:
        raise SystemExit(f"README.md has no {START} ... {END}")
    return "\n\n".join([before + START, *map(section, paths), END + after])


def section(path: Path) -> str:
    report = json.loads(path.read_text())
    folder = path.parent.relative_to(ROOT).as_posix()
    baselines = [
        name for name in report["baselines"] if any(name in c["implementations"] for c in report["cases"])
    ]
    heading = [
        "case",
        *baselines,
        "fused",
        *(f"x {name}" for name in baselines),
        "in place",
        "of copy",
        "memory",
    ]
    lines = [
        f"### {_machine(report)}\n",
        _conditions(report, folder),
        f"\n| {' | '.join(heading)} |",
        f"|---{'|--:' * (len(heading) - 1)}|",
        *(_row(case, baselines, report["copy_bytes_per_second"]["median"]) for case in report["cases"]),
        f"\n{_means(report, baselines)}",
    ]
    pictures = [f"![time over {name}]({folder}/{name}.png)" for name in report["sweeps"]]
    return "\n".join(lines) + "".join(f"\n\n{picture}" for picture in pictures)


def _machine(report: dict[str, Any]) -> str:
    environment = report["environment"]
    if environment["device"] == "cuda":
        return str(environment["device_name"])
    threads = environment["threads"]
    plural = "s" if threads > 1 else ""
    return f"{environment['device_name']}, {environment['fused_losses_cpu_level']}, {threads} thread{plural}"


def _conditions(report: dict[str, Any], folder: str) -> str:
    environment = report["environment"]
    text = (
        f"Forward + backward on {environment['date'][:10]}, torch {environment['torch']}, "
        f"medians of {report['rounds']} {'short ' if report['quick'] else ''}interleaved rounds; a large copy moves "
        f"{report['copy_bytes_per_second']['median'] / 1e9:.0f} GB/s. *of copy* is in place's share of it, counting the "
        "logits read once and the gradient written once; *memory* is the peak beyond the inputs, "
        f"{' / '.join([*report['baselines'][:1], *OURS])}. Everything measured, and a picture a suite, is in "
        f"[{folder}]({folder})."
    )
    return text + (f" **{busy(report)}**" if busy(report) else "")


def _row(case: dict[str, Any], baselines: list[str], copy: float) -> str:
    found = case["implementations"]

    def time(name: str) -> str:
        return seconds(found[name]["both"]["median"]) if name in found else ""

    def memory(name: str) -> str:
        size = found[name]["extra_bytes"] if name in found else None
        return "-" if size is None else f"{size / 1e6:.0f}"

    ratios = case["speedup"]["fused"]
    in_place = found.get("in place")
    cells = [
        case["label"],
        *map(time, baselines),
        time("fused"),
        *(
            f"**{ratios[name]:.{1 if ratios[name] < 100 else 0}f}**" if name in ratios else ""
            for name in baselines
        ),
        time("in place"),
        f"{in_place['bytes_per_second'] / copy:.0%}" if in_place else "",
        " / ".join(map(memory, [*baselines[:1], *OURS])) + " MB" if found["fused"]["extra_bytes"] else "",
    ]
    return f"| {' | '.join(cells)} |"


def _means(report: dict[str, Any], baselines: list[str]) -> str:
    def ratios(suite: str, name: str) -> str:
        row = report["geometric_mean"][suite][name]
        return " and ".join(
            f"{row[baseline]:.1f} times {baseline}" for baseline in baselines if baseline in row
        )

    suites = ", ".join(
        f"{suite} {ratios(suite, 'fused')}" for suite in report["geometric_mean"] if suite != "all"
    )
    return (
        f"Geometric means over the losses: {ratios('all', 'fused')}; in place {ratios('all', 'in place')}. "
        f"By suite: {suites}."
    )


def main() -> None:
    readme = ROOT / "README.md"
    readme.write_text(rewritten(readme.read_text(), newest(ROOT / "benchmarks" / "results")))


if __name__ == "__main__":
    main()
