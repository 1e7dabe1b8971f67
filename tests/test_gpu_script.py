"""benchmarks/gpu.py, as far as it goes without a GPU: its steps, its measurements on small tensors, what it says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu

    return gpu


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_says_that_there_is_no_gpu() -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu.py"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"gpu.py: PyTorch {torch.__version__} sees no CUDA device")
    assert "Traceback" not in done.stderr


HANGS = """
import time
try:
    time.sleep(100)
except KeyboardInterrupt:
    print("what there is", flush=True)
    time.sleep(100)
"""


def test_a_step_that_fails_does_not_stop_the_next(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = sys.executable
    monkeypatch.setattr(gpu, "GRACE", 1)
    todo = [
        gpu.Step(
            "fails", [python, "-c", "print('so much ' * 100_000); print('for that'); raise SystemExit(3)"], 60
        ),
        gpu.Step("hangs", [python, "-c", HANGS], 10),  # a busy machine takes seconds to start it
        gpu.Step("lacks", [python, "-c", ""], 60, ("no_such_module", "bin:no-such-program", "sys")),
        gpu.Step("works", [python, "-c", "import os; print(os.environ['WORD'])"], 60, (), {"WORD": "done"}),
    ]
    assert gpu.run_all(todo, {"gpu": "none"}, tmp_path) == 1
    steps = json.loads((tmp_path / "summary.json").read_text())["steps"]
    assert [step["state"] for step in steps] == ["failed", "out of time", "left out", "ok"]
    assert [step["said"] for step in steps] == [
        "for that",
        "what there is",
        "not installed here: no_such_module, no-such-program",
        "done",
    ]
    assert (tmp_path / "gpu.log").stat().st_size < 500_000
    assert "out of time" in (tmp_path / "summary.txt").read_text()
    assert gpu.run_all(todo[3:], {}, tmp_path) == 0
    assert gpu.run_all(todo[3:], {}, tmp_path, budget=1) == 0
    assert "no time was left" in (tmp_path / "summary.txt").read_text()


def test_bandwidth_on_small_tensors(gpu: Any, tmp_path: Path) -> None:
    goals = [(name, (6, *shape[1:-1], 7), dtype) for name, shape, dtype in gpu.GOALS]
    gpu.bandwidth("cpu", tmp_path, goals, [*gpu.SMALL, ("no such loss", (1, 2), "no such dtype")], 1 << 20)
    report = json.loads((tmp_path / "bandwidth.json").read_text())
    assert [("error" in case) for case in report["cases"]] == [False, False, True] + [False] * len(goals)
    for case in report["cases"]:
        if "error" not in case:
            assert case["bytes_per_second"] == pytest.approx(case["bytes"] / case["fused"])
            assert case["of_copy"] == pytest.approx(
                case["bytes_per_second"] / report["copy_bytes_per_second"]
            )
    text = gpu.table({}, [], tmp_path)
    assert "cross_entropy 6 x 7 bfloat16" in text


def test_the_cases_to_compare(gpu: Any) -> None:
    program = "from cases import Case; import sys; print({Case.parse(case).label for case in sys.argv[1:]})"
    done = subprocess.run(  # there is another `cases` here
        [sys.executable, "-c", program, *gpu.COMPARED],
        cwd=ROOT / "benchmarks",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_workload(gpu: Any) -> None:
    gpu.workload("cpu")
