"""What PyTorch's own tools do around a loss: checkpointing, hooks on saved tensors, anomaly mode, the profiler,
data loaders, several processes."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES, IN_PLACE_CASES, Case
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

import fused_losses
import fused_losses.functional as F

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
every_reduction = pytest.mark.parametrize("reduction", ["mean", "none"])


def gradients(case: Case, reduction: str, **settings: Any) -> list[Tensor]:
    """By a leaf in front of the logits, with an upstream gradient: the first, then again from the kept graph."""
    torch.manual_seed(0)
    data, options = case.make(torch.float64)
    leaf = data.clone().requires_grad_()
    loss = case.ours(leaf * 0.9, **options, reduction=reduction, **settings)
    upstream = torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
    if settings:
        return list(torch.autograd.grad(loss, leaf, upstream))
    scales = [(1, True), (1.5, True), (1, False)]
    return [torch.autograd.grad(loss, leaf, upstream * s, retain_graph=keep)[0] for s, keep in scales]


@every_case
@every_reduction
def test_hooks_on_saved_tensors(case: Case, reduction: str) -> None:
    expected = gradients(case, reduction)
    stored: list[Tensor] = []

    def keep(tensor: Tensor) -> int:
        stored.append(tensor.clone())
        return len(stored) - 1

    with save_on_cpu():
        assert all(map(torch.equal, gradients(case, reduction), expected))
    with saved_tensors_hooks(keep, lambda index: stored[index]):
        assert all(map(torch.equal, gradients(case, reduction), expected))
    with saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        assert all(map(torch.equal, gradients(case, reduction), expected))


@every_case
@every_reduction
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(case: Case, reduction: str, reentrant: bool) -> None:
    data, options = case.make(torch.float64)
    results = []
    for again in (False, True):
        leaf = data.clone().requires_grad_()

        def block(x: Tensor) -> Tensor:
            return case.ours(x * 0.9, **options, reduction=reduction).sum()

        loss = checkpoint(block, leaf, use_reentrant=reentrant) if again else block(leaf)
        (loss * 1.5).backward()
        results.append(leaf.grad)
    assert torch.equal(*results)


@every_case
@every_reduction
def test_anomaly_mode_and_deterministic_algorithms(case: Case, reduction: str) -> None:
    expected = gradients(case, reduction)
    torch.use_deterministic_algorithms(True)
    try:
        with torch.autograd.detect_anomaly(check_nan=True):
            assert all(map(torch.equal, gradients(case, reduction), expected))
    finally:
        torch.use_deterministic_algorithms(False)


def test_anomaly_mode_names_the_node() -> None:
    leaf = torch.full((2, 3), float("nan"), requires_grad=True)
    with pytest.raises(RuntimeError, match=r"StoredBackward.*returned nan"), torch.autograd.detect_anomaly():
        F.cross_entropy(leaf, torch.tensor([0, 1])).backward()


@pytest.mark.parametrize("case", IN_PLACE_CASES, ids=lambda case: case.name)
@every_reduction
def test_anomaly_mode_in_place(case: Case, reduction: str) -> None:
    expected = gradients(case, reduction)[0]
    with torch.autograd.detect_anomaly():
        (ours,) = gradients(case, reduction, inplace_backward=True)
    torch.testing.assert_close(ours, expected)


@every_case
def test_the_profiler_shows_every_op_by_name(case: Case) -> None:
    data, options = case.make(torch.float32)
    leaf = data.requires_grad_()
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        (case.ours(leaf, **options, reduction="mean") * 2).backward()
        case.ours(leaf, **options, reduction="none").sum().backward()
    name = {"cross_entropy": "cross_entropy", "bce": "bce", "sigmoid_focal": "sigmoid_focal"}
    name |= {"softmax_focal": "softmax_focal", "bce_with_logits": "bce_with_logits"}
    op = next(name[prefix] for prefix in sorted(name, reverse=True) if case.name.startswith(prefix))
    ranges = [event.name for event in trace.events() or [] if event.name.startswith("fused_losses::")]
    assert ranges == [f"fused_losses::{op}{form}" for form in ("_train", "", "_backward")] or sorted(
        ranges
    ) == sorted(
        [
            f"fused_losses::{op}_train",
            "fused_losses::scale_",
            f"fused_losses::{op}",
            f"fused_losses::{op}_backward",
        ]
    )


class Losses(Dataset[Tensor]):
    """Items that are losses: what a data loader with hard-example mining computes in its workers."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, item: int) -> Tensor:
        logits = torch.full((4, 5), item / 8).cumsum(1).requires_grad_()
        loss = F.cross_entropy(logits, torch.tensor([0, 1, 2, 4]))
        loss.backward()
        assert logits.grad is not None
        return logits.grad + loss.detach()


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_data_loader_workers(start: str) -> None:
    with torch.device("cpu"):  # CUDA does not survive a fork
        load_losses(start)


def load_losses(start: str) -> None:
    Losses()[0]  # the parent has used its kernels, and threads, before it forks
    context = multiprocessing.get_context(start)
    batches = list(DataLoader(Losses(), batch_size=2, num_workers=2, multiprocessing_context=context))
    expected = torch.stack([Losses()[item] for item in range(8)])
    assert torch.equal(torch.cat(batches), expected)


def train(criterion: nn.Module) -> list[Tensor]:
    """Three steps on this process's half of every batch: the gradients."""
    rank = torch.distributed.get_rank()
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(nn.Linear(6, 4).double())
    seen: list[Tensor] = []
    for _ in range(3):
        x, target = torch.randn(8, 6).double(), torch.randint(4, (8,))
        if not isinstance(criterion, nn.CrossEntropyLoss):
            target = nn.functional.one_hot(target, 4).double()
        half = slice(4 * rank, 4 * rank + 4)
        model.zero_grad()
        criterion(model(x[half]), target[half]).backward()
        for p in model.parameters():
            seen.append(p.grad.clone())
            p.data -= 0.1 * p.grad
    return seen


def train_each(criteria: dict[str, nn.Module], rank: int, folder: str, done: Any) -> None:
    """One of two processes; the first one writes what both have seen."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    seen = {name: train(criterion) for name, criterion in criteria.items()}
    if rank == 0:
        torch.save(seen, f"{folder}/seen.pt")
    # One that closes its connections early may end the other: "Connection closed by peer".
    done.wait(PATIENCE)
    torch.distributed.destroy_process_group()


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:  # shorter than pytest's, for the rendezvous
        yield Path(name)


PATIENCE = 600  # seconds: on a machine that is busy two Pythons take long to import torch


def test_distributed_data_parallel(folder: Path) -> None:
    names = ("CrossEntropyLoss", "BCEWithLogitsLoss")
    modules = {"ours": fused_losses, "torch's": nn}
    criteria = {f"{whose} {name}": getattr(modules[whose], name)() for whose in modules for name in names}
    context = multiprocessing.get_context("spawn")
    done = context.Barrier(2)
    processes = [
        context.Process(target=train_each, args=(criteria, rank, str(folder), done), daemon=True)
        for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(PATIENCE)
        assert process.exitcode == 0
    seen = torch.load(folder / "seen.pt")
    for name in names:
        for ours, theirs in zip(seen[f"ours {name}"], seen[f"torch's {name}"], strict=True):
            torch.testing.assert_close(ours, theirs)


def test_types_are_shipped() -> None:
    assert os.path.exists(Path(fused_losses.__file__).with_name("py.typed"))
