"""All that a reader needs to judge whether the numbers concern his machine."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import fused_losses
import fused_losses._C as native
from fused_losses.__main__ import cpu_model

DISTRIBUTIONS = ("numpy", "triton", "torchvision", "liger-kernel", "quack-kernels", "apex")
VARIABLES = ("OMP_", "MKL_", "GOMP_", "KMP_", "CUDA_", "MALLOC_", "LD_PRELOAD", "FUSED_LOSSES_")


def environment(device: str, cache: int) -> dict[str, Any]:
    found = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "device": device,
        "device_name": torch.cuda.get_device_name() if device == "cuda" else cpu_model(),
        "last_level_cache_bytes": cache,
        "cpu": cpu_model(),
        "cpu_count": os.cpu_count(),
        "cpus_allowed": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "transparent_hugepages": _read("/sys/kernel/mm/transparent_hugepage/enabled"),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch_build": torch.__config__.show(),
        "packages": {name: found for name in DISTRIBUTIONS if (found := _version(name))},
        "variables": {name: value for name, value in os.environ.items() if name.startswith(VARIABLES)},
        "fused_losses": fused_losses.__version__,
        "fused_losses_commit": _commit(),
        "fused_losses_cpu_level": native.cpu_level(),
        "fused_losses_cuda_architectures": native.cuda_architectures(),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties()
        found |= {
            "cuda": torch.version.cuda,
            "cuda_capability": list(torch.cuda.get_device_capability()),
            "cuda_memory_bytes": properties.total_memory,
            "cuda_multiprocessors": properties.multi_processor_count,
        }
    return found


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Of the sources, `-dirty` where they differ from it; None outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        result = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None
