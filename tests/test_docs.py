"""The examples of README.md and docs/ run: every block of Python, in one namespace a file.

A block that is not meant to run stands under a comment that says why: `<!-- not run: needs torchvision -->`.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).parents[1]
FILES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_NOT_RUN = re.compile(r"<!-- not run: \S.*-->\s*\Z")


def blocks(text: str) -> list[tuple[int, str]]:
    """The line before each block's first, and its code."""
    found = []
    for match in _BLOCK.finditer(text):
        if not _NOT_RUN.search(text[: match.start()]):
            found.append((text.count("\n", 0, match.start(1)), match[1]))
    return found


def given() -> dict[str, Any]:
    """What every file may use without a word: a classifier of 10 classes, its images and their labels."""
    return {
        "__name__": "example",
        "model": nn.Sequential(nn.Flatten(), nn.Linear(64, 10)),
        "images": torch.rand(32, 1, 8, 8),
        "labels": torch.randint(10, (32,)),
    }


def run(path: Path) -> None:
    names = given()
    for line, code in blocks(path.read_text()):
        exec(compile("\n" * line + code, str(path), "exec"), names)  # a traceback names the line of the file


def test_examples_run() -> None:
    """In a process of their own: an example may patch torch, or register an adapter, for good."""
    done = subprocess.run([sys.executable, __file__, *map(str, FILES)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_blocks_are_found() -> None:
    text = (
        "text\n```python\na = 1\n\nb\n```\n<!-- not run: a reason -->\n```python\nc\n```\n```text\nd\n```\n"
    )
    assert blocks(text) == [(2, "a = 1\n\nb\n")]
    assert len(blocks(text.replace("not run: a reason", "not run:"))) == 2  # a reason is needed
    assert any(path.name == "README.md" and blocks(path.read_text()) for path in FILES)


def test_a_broken_example_fails(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text("one\ntwo\n```python\nassert images.shape == (32, 1, 8, 8)\nassert labels is None\n```\n")
    failed = subprocess.run([sys.executable, __file__, str(path)], capture_output=True, text=True)
    assert failed.returncode != 0
    assert f'"{path}", line 5' in failed.stderr


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        torch.manual_seed(0)
        run(Path(argument))
