"""The losses by the Functions of Python, which serve beside a PyTorch that the compiled ones are not for."""

from __future__ import annotations

import subprocess
import sys

import pytest
from test_autograd import *  # noqa: F403

from fused_losses import _autograd


@pytest.fixture(autouse=True)
def in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_autograd, "native_autograd", None)


ANOTHER_RELEASE = """
import sys
import torch

torch.__version__ = "2.12.0"
import fused_losses.functional as F

assert not any("native_autograd" in name for name in sys.modules)
logits = torch.randn(3, 4, requires_grad=True)
loss = F.cross_entropy(logits, torch.tensor([0, 1, 2]))
loss.backward()
print(loss.grad_fn.name(), logits.grad.isfinite().all().item())
"""


def test_another_release_of_torch() -> None:
    run = subprocess.run([sys.executable, "-c", ANOTHER_RELEASE], capture_output=True, text=True)
    assert run.stdout.split() == ["StoredBackward", "True"], run.stderr
