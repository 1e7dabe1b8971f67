"""Trains a small YOLO-style detector on pictures it draws itself, with torch's losses, with ours, or with both.

python examples/yolo_head.py --criterion both               # some minutes on two cores
python examples/yolo_head.py --loss varifocal --criterion both --out pictures/

The head is anchor-free and decoupled: class logits by --loss, boxes as distributions over distances (DFL), positives
by task-aligned assignment. Writes yolo_head_boxes.png (what was found on test pictures) and yolo_head_loss.png.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as torch_functional
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from shapes import CLASSES, SIZE, Pictures, draw_pictures
from torch import Tensor, nn

import fused_losses.functional as F
from fused_losses import IndexTarget

CONSOLE = Console(stderr=True)

# -- network ---------------------------------------------------------------------------------------------------

STRIDES = (8, 16)
BINS = 16  # of a distance's distribution, one stride apart


def conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    layer = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.SiLU(inplace=True))


class Detector(nn.Module):
    """A few convolutions, two levels, and for each a branch for the class and one for the box."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        w = width
        self.stem = nn.Sequential(conv(3, w, 2), conv(w, 2 * w, 2), conv(2 * w, 4 * w, 2), conv(4 * w, 4 * w))
        self.down = nn.Sequential(conv(4 * w, 6 * w, 2), conv(6 * w, 6 * w))
        self.up = conv(10 * w, 4 * w)
        widths = (4 * w, 6 * w)
        self.classes = nn.ModuleList(
            nn.Sequential(conv(n, 4 * w), conv(4 * w, 4 * w), nn.Conv2d(4 * w, len(CLASSES), 1))
            for n in widths
        )
        self.boxes = nn.ModuleList(
            nn.Sequential(conv(n, 4 * w), nn.Conv2d(4 * w, 4 * BINS, 1)) for n in widths
        )
        for branch in self.classes:
            nn.init.constant_(
                branch[-1].bias, math.log(0.01 / 0.99)
            )  # the customary prior of one in a hundred

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images [B, 3, H, W] -> class logits [B, A, C], box logits [B, A, 4, BINS]"""
        fine = self.stem(images)
        coarse = self.down(fine)
        fine = self.up(torch.cat([fine, torch_functional.interpolate(coarse, scale_factor=2.0)], 1))

        def over_levels(branches: nn.ModuleList) -> Tensor:
            levels = [branch(level) for branch, level in zip(branches, (fine, coarse), strict=True)]
            return torch.cat([level.flatten(2) for level in levels], 2).transpose(1, 2)

        return over_levels(self.classes), over_levels(self.boxes).unflatten(2, (4, BINS))


def anchor_points() -> tuple[Tensor, Tensor]:
    """Centres [A, 2] of the cells of every level in pixels, and their strides [A]."""
    centres, strides = [], []
    for stride in STRIDES:
        axis = (torch.arange(SIZE // stride) + 0.5) * stride
        centres.append(torch.cartesian_prod(axis, axis).flip(1))  # y runs slowest
        strides.append(torch.full((len(axis) ** 2,), float(stride)))
    return torch.cat(centres), torch.cat(strides)


POINTS, SCALES = anchor_points()


def decode(box_logits: Tensor, points: Tensor, scales: Tensor) -> Tensor:
    """box_logits [..., 4, BINS] -> corners [..., 4]: the expected distances left, up, right and down of a point."""
    distance = box_logits.softmax(-1) @ torch.arange(float(BINS)) * scales.unsqueeze(-1)
    return torch.cat([points - distance[..., :2], points + distance[..., 2:]], -1)


# -- boxes and assignment --------------------------------------------------------------------------------------


def overlap(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and GIoU (Rezatofighi et al. 2019, arXiv:1902.09630) of boxes [..., 4] with boxes [..., 4]."""

    def area(low: Tensor, high: Tensor) -> Tensor:
        return (high - low).clamp(min=0).prod(-1)

    both = area(torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:]))
    union = area(a[..., :2], a[..., 2:]) + area(b[..., :2], b[..., 2:]) - both
    hull = area(torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:]))
    iou = both / (union + 1e-7)
    return iou, iou - (hull - union) / (hull + 1e-7)


