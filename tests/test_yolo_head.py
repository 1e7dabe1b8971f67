"""examples/yolo_head.py: its pictures, its assignment and its metric, and that both criteria train alike."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

for needed in ("rich", "matplotlib", "pycocotools"):
    pytest.importorskip(needed)


@pytest.fixture(scope="module")
def program() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parent.parent / "examples")
        yield importlib.import_module("yolo_head")


def draw(program: ModuleType, number: int, seed: int) -> Any:
    return program.draw_pictures(number, seed, "pictures", program.CONSOLE)


@pytest.mark.parametrize("loss", ["bce", "focal", "varifocal"])
def test_both_criteria_train_alike(
    program: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], loss: str
) -> None:
    tiny = ["--pictures", "24", "--test-pictures", "4", "--batch-size", "8", "--epochs", "1", "--width", "4"]
    program.main([*tiny, "--loss", loss, "--criterion", "both", "--out", str(tmp_path)])
    output = capsys.readouterr().out
    assert len(re.findall(r"^(?:torch|fused) +mAP@0.5 0\.\d+, .* ms and \S+ MB a step$", output, re.M)) == 2
    found = re.search(r"difference of the losses: first step (\S+), largest (\S+)", output)
    assert found is not None
    # Of losses around 20: after the first step the weights differ by a rounding error of Adam's quotients.
    assert float(found[1]) < 1e-5
    assert float(found[2]) < 1e-2
    for name in ("boxes", "loss"):
        assert (tmp_path / f"yolo_head_{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_criteria_give_the_same_gradients(program: ModuleType) -> None:
    logits, distribution = torch.randn(2, 50, 6) - 3, torch.randn(9, 4, program.BINS)
    label = torch.randint(6, (2, 50)).where(torch.rand(2, 50) < 0.2, -1)
    quality = torch.rand(2, 50) * (label >= 0)
    distance, weight = torch.rand(9, 4) * (program.BINS - 1.01), torch.rand(9)
    for total in (quality.sum(), quality.sum() * 0):  # no positives: divided by 1
        for loss in ("bce", "focal", "varifocal"):
            values, gradients = [], []
            for criterion in program.CRITERIA.values():
                leaves = [logits.clone().requires_grad_(), distribution.clone().requires_grad_()]
                value = criterion().classes(loss, leaves[0], label, quality, total)
                value = value + criterion().boxes(leaves[1], distance, weight, total)
                values.append(value)
                gradients.append(torch.autograd.grad(value, leaves))
            torch.testing.assert_close(*values)
            torch.testing.assert_close(*gradients)


def test_pictures_depend_on_the_seed_alone(program: ModuleType) -> None:
    first, again, other = (draw(program, 6, seed) for seed in (1, 1, 2))
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.boxes, again.boxes)
    assert not torch.equal(first.images, other.images)
    assert (first.labels >= 0).any(1).all()
    assert ((first.boxes >= 0) & (first.boxes <= program.SIZE)).all()


@pytest.mark.parametrize("turn", range(8))
def test_boxes_turn_with_their_pictures(program: ModuleType, turn: int) -> None:
    size = program.SIZE
    images = torch.zeros(1, 3, size, size, dtype=torch.uint8)
    images[0, :, 10:31, 40:90] = 255
    boxes = torch.tensor([[[40.0, 10.0, 90.0, 31.0]]])
    turned, _, (box,) = program.Pictures(images, torch.zeros(1, 1, dtype=torch.long), boxes).batch(
        torch.tensor([0]), turn
    )
    rows, columns = turned[0, 0].nonzero().unbind(1)
    assert box[0].tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def test_assignment(program: ModuleType) -> None:
    """A confident, well placed anchor is taken, with the best IoU for its quality; the padding takes none."""
    anchors = len(program.POINTS)
    labels, boxes = torch.tensor([[2, -1]]), torch.tensor([[[20.0, 20.0, 60.0, 60.0], [0.0, 0.0, 0.0, 0.0]]])
    logits = torch.full((1, anchors, 6), -4.0)
    found = torch.tensor([22.0, 22.0, 60.0, 60.0]).expand(1, anchors, 4)
    inside = ((program.POINTS > 20) & (program.POINTS < 60)).all(1)
    best = inside.nonzero()[3, 0]
    logits[0, best, 2] = 3
    label, quality, box = program.assign(logits, found, labels, boxes)
    positive = label[0] >= 0
    assert positive.sum() == 10
    assert (positive <= inside).all()
    assert label[0, best] == 2
    assert quality[0].argmax() == best
    assert quality[0, best].item() == pytest.approx(38 * 38 / 1600, rel=1e-4)
    assert (quality[0, ~positive] == 0).all()
    assert (box[0, positive] == boxes[0, 0]).all()


def test_the_metric_is_1_for_the_truth(program: ModuleType) -> None:
    pictures = draw(program, 5, 3)
    real = [labels >= 0 for labels in pictures.labels]
    found = [
        program.Found(torch.ones(int(r.sum())), labels[r], boxes[r])
        for r, labels, boxes in zip(real, pictures.labels, pictures.boxes, strict=True)
    ]
    assert program.mean_average_precision(found, pictures) == pytest.approx((1, 1))
    for one in found:
        one.labels = (one.labels + 1) % len(program.CLASSES)
    assert program.mean_average_precision(found, pictures)[0] < 0.5


def test_bad_options_are_named(program: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    for option, value in (("--batch-size", "0"), ("--lr", "-1"), ("--seed", "-1")):
        with pytest.raises(SystemExit):
            program.main([option, value])
        assert f"{option} must be" in capsys.readouterr().err
