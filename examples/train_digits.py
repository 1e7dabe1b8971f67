"""Trains a two-layer network on handwritten digits with torch's criterion, with ours, or with both side by side.

python examples/train_digits.py --criterion both
python examples/train_digits.py --loss focal --criterion both --plot focal.png
python examples/train_digits.py --data mnist/ --batch-size 128      # MNIST's IDX files, .gz or not
"""

from __future__ import annotations

import argparse
import copy
import gzip
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

import fused_losses
from fused_losses import reference

# -- data ------------------------------------------------------------------------------------------------------


class DataError(Exception):
    """Data that is missing or broken."""


@dataclass
class Digits:
    train_images: Tensor  # [N, pixels], 0 to 1
    train_labels: Tensor  # [N]
    test_images: Tensor
    test_labels: Tensor

    @property
    def classes(self) -> int:
        return int(max(self.train_labels.max(), self.test_labels.max())) + 1


def load_sklearn(seed: int) -> Digits:
    """scikit-learn's 1797 digits of 8 x 8 pixels, a fifth of them held out."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError(
            "the default digits come with scikit-learn: pip install scikit-learn, or use --data"
        ) from None
    bunch = load_digits()
    order = np.random.default_rng(seed).permutation(len(bunch.target))
    images = torch.from_numpy(bunch.data[order] / 16).float()
    labels = torch.from_numpy(bunch.target[order])
    held_out = len(labels) // 5
    return Digits(images[held_out:], labels[held_out:], images[:held_out], labels[:held_out])


def read_idx(path: Path) -> Tensor:
    """One array of unsigned bytes: two zeros, a type, the number of dimensions, the dimensions, the data."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise DataError(f"cannot read {path}: {error}") from None
    if len(data) < 4 or data[:3] != b"\0\0\x08":
        raise DataError(
            f"{path} is not an IDX file of bytes: it starts with {data[:4].hex(' ')}, not 00 00 08"
        )
    header = 4 + 4 * data[3]
    shape = [int.from_bytes(data[i : i + 4], "big") for i in range(4, header, 4)]
    if len(data) - header != math.prod(shape):
        expected = " x ".join(map(str, shape))
        raise DataError(
            f"{path} should hold {expected} bytes after its header, but holds {len(data) - header}"
        )
    return torch.from_numpy(np.frombuffer(data, np.uint8, offset=header).reshape(shape).copy())


