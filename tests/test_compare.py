"""benchmarks/compare.py as people run it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

COMPARE = Path(__file__).parent.parent / "benchmarks" / "compare.py"


def compare(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, COMPARE, *arguments], capture_output=True, text=True, timeout=300)


def test_table_json_and_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file, pictures = tmp_path / "new" / "compare.json", tmp_path / "pictures"
    result = compare(
        *("--quick", "--rounds", "3", "--threads", "1", "--device", "cpu", "--baselines", "eager,nonesuch"),
        *("--case", "ce:N=33,C=7,dtype=bf16,label_smoothing=0.1", "--case", "bce:N=8,C=3,reduction=none"),
        *("--json", str(file), "--plot", str(pictures)),
    )
    assert result.returncode == 0, result.stderr
    assert (pictures / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert "cross entropy 33 x 7, bf16, label_smoothing=0.1" in result.stdout
    assert "left out: nonesuch" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 100

    report = json.loads(file.read_text())
    assert report["rounds"] == 3
    assert report["copy_bytes_per_second"] > 0
    assert report["environment"]["threads"] == 1
    assert {"date", "cpu", "torch", "python", "fused_losses_cpu_level"} <= report["environment"].keys()
    assert {"nonesuch", "in place"} == {entry["name"] for entry in report["left_out"]}

    first, second = report["cases"]
    assert set(first["implementations"]) == {"eager", "fused", "in place"}
    assert set(second["implementations"]) == {"eager", "fused"}
    for case in (first, second):
        for found in case["implementations"].values():
            assert 0 < found["both"]["low"] <= found["both"]["median"] <= found["both"]["high"]
            assert found["bytes_per_second"] > 0
            assert 0 <= found["value_error"] < 1e-2
            assert 0 <= found["gradient_error"] < 1e-2
        times = {name: found["both"]["median"] for name, found in case["implementations"].items()}
        assert case["speedup"]["fused"]["eager"] == pytest.approx(times["eager"] / times["fused"])
    product = first["speedup"]["fused"]["eager"] * second["speedup"]["fused"]["eager"]
    assert report["geometric_mean"]["fused"]["eager"] == pytest.approx(product**0.5)


ERRORS = {
    "--case nll:N=4,C=2": "no loss 'nll'; there are ce, bce_logits",
    "--case ce:N=4,C=2,smoothing=0.1": "ce has no 'smoothing'",
    "--case ce:N=four,C=2": "N must be int, not 'four'",
    "--case ce:N=4": "C missing",
    "--case ce:N=4,C=0": "every dimension must be at least 1",
    "--case ce:N=4,C=2,dtype=int8": "dtype must be one of fp32, bf16, fp16, fp64, not 'int8'",
    "--case ce:N=4,C=2,reduction=max": "reduction must be none, mean or sum, not 'max'",
    "--rounds 0": "--rounds must be at least 1, got 0",
}

# In a process of its own, where `cases` is the one beside compare.py; one for all, since importing torch takes long.
PARSE_EACH = """
import sys, compare
compare.parse([])
for line in sys.argv[1:]:
    try:
        compare.parse(line.split())
    except SystemExit as stop:
        print(f"exit {stop.code}", file=sys.stderr)
"""


def test_errors_are_one_clear_line() -> None:
    command = [sys.executable, "-c", PARSE_EACH, *ERRORS]
    result = subprocess.run(command, cwd=COMPARE.parent, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("exit 2") == len(ERRORS)
    messages = [line for line in result.stderr.splitlines() if ": error: " in line]
    assert len(messages) == len(ERRORS)
    for message, expected in zip(messages, ERRORS.values(), strict=True):
        assert expected in message
