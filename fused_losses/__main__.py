"""`python -m fused_losses`: what is installed and what it can do here, and a short check of every loss against torch.

What to paste into a bug report. The exit status is 1 where a check fails.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from . import _C as native
from . import __version__, reference
from . import functional as F
from ._ops import CUDA, native_autograd
from .detection import IndexTarget

torch_F = torch.nn.functional

Loss = Callable[[Tensor], Tensor]

# An error relative to the largest element; a wrong kernel is wrong by far more.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def checks(device: str) -> Iterator[tuple[str, Tensor, Loss, Loss]]:
    """Each loss's name, its input [64, 50] in fp64, and ours and torch's as functions of that."""
    random = torch.Generator().manual_seed(0)
    index = torch.randint(50, (64,), generator=random).to(device)
    dense = torch.rand(64, 50, generator=random, dtype=torch.float64).to(device)
    logits = 3 * torch.randn(64, 50, generator=random, dtype=torch.float64).to(device)

    def target(x: Tensor) -> Tensor:
        return dense.to(x.dtype)

    def focal(x: Tensor) -> Tensor:
        return reference.sigmoid_focal_loss(x, target(x), None, None, 0.25, 0.75, 2.0, "mean")

    def by_class(x: Tensor, elementwise: reference.Elementwise, alpha: float) -> Tensor:
        one_hot = torch_F.one_hot(index, 50).to(x.dtype)
        wide = x.float() if x.element_size() < 4 else x
        return elementwise(wide, one_hot.to(wide.dtype), None, 1.0, alpha, 2.0, False).mean().to(x.dtype)

    yield (
        "cross_entropy",
        logits,
        lambda x: F.cross_entropy(x, index, label_smoothing=0.1),
        lambda x: torch_F.cross_entropy(x, index, label_smoothing=0.1),
    )
    yield (
        "binary_cross_entropy_with_logits",
        logits,
        lambda x: F.binary_cross_entropy_with_logits(x, target(x)),
        lambda x: torch_F.binary_cross_entropy_with_logits(x, target(x)),
    )
    yield (
        "binary_cross_entropy",
        0.05 + 0.9 * logits.sigmoid(),
        lambda x: F.binary_cross_entropy(x, target(x)),
        lambda x: torch_F.binary_cross_entropy(x, target(x)),
    )
    yield "sigmoid_focal_loss", logits, lambda x: F.sigmoid_focal_loss(x, target(x), reduction="mean"), focal
    yield (
        "softmax_focal_loss",
        logits,
        lambda x: F.softmax_focal_loss(x, index),
        lambda x: reference.softmax_focal_loss(x, index, None, 2.0, -100, "mean"),
    )
    yield (
        "quality_focal_loss",
        logits,
        lambda x: F.quality_focal_loss(x, IndexTarget(index)),
        lambda x: by_class(x, reference.quality_focal_elements, 1.0),
    )
    yield (
        "varifocal_loss",
        logits,
        lambda x: F.varifocal_loss(x, IndexTarget(index)),
        lambda x: by_class(x, reference.varifocal_elements, 0.75),
    )
    sides = (dense[:, 0] * 49).float().double()  # in digits that every kernel takes
    yield (
        "distribution_focal_loss",
        logits,
        lambda x: F.distribution_focal_loss(x, sides),
        lambda x: reference.distribution_focal_loss(x, sides, None, None, 0.0, "mean"),
    )


def value_and_gradient(loss: Loss, input: Tensor) -> tuple[Tensor, Tensor]:
    input = input.detach().requires_grad_()
    value = loss(input)
    return value.detach(), torch.autograd.grad(value, input)[0]


def largest_error(ours: Loss, theirs: Loss, input: Tensor) -> float:
    """Of value and gradient, against torch in fp64, relative to the largest element."""
    exact = value_and_gradient(theirs, input.double())
    found = value_and_gradient(ours, input)
    return max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(found, exact, strict=True))


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def facts() -> Iterator[tuple[str, str]]:
    yield "fused_losses", f"{__version__} in {Path(__file__).parent}"
    yield "torch", f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})"
    yield "Python", f"{platform.python_version()} on {platform.platform()}"
    yield "CPU", f"{cpu_model()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    yield "CPU kernels", f"{native.cpu_level()} in use; this CPU runs {', '.join(native.cpu_levels())}"
    form = "compiled" if native_autograd is not None else "Python's"
    yield "autograd", f"{form}; built with torch {native.torch_version()}"
    built = ", ".join(native.cuda_architectures()) or "not built"
    if not torch.cuda.is_available():
        state = "torch sees no CUDA device"
    elif CUDA:
        devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        state = "; ".join(f"{device.name}, sm_{device.major}{device.minor}" for device in devices)
    else:
        state = "not loaded: CUDA tensors go to torch's own functions"
    yield "CUDA kernels", f"{built}; {state}"


def main(arguments: Sequence[str] = ()) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fused_losses", description=(__doc__ or "").partition(": ")[2]
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.parse_args(arguments)
    for name, fact in facts():
        print(f"{name:14}{fact}")
    start = time.perf_counter()
    failed = 0
    for device in ["cpu", "cuda"] if CUDA else ["cpu"]:
        print(f"\nlargest error on {device:24}" + "".join(f"{str(d)[6:]:>10}" for d in TOLERANCE))
        for name, input, ours, theirs in checks(device):
            errors = {d: largest_error(ours, theirs, input.to(d)) for d in TOLERANCE}
            wrong = [str(d)[6:] for d, error in errors.items() if not error <= TOLERANCE[d]]
            failed += len(wrong)
            verdict = f"  WRONG in {', '.join(wrong)}" if wrong else ""
            print(f"{name:41}" + "".join(f"{error:10.1e}" for error in errors.values()) + verdict)
    print(f"\n{f'{failed} checks failed' if failed else 'all right'}, {time.perf_counter() - start:.1f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
