"""`python -m fused_losses`: what it says of this installation, and that its check can fail."""

from __future__ import annotations

import platform

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
