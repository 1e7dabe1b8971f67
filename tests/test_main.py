"""`python -m fused_losses`: what it says of this installation, and that its check can fail."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fused_losses
from fused_losses import _C as native
from fused_losses import __main__ as program
from fused_losses import functional as F


def test_says_what_is_installed(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main() == 0
    said = capsys.readouterr().out
    for fact in (fused_losses.__version__, torch.__version__, platform.python_version(), native.cpu_level()):
        assert fact in said
    assert "all right" in said


def test_checks_every_loss() -> None:
    assert {name for name, *_ in program.checks("cpu")} == set(F.__all__)


def test_a_wrong_loss_fails_the_check(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = F.cross_entropy

    def wrong(input: Tensor, target: Tensor, **options: float) -> Tensor:
        return right(input, target, **options) * (1.01 if input.dtype == torch.float32 else 1.0)

    monkeypatch.setattr(F, "cross_entropy", wrong)
    assert program.main() == 1
    said = capsys.readouterr().out
    assert "WRONG in float32\n" in said
    assert "1 checks failed" in said


@pytest.mark.parametrize(("argument", "status"), [("--help", 0), ("--version", 0), ("-x", 2)])
def test_arguments(argument: str, status: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        program.main([argument])
    assert left.value.code == status
    assert "all right" not in capsys.readouterr().out


def test_a_source_tree_that_is_not_built(tmp_path: Path) -> None:
    """Found first by a Python that is started in it, whatever else is installed."""
    source = Path(fused_losses.__file__).parent
    shutil.copytree(source, tmp_path / "fused_losses", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    # An editable install finds the compiled part by itself.
    program = "import sys; sys.meta_path = [f for f in sys.meta_path if 'Editable' not in repr(f)]; import fused_losses"
    command = [sys.executable, "-c", program]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 1
    assert "no compiled part" in run.stderr.splitlines()[-1]
    assert "start Python in another folder" in run.stderr.splitlines()[-1]
