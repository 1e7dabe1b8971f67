"""examples/train_digits.py on scikit-learn's digits and on small IDX files."""

from __future__ import annotations

import gzip
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

for needed in ("rich", "matplotlib"):
    pytest.importorskip(needed)

LOSSES = ["ce", "bce", "bce_logits", "focal", "softmax_focal"]


@pytest.fixture(scope="module")
def program() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parent.parent / "examples")
        yield importlib.import_module("train_digits")


def idx(array: np.ndarray) -> bytes:
    return (
        bytes([0, 0, 8, array.ndim])
        + np.array(array.shape, ">u4").tobytes()
        + array.astype(np.uint8).tobytes()
    )


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    """Four IDX files, half of them compressed: the brighter row of a 4 x 4 image is its label."""
    folder = tmp_path / "mnist"
    folder.mkdir()
    random = np.random.default_rng(0)
    for part, count in (("train", 96), ("t10k", 32)):
        labels = np.arange(count) % 4
        images = random.integers(0, 64, (count, 4, 4))
        images[np.arange(count), labels] += 190
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels))
    return folder


@pytest.mark.parametrize("loss", LOSSES)
def test_both_criteria_train_alike(
    program: ModuleType, mnist: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], loss: str
) -> None:
    picture = tmp_path / "curves.png"
    arguments = ["--data", str(mnist), "--loss", loss, "--criterion", "both", "--batch-size", "16"]
    program.main([*arguments, "--epochs", "5", "--plot", str(picture)])
    output = capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert len(re.findall(r"^(?:torch|fused) +accuracy 100.00%.* us a step", output, re.M)) == 2
    found = re.search(r"largest difference of the losses (\S+), of the final weights (\S+)", output)
    assert found is not None
    assert float(found[1]) < 1e-5
    assert float(found[2]) < 1e-5


@pytest.mark.parametrize("criterion", ["torch", "fused"])
def test_digits_of_scikit_learn(
    program: ModuleType, capsys: pytest.CaptureFixture[str], criterion: str
) -> None:
    pytest.importorskip("sklearn")
    program.main(["--epochs", "1", "--criterion", criterion])
    found = re.search(rf"^{criterion} +accuracy (\d+\.\d+)%", capsys.readouterr().out, re.M)
    assert found is not None
    assert float(found[1]) > 50


def test_picture_of_one_curve(program: ModuleType, mnist: Path, tmp_path: Path) -> None:
    picture = tmp_path / "curve.png"
    program.main(["--data", str(mnist), "--epochs", "1", "--plot", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_broken_data_is_named(program: ModuleType, mnist: Path) -> None:
    def message() -> str:
        with pytest.raises(SystemExit) as raised:
            program.main(["--data", str(mnist), "--epochs", "1"])
        return str(raised.value)

    labels = mnist / "train-labels-idx1-ubyte"
    images = mnist / "train-images-idx3-ubyte.gz"
    intact = labels.read_bytes()
    labels.write_bytes(intact[:-1])
    assert message().endswith(f"{labels} should hold 96 bytes after its header, but holds 95")
    labels.write_bytes(b"\x89PNG" + intact)
    assert message().endswith(
        f"{labels} is not an IDX file of bytes: it starts with 89 50 4e 47, not 00 00 08"
    )
    labels.write_bytes(idx(np.zeros(95)))
    assert "the train images have shape (96, 4, 4), their labels (95,)" in message()
    labels.write_bytes(intact)
    images.write_bytes(images.read_bytes()[:-9])
    assert f"cannot read {images}" in message()
    images.unlink()
    assert message().endswith("no train-images-idx3-ubyte or train-images-idx3-ubyte.gz in it")


def test_missing_folder_is_named(program: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="nowhere: no such folder"):
        program.main(["--data", str(tmp_path / "nowhere")])


def test_bad_options_are_named(program: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    for option, value, problem in (
        ("--batch-size", "0", "--batch-size must be at least 1, got 0"),
        ("--seed", "-1", "--seed must be from 0 to"),
        ("--plot", "nowhere/a.png", "--plot nowhere/a.png: there is no folder nowhere"),
    ):
        with pytest.raises(SystemExit):
            program.main([option, value])
        assert problem in capsys.readouterr().err
