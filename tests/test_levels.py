"""The core of the suite again at every instruction set this CPU has below the one chosen for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_build import copy_tree
from test_build import run as run_in

from fused_losses import _C

VARIABLE = "FUSED_LOSSES_CPU_LEVEL"
# The parent runs at one level; a child would otherwise start children of its own.
CHILD = os.environ.get(VARIABLE) is not None
TESTS = ["test_cross_entropy.py", "test_bce.py", "test_focal.py", "test_detection.py", "test_pairwise.py"]
TESTS += ["test_distribution_focal.py", "test_vector_math.py", "test_autocast.py"]


def run(*command: str, level: str | None, package: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment.pop(VARIABLE, None)
    if package is not None:
        environment["PYTHONPATH"] = str(package)
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


def run_core(level: str, package: Path | None = None) -> None:
    options = ["-q", "-x", "--tb=short", "-p", "no:cacheprovider", "-m", "every_level"]
    result = run("-m", "pytest", *options, *TESTS, level=level, package=package)
    assert result.returncode == 0, f"at {level}:\n{result.stdout[-4000:]}{result.stderr[-2000:]}"


@pytest.mark.skipif(CHILD, reason="the level is already chosen")
@pytest.mark.parametrize("level", _C.cpu_levels()[:-1])
def test_core_at_level(level: str) -> None:
    run_core(level)


@pytest.mark.skipif(CHILD, reason="the level is already chosen")
@pytest.mark.skipif(_C.cpu_levels()[-1] != "avx2", reason="where AVX2 is the best there is")
def test_core_at_avx512_without_it(tmp_path: Path) -> None:
    """The same source, its intrinsics replaced: what it computes, but not the instructions the compiler makes of it."""
    tree = copy_tree(tmp_path / "tree")
    header = Path(__file__).with_name("avx512_on_avx2.h")
    edit(
        tree / "csrc/cpu/level_avx512.cpp",
        ('target("avx512f,avx512bw,avx512dq,avx512vl,avx2,', 'target("avx2,'),
        ('#include "cpu/level_headers.h"\n', f'#include "cpu/level_headers.h"\n#include "{header}"\n'),
    )
    edit(tree / "csrc/cpu/kernels.cpp", ('__builtin_cpu_supports("avx512', 'sizeof("avx512'))
    run_in(sys.executable, "setup.py", "--quiet", "build_ext", "--inplace", cwd=tree)
    run_core("avx512", package=tree)


def edit(path: Path, *changes: tuple[str, str]) -> None:
    text = path.read_text()
    for before, after in changes:
        assert before in text, f"{path.name} has no {before!r}"
        text = text.replace(before, after)
    path.write_text(text)
