"""The core of the suite again at every instruction set this CPU has below the one chosen for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fused_losses import _C

VARIABLE = "FUSED_LOSSES_CPU_LEVEL"
# The parent runs at one level; a child would otherwise start children of its own.
CHILD = os.environ.get(VARIABLE) is not None
TESTS = ["test_cross_entropy.py", "test_bce.py", "test_focal.py", "test_detection.py", "test_pairwise.py"]
TESTS += ["test_distribution_focal.py", "test_vector_math.py", "test_autocast.py"]


def run(*command: str, level: str | None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment.pop(VARIABLE, None)
    if level is not None:
        environment[VARIABLE] = level
    return subprocess.run(
        [sys.executable, *command],
        cwd=Path(__file__).parent,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def level_in_use(level: str | None) -> subprocess.CompletedProcess[str]:
    return run("-c", "import torch; from fused_losses import _C; print(_C.cpu_level())", level=level)


def test_levels_of_this_machine() -> None:
    levels = _C.cpu_levels()
    assert levels[0] == "baseline"
    assert set(levels) <= {"baseline", "avx2", "avx512"}
    assert _C.cpu_level() in levels


@pytest.mark.skipif(CHILD, reason="the level is already chosen")
def test_the_best_level_is_the_default() -> None:
    assert level_in_use(None).stdout.strip() == _C.cpu_levels()[-1] == _C.cpu_level()


@pytest.mark.parametrize("level", _C.cpu_levels())
def test_the_variable_chooses(level: str) -> None:
    assert level_in_use(level).stdout.strip() == level


@pytest.mark.parametrize("level", ["sse9", "baseline,avx2"])
def test_a_wrong_level_is_an_error(level: str) -> None:
    result = level_in_use(level)
    assert result.returncode != 0
    assert VARIABLE in result.stderr
    assert level in result.stderr
    assert "baseline" in result.stderr


@pytest.mark.skipif(CHILD, reason="the level is already chosen")
@pytest.mark.parametrize("level", _C.cpu_levels()[:-1])
def test_core_at_level(level: str) -> None:
    options = ["-q", "-x", "--tb=short", "-p", "no:cacheprovider", "-m", "every_level"]
    result = run("-m", "pytest", *options, *TESTS, level=level)
    assert result.returncode == 0, f"at {level}:\n{result.stdout[-4000:]}{result.stderr[-2000:]}"