@torch.no_grad()
def assign(
    class_logits: Tensor, found: Tensor, labels: Tensor, boxes: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Task-aligned assignment (Feng et al. 2021, arXiv:2108.07755).

    class_logits [B, A, C], found boxes [B, A, 4]; labels [B, G], boxes [B, G, 4] of the objects. Returns for every anchor
    its label [B, A], -1 for background, its quality [B, A] and its box [B, A, 4]. An object takes the ten anchors
    inside of it with the best p^0.5 IoU^6, and scales that to its best IoU.
    """
    objects = labels.clamp(min=0)
    p = (
        class_logits.sigmoid().transpose(1, 2).gather(1, objects.unsqueeze(2).expand(-1, -1, len(POINTS)))
    )  # [B, G, A]
    iou, _ = overlap(boxes.unsqueeze(2), found.unsqueeze(1))  # [B, G, A]
    margins = torch.cat([POINTS - boxes[..., None, :2], boxes[..., None, 2:] - POINTS], -1)  # [B, G, A, 4]
    allowed = (margins.amin(-1) > 0) & (labels >= 0).unsqueeze(2)
    alignment = (p.sqrt() * iou**6).where(allowed, 0)
    best = torch.zeros_like(allowed).scatter_(2, alignment.topk(10, 2).indices, True) & allowed
    # An anchor that several objects want goes to the one it overlaps most.
    owner = iou.where(best, -1).argmax(1, keepdim=True)  # [B, 1, A]
    mine = best & torch.zeros_like(best).scatter_(1, owner, True)
    alignment = alignment.where(mine, 0)
    quality = alignment / (alignment.amax(2, keepdim=True) + 1e-9) * iou.where(mine, 0).amax(2, keepdim=True)
    owner = owner.squeeze(1)
    label = labels.gather(1, owner).where(mine.any(1), -1)
    return label, quality.amax(1), boxes.gather(1, owner.unsqueeze(2).expand(-1, -1, 4))


# -- losses ----------------------------------------------------------------------------------------------------


class Criterion(Protocol):
    """The class loss over all anchors and the loss of the positives' box distributions, both over `total`.

    logits [B, A, C], label [B, A] (-1: background), quality [B, A]; distribution [N, 4, BINS], distance [N, 4] in
    strides, weight [N].
    """

    def classes(self, loss: str, logits: Tensor, label: Tensor, quality: Tensor, total: Tensor) -> Tensor: ...
    def boxes(self, distribution: Tensor, distance: Tensor, weight: Tensor, total: Tensor) -> Tensor: ...


class TorchCriterion:
    """As it is written today: a dense target, some passes over the logits, two cross entropies."""

    def classes(self, loss: str, logits: Tensor, label: Tensor, quality: Tensor, total: Tensor) -> Tensor:
        score = (label >= 0).to(logits.dtype) if loss == "focal" else quality
        target = torch.zeros_like(logits).scatter_(2, label.clamp(min=0).unsqueeze(2), score.unsqueeze(2))
        target = target * (label >= 0).unsqueeze(2)
        each = torch_functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
        if loss != "bce":
            p = logits.sigmoid()
            if loss == "focal":
                wrong = p * (1 - target) + (1 - p) * target
                each = (0.25 * target + 0.75 * (1 - target)) * wrong**2 * each
            else:
                each = torch.where(target > 0, target, 0.75 * p**2) * each
        return each.sum() / total.clamp(min=1)

    def boxes(self, distribution: Tensor, distance: Tensor, weight: Tensor, total: Tensor) -> Tensor:
        left = distance.long()
        each = torch.zeros_like(distance)
        for side, share in ((left, left + 1 - distance), (left + 1, distance - left)):
            nll = torch_functional.cross_entropy(distribution.flatten(0, 1), side.flatten(), reduction="none")
            each = each + share * nll.view_as(share)
        return (each.mean(1) * weight).sum() / total.clamp(min=1)


class FusedCriterion:
    """One call each: the class id and the quality stand for the dense target."""

    def classes(self, loss: str, logits: Tensor, label: Tensor, quality: Tensor, total: Tensor) -> Tensor:
        if loss == "bce":
            return F.binary_cross_entropy_with_logits(logits, IndexTarget(label, quality), avg_factor=total)
        if loss == "focal":
            return F.sigmoid_focal_loss(logits, IndexTarget(label), 0.25, 2.0, "mean", avg_factor=total)
        return F.varifocal_loss(logits, IndexTarget(label, quality), 0.75, 2.0, avg_factor=total)

    def boxes(self, distribution: Tensor, distance: Tensor, weight: Tensor, total: Tensor) -> Tensor:
        return F.distribution_focal_loss(distribution, distance, weight.unsqueeze(1) / 4, avg_factor=total)


CRITERIA: dict[str, type[Criterion]] = {"torch": TorchCriterion, "fused": FusedCriterion}


# -- training --------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """One network with its criterion, and what happened to it."""

    criterion: Criterion
    loss: str
    model: Detector
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # in the criterion, a step
    peak: int = 0  # bytes allocated at once in the criterion, in one step

    def step(self, images: Tensor, labels: Tensor, boxes: Tensor, measure_memory: bool = False) -> None:
        class_logits, box_logits = self.model(images)
        found = decode(box_logits, POINTS, SCALES)
        label, quality, box = assign(class_logits, found, labels, boxes)
        positive = label >= 0
        weight = quality[positive]
        # YOLOv8 divides by the sum of the qualities; the focal loss, whose targets are hard, by the positives.
        total = quality.sum()
        divisor = positive.sum() if self.loss == "focal" else total
        points = POINTS.expand(len(images), -1, 2)[positive]
        scales = SCALES.expand(len(images), -1)[positive].unsqueeze(1)
        corners = box[positive]
        distance = torch.cat([points - corners[:, :2], corners[:, 2:] - points], 1) / scales
        distance = distance.clamp(0, BINS - 1.01)
        _, giou = overlap(found[positive], corners)
        overlap_loss = ((1 - giou) * weight).sum() / total.clamp(min=1)

        # Cutting the graph here lets the criterion be timed without the network; the gradients are the same.
        outputs = [class_logits, box_logits[positive]]
        predictions = [output.detach().requires_grad_() for output in outputs]

        def criterion() -> Tensor:
            logits, distribution = predictions
            of_classes = self.criterion.classes(self.loss, logits, label, quality, divisor)
            of_boxes = self.criterion.boxes(distribution, distance, weight, total)
            loss = of_classes + 0.5 * of_boxes
            loss.backward()
            return loss.detach()

        start = time.perf_counter()
        if measure_memory:
            loss, self.peak = with_peak_memory(criterion)
        else:
            loss = criterion()
            self.seconds.append(time.perf_counter() - start)
        self.optimizer.zero_grad()
        torch.autograd.backward([*outputs, 2 * overlap_loss], [p.grad for p in predictions] + [None])
        self.optimizer.step()
        self.schedule.step()
        self.losses.append(loss.item() + 2 * overlap_loss.item())


def with_peak_memory(function: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """The result, and the most bytes that were allocated by it at once."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # or the profiler writes into the progress bar
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        result = function()
    assert profiler.profiler is not None
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return result, peak


def train(pictures: Pictures, kinds: list[str], options: argparse.Namespace) -> dict[str, Run]:
    """Trains a detector with each kind of criterion, from the same weights on the same batches."""
    torch.manual_seed(options.seed)
    start = Detector(options.width)
    steps = options.epochs * math.ceil(len(pictures) / options.batch_size)
    runs = {}
    for kind in kinds:
        model = copy.deepcopy(start)
        optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, options.lr, total_steps=steps, pct_start=0.1
        )
        runs[kind] = Run(CRITERIA[kind](), options.loss, model, optimizer, schedule)
    columns = [TextColumn("epoch {task.fields[epoch]}"), BarColumn(), MofNCompleteColumn()]
    columns += [TextColumn("{task.fields[loss]}"), TimeElapsedColumn()]
    with Progress(*columns, console=CONSOLE) as progress:
        task = progress.add_task("", total=steps, epoch=1, loss="")
        for step in range(steps):
            epoch, number = divmod(step, steps // options.epochs)
            if number == 0:
                batches = torch.randperm(len(pictures)).split(options.batch_size)
            batch = pictures.batch(batches[number], int(torch.randint(8, ())))
            for run in runs.values():
                run.step(*batch, measure_memory=step == steps - 1)
            losses = "  ".join(f"{kind} loss {run.losses[-1]:.3f}" for kind, run in runs.items())
            progress.update(task, advance=1, epoch=epoch + 1, loss=losses)
    return runs


# -- what it finds ---------------------------------------------------------------------------------------------


@dataclass
class Found:
    """Of one picture, the best first."""

    scores: Tensor  # [K]
    labels: Tensor  # [K]
    boxes: Tensor  # [K, 4]


@torch.no_grad()
def detect(model: Detector, images: Tensor, threshold: float = 0.01, most: int = 50) -> list[Found]:
    """What is left of every anchor's best class after non-maximum suppression in each class."""
    model.eval()
    found = []
    for chunk in images.split(64):
        class_logits, box_logits = model(chunk)
        scores, labels = class_logits.sigmoid().max(2)
        for score, label, box in zip(scores, labels, decode(box_logits, POINTS, SCALES), strict=True):
            order = score.argsort(descending=True)[:200]
            order = order[score[order] > threshold]
            iou, _ = overlap(box[order].unsqueeze(1), box[order].unsqueeze(0))
            covers = ((iou > 0.6) & (label[order].unsqueeze(1) == label[order].unsqueeze(0))).triu(1)
            keep = torch.ones(len(order), dtype=torch.bool)
            for i in range(len(order)):
                if keep[i]:
                    keep &= ~covers[i]
            kept = order[keep][:most]
            found.append(Found(score[kept], label[kept], box[kept].clamp(0, SIZE)))
    return found


def mean_average_precision(found: list[Found], pictures: Pictures) -> tuple[float, float]:
    """mAP at an IoU of 0.5, and the mean over 0.5 to 0.95, by pycocotools."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def boxes_of(boxes: Tensor) -> list[list[float]]:
        return torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).tolist()  # x y width height

    truth: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for image, one in enumerate(found):
        real = pictures.labels[image] >= 0
        for label, box in zip(
            pictures.labels[image][real].tolist(), boxes_of(pictures.boxes[image][real]), strict=True
        ):
            common = {"image_id": image, "category_id": label, "bbox": box}
            truth.append({**common, "id": len(truth) + 1, "area": box[2] * box[3], "iscrowd": 0})
        rows = zip(one.labels.tolist(), boxes_of(one.boxes), one.scores.tolist(), strict=True)
        results += [
            {"image_id": image, "category_id": c, "bbox": box, "score": score} for c, box, score in rows
        ]
    if not results:
        return 0.0, 0.0
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does
        coco = COCO()
        coco.dataset = {
            "images": [{"id": image} for image in range(len(found))],
            "categories": [{"id": i, "name": name} for i, name in enumerate(CLASSES)],
            "annotations": truth,
        }
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return float(evaluation.stats[1]), float(evaluation.stats[0])


# -- report ----------------------------------------------------------------------------------------------------

COLOURS = ("#4dabf7", "#ff922b", "#51cf66", "#ff6b6b", "#cc5de8", "#ffd43b")  # of the classes


def draw_found(found: list[Found], pictures: Pictures, title: str, path: Path) -> None:
    """Test pictures with every box of a score from 0.3 on, and the true boxes dashed."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    rows, columns = 3, 5
    figure = Figure(figsize=(2.9 * columns, 2.9 * rows + 0.5), layout="constrained")
    figure.suptitle(title)
    for i, axes in enumerate(figure.subplots(rows, columns).flat):
        axes.axis("off")
        if i >= len(found):
            continue
        axes.imshow(
            pictures.images[i].permute(1, 2, 0).numpy(), extent=(0, SIZE, SIZE, 0), interpolation="nearest"
        )
        for box in pictures.boxes[i][pictures.labels[i] >= 0].tolist():
            corner, width, height = box[:2], box[2] - box[0], box[3] - box[1]
            axes.add_patch(
                Rectangle(corner, width, height, fill=False, color="white", linestyle=":", linewidth=1.2)
            )
        for score, label, box in zip(found[i].scores, found[i].labels, found[i].boxes.tolist(), strict=True):
            if score < 0.3:
                continue
            corner, width, height = box[:2], box[2] - box[0], box[3] - box[1]
            colour = COLOURS[label]
            axes.add_patch(Rectangle(corner, width, height, fill=False, color=colour, linewidth=1.8))
            axes.text(
                min(corner[0], SIZE - 34),
                max(corner[1] - 1.5, 7),
                f"{CLASSES[label]} {score:.2f}",
                fontsize=7.5,
                va="bottom",
                bbox={"facecolor": colour, "edgecolor": "none", "pad": 1},
            )
    figure.savefig(path, dpi=110)


def smooth(values: list[float]) -> np.ndarray:
    """A running mean over a fiftieth of the steps: each step's loss is of another batch."""
    window = max(1, len(values) // 50)
    return np.convolve(values, np.ones(window) / window, mode="valid")


def draw_losses(runs: dict[str, Run], title: str, path: Path) -> None:
    """The loss of every step, and below it the difference where there are two."""
    from matplotlib.figure import Figure

    both = len(runs) == 2
    figure = Figure(figsize=(8, 6 if both else 4), layout="constrained")
    panels = figure.subplots(
        2 if both else 1, 1, sharex=True, squeeze=False, height_ratios=[2, 1] if both else [1]
    )
    top = panels[0, 0]
    styles = {"torch": {"color": "#b0b0b0", "linewidth": 4}, "fused": {"color": "#1b7f5c", "linewidth": 1.2}}
    for kind, run in runs.items():
        line = smooth(run.losses)
        top.plot(np.arange(len(line)) + len(run.losses) - len(line), line, label=kind, **styles[kind])
    top.set(title=title, ylabel="loss (running mean)", ylim=(0, None))
    top.legend(frameon=False)
    if both:
        difference = np.abs(np.subtract(runs["fused"].losses, runs["torch"].losses))
        panels[1, 0].plot(difference, color="#1b7f5c", linewidth=0.8)
        panels[1, 0].set(ylabel="|fused - torch|, a step", yscale="log" if difference.any() else "linear")
    panels[-1, 0].set_xlabel("step")
    for axes in panels.flat:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Trains a small YOLO-style detector on pictures of shapes.")
    parser.add_argument("--loss", choices=["bce", "focal", "varifocal"], default="bce", help="of the classes")
    parser.add_argument("--criterion", choices=["torch", "fused", "both"], default="fused")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--pictures", type=int, default=1024, help="to train on")
    parser.add_argument("--test-pictures", type=int, default=256)
    parser.add_argument("--width", type=int, default=16, help="channels of the first convolution")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=4e-3, help="the highest learning rate")
    parser.add_argument("--out", type=Path, default=Path(), metavar="DIR", help="where the two pictures go")
    options = parser.parse_args(arguments)
    if not 0 <= options.seed < 2**63:
        parser.error(f"--seed must be from 0 to 2**63 - 1, got {options.seed}")
    for name in ("epochs", "batch_size", "pictures", "test_pictures", "width"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    if not options.lr > 0:
        parser.error(f"--lr must be positive, got {options.lr}")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    kinds = ["torch", "fused"] if options.criterion == "both" else [options.criterion]
    pictures = draw_pictures(options.pictures, options.seed, "pictures to train on", CONSOLE)
    test = draw_pictures(options.test_pictures, options.seed + 1, "test pictures", CONSOLE)
    runs = train(pictures, kinds, options)
    images, _, _ = test.batch(torch.arange(len(test)))
    for kind, run in runs.items():
        found = detect(run.model, images)
        at_half, mean = mean_average_precision(found, test)
        # The first step loads code and starts threads, and a busy machine interrupts others: hence the median. The
        # step whose memory is measured is not timed, and may be the only one.
        print(
            f"{kind:5}  mAP@0.5 {at_half:.3f}, mAP@0.5:0.95 {mean:.3f}, last loss {smooth(run.losses)[-1]:.4f}, "
            f"criterion {1e3 * statistics.median(run.seconds or [math.nan]):.2f} ms and {run.peak / 2**20:.2f} MB a step"
        )
    if len(runs) == 2:
        difference = np.abs(np.subtract(runs["fused"].losses, runs["torch"].losses))
        print(f"difference of the losses: first step {difference[0]:.1e}, largest {difference.max():.1e}")
    options.out.mkdir(parents=True, exist_ok=True)
    boxes, curves = options.out / "yolo_head_boxes.png", options.out / "yolo_head_loss.png"
    draw_found(
        found, test, f"{options.loss}, {kind} criterion: found on test pictures (dotted: the truth)", boxes
    )
    draw_losses(runs, f"{options.loss} + DFL + GIoU on {len(pictures)} pictures", curves)
    print(f"wrote {boxes} and {curves}")


if __name__ == "__main__":
    main()
