"""Builds the CUDA kernels, and the ops around them, for the host: torch.ops.fused_losses_simt."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

HERE = Path(__file__).parent
FOLDER = Path(os.environ.get("FUSED_LOSSES_SIMT_BUILD", HERE.parents[1] / "build"), "simt")
CSRC = Path(os.environ.get("FUSED_LOSSES_SIMT_CSRC", HERE.parents[1] / "csrc"))
SANITIZERS = {
    "": [],
    # What AddressSanitizer sees as well is left to it: those checks take most of the time to compile.
    "address": [
        "-fsanitize=address,undefined",
        "-fno-sanitize=null,vptr,object-size,pointer-overflow",
        "-fno-sanitize-recover=undefined",
        "-fno-omit-frame-pointer",
    ],
    "thread": ["-fsanitize=thread", "-DFUSED_LOSSES_SIMT_RACES"],
}
# nvcc makes one fma of a product and a sum: so does GCC, where the processor has the instruction.
FUSED = ["-ffp-contract=fast", "-fexpensive-optimizations"]
if "fma" in Path("/proc/cpuinfo").read_text().split():
    FUSED += ["-mfma"]
WARNINGS = ["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror"]


def compiler() -> str:
    return os.environ.get("CXX") or next(name for name in ("c++", "g++") if shutil.which(name))


def library(folder: Path, *, sanitizer: str = "", csrc: Path = CSRC) -> Path:
    """The shared object, built in `folder` unless it is newer than everything it is made of."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the suite's processes build it once
        return _library(folder, sanitizer, csrc)


def _library(folder: Path, sanitizer: str, csrc: Path) -> Path:
    result = folder / "simt.so"
    sources = [*csrc.glob("cuda/*.cu"), *csrc.glob("torch/cuda_*.cpp")]
    sources += [csrc / f"torch/{name}.cpp" for name in ("arguments", "kept_memory", "tensors")]
    sources += [HERE / "simt.cpp"]
    headers = [path for root in (csrc, HERE) for path in root.rglob("*.*") if path.suffix in (".h", ".cuh")]
    if _is_newer(result, *sources, *headers):
        return result
    include = Path(torch.__file__).parent / "include"
    flags = [
        "-std=c++17",
        "-O1",
        "-g",
        "-fPIC",
        "-fvisibility=hidden",
        *WARNINGS,
        *FUSED,
    ]
    flags += ['-DFUSED_LOSSES_SIMT="simt.h"', "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    flags += [f"-I{HERE}", f"-I{HERE / 'include'}", f"-I{csrc}", "-isystem", str(include)]

    def compile_one(source: Path) -> str:
        target = folder / f"{source.parent.name}_{source.stem}.o"
        if _is_newer(target, source, *headers):
            return str(target)
        watched = SANITIZERS[sanitizer]
        if source.suffix != ".cu":  # threads are those of the kernels
            watched = [flag for flag in watched if flag != "-fsanitize=thread"]
        command = [compiler(), *flags, *watched, "-x", "c++", "-c", str(source), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{source.name} does not compile for the host:\n{done.stderr[-6000:]}")
        return str(target)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    link = [compiler(), "-shared", *SANITIZERS[sanitizer], *objects, "-o", str(result)]
    subprocess.run([*link, f"-L{include.parent / 'lib'}", "-ltorch_cpu"], check=True)
    return result


def _is_newer(made: Path, *of: Path) -> bool:
    return made.exists() and made.stat().st_mtime > max(
        path.stat().st_mtime for path in (Path(__file__), *of)
    )


if __name__ == "__main__":
    print(library(Path(sys.argv[1]), sanitizer=sys.argv[2] if len(sys.argv) > 2 else ""))