def load_mnist(folder: Path) -> Digits:
    """MNIST's four files under their usual names."""
    if not folder.is_dir():
        raise DataError(f"--data {folder}: no such folder")

    def pair(part: str) -> tuple[Tensor, Tensor]:
        arrays = []
        for name in (f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte"):
            found = [path for path in (folder / name, folder / f"{name}.gz") if path.is_file()]
            if not found:
                raise DataError(f"--data {folder}: no {name} or {name}.gz in it")
            arrays.append(read_idx(found[0]))
        images, labels = arrays
        if images.dim() != 3 or labels.dim() != 1 or len(images) != len(labels) or not len(labels):
            raise DataError(
                f"--data {folder}: the {part} images have shape {tuple(images.shape)}, "
                f"their labels {tuple(labels.shape)}; expected (N, rows, columns) and (N)"
            )
        return images.flatten(1).float() / 255, labels.long()

    return Digits(*pair("train"), *pair("t10k"))


# -- losses ----------------------------------------------------------------------------------------------------

Criterion = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Loss:
    torch: Callable[[int], Criterion]  # of the number of classes
    fused: Callable[[int], Criterion]
    lr: float  # the mean over N x C elements makes the gradients of the sigmoid losses small
    one_hot: bool = True
    probabilities: bool = False


def _negatives_for_a_positive(classes: int) -> Tensor:
    return torch.full((classes,), classes - 1.0)


LOSSES = {
    "ce": Loss(
        lambda classes: nn.CrossEntropyLoss(),
        lambda classes: fused_losses.CrossEntropyLoss(),
        lr=0.1,
        one_hot=False,
    ),
    "bce": Loss(
        lambda classes: nn.BCELoss(),
        lambda classes: fused_losses.BCELoss(),
        lr=0.5,
        probabilities=True,
    ),
    "bce_logits": Loss(
        lambda classes: nn.BCEWithLogitsLoss(pos_weight=_negatives_for_a_positive(classes)),
        lambda classes: fused_losses.BCEWithLogitsLoss(pos_weight=_negatives_for_a_positive(classes)),
        lr=0.2,
    ),
    "focal": Loss(
        lambda classes: lambda x, t: reference.sigmoid_focal_loss(x, t, None, None, 0.25, 0.75, 2.0, "mean"),
        lambda classes: fused_losses.SigmoidFocalLoss(alpha=0.25, gamma=2.0),
        lr=2.0,
    ),
    "softmax_focal": Loss(
        lambda classes: lambda x, t: reference.softmax_focal_loss(x, t, None, 2.0, -100, "mean"),
        lambda classes: fused_losses.SoftmaxFocalLoss(gamma=2.0),
        lr=0.1,
        one_hot=False,
    ),
}


# -- training --------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """One network with its criterion, and what happened to it."""

    criterion: Criterion
    model: nn.Module
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # in the criterion, a step

    def step(self, images: Tensor, target: Tensor) -> None:
        self.optimizer.zero_grad()
        output = self.model(images)
        # Cutting the graph here lets the criterion be timed without the network; the gradients are the same.
        prediction = output.detach().requires_grad_()
        start = time.perf_counter()
        loss = self.criterion(prediction, target)
        loss.backward()
        self.seconds.append(time.perf_counter() - start)
        output.backward(prediction.grad)
        self.optimizer.step()
        self.losses.append(loss.item())


def train(digits: Digits, name: str, kinds: list[str], options: argparse.Namespace) -> dict[str, Run]:
    """Trains a network for each kind of criterion, from the same weights on the same batches."""
    loss = LOSSES[name]
    torch.manual_seed(options.seed)
    network: list[nn.Module] = [
        nn.Linear(digits.train_images.shape[1], 128),
        nn.ReLU(),
        nn.Linear(128, digits.classes),
    ]
    if loss.probabilities:
        network.append(nn.Sigmoid())
    start = nn.Sequential(*network)
    target = digits.train_labels
    if loss.one_hot:
        target = F.one_hot(target, digits.classes).float()
    runs = {}
    for kind in kinds:
        model = copy.deepcopy(start)
        criterion = (loss.fused if kind == "fused" else loss.torch)(digits.classes)
        optimizer = torch.optim.SGD(model.parameters(), lr=options.lr or loss.lr, momentum=0.9)
        runs[kind] = Run(criterion, model, optimizer)
    columns = [TextColumn("epoch {task.fields[epoch]}"), BarColumn(), TextColumn("{task.fields[loss]}")]
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as progress:
        steps = math.ceil(len(target) / options.batch_size)
        task = progress.add_task("", total=options.epochs * steps, epoch=1, loss="")
        for epoch in range(options.epochs):
            for batch in torch.randperm(len(target)).split(options.batch_size):
                for run in runs.values():
                    run.step(digits.train_images[batch], target[batch])
                losses = "  ".join(f"{kind} loss {run.losses[-1]:.4f}" for kind, run in runs.items())
                progress.update(task, advance=1, epoch=epoch + 1, loss=losses)
    return runs


@torch.no_grad()
def accuracy(run: Run, digits: Digits) -> float:
    return (run.model(digits.test_images).argmax(1) == digits.test_labels).float().mean().item()


# -- report ----------------------------------------------------------------------------------------------------


def differences(runs: dict[str, Run]) -> tuple[float, float]:
    """Largest difference of the losses, and of the final weights."""
    ours, theirs = runs["fused"], runs["torch"]
    loss = max(abs(a - b) for a, b in zip(ours.losses, theirs.losses, strict=True))
    pairs = zip(ours.model.parameters(), theirs.model.parameters(), strict=True)
    return loss, max((a - b).abs().max().item() for a, b in pairs)


def draw(runs: dict[str, Run], title: str, path: Path) -> None:
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
        top.plot(run.losses, label=kind, **styles[kind])
    top.set(title=title, ylabel="loss", ylim=(0, None))
    top.legend(frameon=False)
    if both:
        difference = np.subtract(runs["fused"].losses, runs["torch"].losses)
        panels[1, 0].plot(difference, color="#1b7f5c", linewidth=0.8)
        panels[1, 0].set(ylabel="fused - torch")
    panels[-1, 0].set_xlabel("step")
    for axes in panels.flat:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Trains a two-layer network on handwritten digits.")
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="MNIST's IDX files instead of scikit-learn's digits"
    )
    parser.add_argument("--loss", choices=LOSSES, default="ce")
    parser.add_argument("--criterion", choices=["torch", "fused", "both"], default="fused")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, help="learning rate; the default depends on the loss")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="the curves; with both, train_digits.png by default"
    )
    options = parser.parse_args(arguments)
    if not 0 <= options.seed < 2**63:
        parser.error(f"--seed must be from 0 to 2**63 - 1, got {options.seed}")
    for name in ("epochs", "batch_size"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    if options.lr is not None and not options.lr > 0:
        parser.error(f"--lr must be positive, got {options.lr}")
    if options.plot and not options.plot.absolute().parent.is_dir():
        parser.error(f"--plot {options.plot}: there is no folder {options.plot.parent}")
    if options.criterion == "both" and options.plot is None:
        options.plot = Path("train_digits.png")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    kinds = ["torch", "fused"] if options.criterion == "both" else [options.criterion]
    try:
        digits = load_mnist(options.data) if options.data else load_sklearn(options.seed)
    except DataError as error:
        sys.exit(f"train_digits.py: {error}")
    runs = train(digits, options.loss, kinds, options)
    for kind, run in runs.items():
        # The first step loads code and starts threads, and a busy machine interrupts others: hence the median.
        print(
            f"{kind:5}  accuracy {accuracy(run, digits):.2%}, last loss {run.losses[-1]:.6f}, "
            f"criterion {1e6 * statistics.median(run.seconds):.0f} us a step (forward + backward, median)"
        )
    if len(runs) == 2:
        loss, weights = differences(runs)
        print(f"largest difference of the losses {loss:.1e}, of the final weights {weights:.1e}")
    if options.plot:
        draw(runs, f"{options.loss} on {len(digits.train_labels)} digits", options.plot)
        print(f"wrote {options.plot}")


if __name__ == "__main__":
    main()
