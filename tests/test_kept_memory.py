"""Large gradients on a CPU lie in memory that is kept for the next call."""

from __future__ import annotations

import gc
import os
import resource
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fused_losses
import fused_losses.functional as F

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="kept on Linux only")

ROWS, CLASSES = 1100, 1000  # 4.2 MiB in float32


def gradient_of(logits: Tensor) -> Tensor:
    leaf = logits.detach().requires_grad_()
    loss = F.cross_entropy(leaf, torch.zeros(leaf.shape[0], dtype=torch.long))
    (gradient,) = torch.autograd.grad(loss, leaf)
    return gradient


def mapped_kilobytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[0]) * os.sysconf("SC_PAGE_SIZE") // 1024


@pytest.fixture(autouse=True)
def _nothing_kept() -> None:
    gc.collect()
    fused_losses.release_memory()


def test_the_next_gradient_lies_where_the_last_one_did() -> None:
    logits = torch.randn(ROWS, CLASSES)
    first = gradient_of(logits)
    place, expected = first.data_ptr(), first.clone()
    del first
    again = gradient_of(logits)
    assert again.data_ptr() == place
    assert torch.equal(again, expected)
    assert again.device == logits.device


def test_memory_in_use_is_nobody_elses() -> None:
    """Also where only a view of a gradient is alive."""
    tensors = [torch.randn(ROWS + 100 * i, CLASSES) for i in range(8)]
    gradients = [gradient_of(logits)[3:] for logits in tensors]
    copies = [gradient.clone() for gradient in gradients]
    for _ in range(3):
        gradient_of(tensors[0])
    assert len({gradient.untyped_storage().data_ptr() for gradient in gradients}) == len(gradients)
    for gradient, copy in zip(gradients, copies, strict=True):
        assert torch.equal(gradient, copy)


def test_no_more_than_sixteen_are_kept_and_all_are_released() -> None:
    logits = torch.randn(ROWS, CLASSES)
    gradient_of(logits)
    fused_losses.release_memory()
    before = mapped_kilobytes()
    gradients = [gradient_of(logits) for _ in range(40)]
    size = gradients[0].nbytes // 1024
    assert mapped_kilobytes() > before + 39 * size
    del gradients
    assert mapped_kilobytes() < before + 18 * size
    fused_losses.release_memory()
    assert mapped_kilobytes() < before + 2 * size


def test_the_system_may_take_what_is_beyond_64_megabytes() -> None:
    def offered_kilobytes() -> int:
        return sum(
            int(line.split()[1])
            for line in Path("/proc/self/smaps").read_text().splitlines()
            if line.startswith("LazyFree:")
        )

    logits = torch.randn(40 * 1024, 256)  # 40 MB
    gradients = [gradient_of(logits) for _ in range(3)]
    before = offered_kilobytes()
    del gradients[0]
    assert offered_kilobytes() == before
    del gradients[0]
    assert offered_kilobytes() > before


def test_a_small_gradient_does_not_take_a_large_block() -> None:
    large = gradient_of(torch.randn(4 * ROWS, CLASSES))
    place = large.data_ptr()
    del large
    small = gradient_of(torch.randn(ROWS, CLASSES))
    assert small.data_ptr() != place
    assert gradient_of(torch.randn(3 * ROWS, CLASSES)).data_ptr() == place


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes_and_layouts(dtype: torch.dtype) -> None:
    for logits in (
        torch.randn(3000, 1000, dtype=dtype),
        torch.randn(1, 21, 400, 300, dtype=dtype),
        torch.randn(1, 21, 400, 300, dtype=dtype).contiguous(memory_format=torch.channels_last),
    ):
        leaf = logits.requires_grad_()
        target = torch.zeros(leaf.shape[:1] + leaf.shape[2:], dtype=torch.long)
        (gradient,) = torch.autograd.grad(F.cross_entropy(leaf, target), leaf)
        (expected,) = torch.autograd.grad(torch.nn.functional.cross_entropy(leaf.double(), target), leaf)
        assert gradient.stride() == leaf.stride()
        torch.testing.assert_close(gradient, expected, rtol=2e-2, atol=1e-7)


def test_threads_share_it() -> None:
    logits = [torch.randn(ROWS, CLASSES) for _ in range(4)]
    expected = [gradient_of(x) for x in logits]
    failures: list[int] = []

    def work(k: int) -> None:
        for _ in range(20):
            if not torch.equal(gradient_of(logits[k]), expected[k]):
                failures.append(k)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_gradient_is_accumulated_into() -> None:
    leaf = torch.randn(ROWS, CLASSES, requires_grad=True)
    target = torch.zeros(ROWS, dtype=torch.long)
    F.cross_entropy(leaf, target).backward()
    assert leaf.grad is not None
    once = leaf.grad.clone()
    F.cross_entropy(leaf, target).backward()
    torch.testing.assert_close(leaf.grad, 2 * once)


def test_little_is_kept_where_addresses_are_limited() -> None:
    """`ulimit -v`: pages that the system may take back still count there."""
    logits = torch.randn(30_000, CLASSES)  # 114 MiB
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (1 << 45, before[1]))
    try:
        gradient = gradient_of(logits)
        in_use = mapped_kilobytes()
        del gradient
        assert in_use - mapped_kilobytes() > 100 << 10
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
