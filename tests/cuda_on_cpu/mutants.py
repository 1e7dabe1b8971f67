"""Breaks the CUDA kernels on purpose, one way at a time, and asks whether tests/test_cuda_on_cpu.py notices.

    python tests/cuda_on_cpu/mutants.py

A mutant that survives is a test that is missing. Each is compiled and run in a folder of its own, a minute or so.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

import build

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent

# What is broken, the file, the text, and what takes its place.
MUTANTS = [
    (
        "no barrier before the warps' sums are read",
        "cuda/softmax.cu",
        "    __syncthreads();  // every warp's sums are there",
        "    // every warp's sums are there",
    ),
    (
        "no barrier before the next row takes the shared memory",
        "cuda/softmax.cu",
        "    } else {\n      __syncthreads();\n    }",
        "    }",
    ),
    (
        "no cluster barrier before the blocks' sums are read",
        "cuda/softmax.cu",
        "      cluster_arrive();\n      cluster_wait();  // every block's sums are there",
        "      // every block's sums are there",
    ),
    (
        "no barrier in a block's sum",
        "cuda/simt.cuh",
        "scratch[threadIdx.x / kWarp] = value;\n  __syncthreads();",
        "scratch[threadIdx.x / kWarp] = value;",
    ),
    (
        "a block leaves the cluster while others read its sums",
        "cuda/softmax.cu",
        "    if (blocks > 1) {\n      cluster_wait();\n    } else {\n      __syncthreads();\n    }",
        "    __syncthreads();",
    ),
    (
        "no wait for the copies to shared memory",
        "cuda/softmax.cu",
        "      wait_for_copies();\n",
        "",
    ),
    (
        "the packs after the last four together are left out",
        "cuda/softmax.cu",
        "for (; k < packs; k += kThreads) visit_pack(head + k * n, load_pack(x + head + k * n));",
        "",
    ),
    (
        "classes beyond the end of a chunk are taken for soft targets",
        "cuda/softmax.cu",
        "if (k < count) {",
        "if (true) {",
    ),
    (
        "a tail one element short",
        "cuda/softmax.cu",
        "if (tail + thread < count)",
        "if (tail + thread + 1 < count)",
    ),
    (
        "a head one element long",
        "cuda/softmax.cu",
        "if (thread < head) visit(",
        "if (thread <= head) visit(",
    ),
    (
        "packs from a misaligned address",
        "cuda/softmax.cu",
        "head = count < until ? static_cast<int>(count) : until;",
        "head = 0;",
    ),
    (
        "the farthest lanes dropped from a row's sum",
        "cuda/softmax.cu",
        "for (int width = lanes / 2; width > 0; width /= 2)",
        "for (int width = lanes / 4; width > 0; width /= 2)",
    ),
    (
        "the farthest lanes dropped from a block's sum",
        "cuda/simt.cuh",
        "for (int width = kWarp / 2; width > 0; width /= 2)",
        "for (int width = kWarp / 4; width > 0; width /= 2)",
    ),
    (
        "the gradient's class stride is the logits'",
        "cuda/softmax.cu",
        "g[(j + k) * a.grad_class_stride]",
        "g[(j + k) * a.logits_class_stride]",
    ),
    (
        "the probabilities' strides are the logits'",
        "cuda/softmax.cu",
        "offset_of(a, a.probability_stride, p)",
        "offset_of(a, a.logits_stride, p)",
    ),
    (
        "a pack that crosses runs is taken for one run",
        "cuda/elementwise.cuh",
        "if (whole && (flat || at % run + n <= run))",
        "if (whole)",
    ),
    (
        "a pack is one class's",
        "cuda/elementwise.cuh",
        "if (code != from + k * class_step)",
        "if (code != from)",
    ),
    (
        "a positive of a pack's second anchor is taken for background",
        "cuda/elementwise.cuh",
        "next_positive = place.next < 0 ? n : place.next + left;",
        "next_positive = n;",
    ),
    (
        "an ignored second anchor of a pack is taken for background",
        "cuda/elementwise.cuh",
        " || place.next == kIgnored) {",
        ") {",
    ),
    (
        "a thread's next anchor is one too early where its classes are over",
        "cuda/elementwise.cuh",
        "      at.from -= classes;\n      ++at.anchor;",
        "      at.from -= classes;",
    ),
    (
        "the gradient of an ignored anchor is 0 times an infinite scale",
        "cuda/elementwise.cuh",
        "out[k] = others >> k & 1 ? T{0} : out[k];",
        ";",
    ),
    (
        "a lane whose targets are 0 does not ask the others",
        "cuda/elementwise.cuh",
        "!any_in_warp(!all_zero(neighbours))",
        "any_in_warp(all_zero(neighbours))",
    ),
    (
        "the anchors' elements after the last pack are left out",
        "cuda/elementwise.cuh",
        "  if (i < count) {\n    const int anchor",
        "  if (false) {\n    const int anchor",
    ),
    (
        "half a pack is taken for all of it where targets of 0 are looked for",
        "cuda/elementwise.cuh",
        "for (const uint32_t word : words) any |= word;",
        "for (int k = 0; k < 2; ++k) any |= words[k];",
    ),
    (
        "the elements after the last pack are left out",
        "cuda/elementwise.cuh",
        "units = packs + (count - packs * n);",
        "units = packed ? packs : count;",
    ),
    (
        "the elements after the last pack are left out of the plain kernel",
        "cuda/elementwise.cuh",
        "i < count; i += step) {\n    const ValueGrad",
        "i < packs * n; i += step) {\n    const ValueGrad",
    ),
    (
        "the last pack of a thread is left out of the plain kernel",
        "cuda/elementwise.cuh",
        "  for (; p < packs; p += step) pack(p, input_at(p), target_at(p), warp_ends_by(p));\n",
        "",
    ),
    (
        "no barrier before an anchor's sums are read",
        "cuda/pairwise.cu",
        "    __syncthreads();  // every anchor's sums are there",
        "    // every anchor's sums are there",
    ),
    (
        "anchors past the last are given a cost",
        "cuda/pairwise.cu",
        "if (first + lane < a.anchors) {",
        "if (first + lane <= a.anchors) {",
    ),
    (
        "a float32 loss by the formula for 16 bits",
        "cuda/elementwise.cuh",
        "using V = typename FormulaOf<O>::V;",
        "using V = typename FormulaOf<S>::V;",
    ),
    (
        "an upstream gradient is read in the logits' dtype",
        "cuda/softmax.cu",
        "upstream_of<O>(a, b, p)",
        "upstream_of<S>(a, b, p)",
    ),
    (
        "a float target is read in the logits' dtype",
        "cuda/elementwise.cuh",
        "if (operand.dtype == DType::f32)\n      load_packs",
        "if (false)\n      load_packs",
    ),
    (
        "what a sum of two parts rounds away is lost",
        "cuda/simt.cuh",
        "(a.high - (sum - added)) + (b.high - added) + (a.low + b.low)",
        "T{0}",
    ),
    (
        "what a product of two parts rounds away is lost",
        "cuda/simt.cuh",
        "fma(a.high, b.high, -product) + fma(a.high, b.low, a.low * b.high)",
        "T{0}",
    ),
    ("ignored targets are counted", "cuda/softmax.cu", "    if (y == a.ignore_index) continue;\n", ""),
]
# What gives right results on every processor so far, and no GPU promises: for ThreadSanitizer alone.
RACES = [
    (
        "in place, a lane overwrites the target's logit that others of its warp read",
        "cuda/softmax.cu",
        "    __syncwarp();  // in place: every lane has read the target's logit\n",
        "",
    ),
    (
        "in place, a lane overwrites its neighbours' bins that others of its warp read",
        "cuda/distribution_focal.cu",
        "    __syncwarp();  // in place, the gradient overwrites a neighbour's logit that other lanes have read\n",
        "",
    ),
    (
        "a block says that it has read the others' sums before it does",
        "cuda/softmax.cu",
        "      s = *in_block(block_stats, lane % blocks);\n      cluster_arrive();",
        "      cluster_arrive();\n      s = *in_block(block_stats, lane % blocks);",
    ),
]


def survives(mutant: tuple[str, str, str, str], tests: str, folder: Path) -> bool:
    _, name, text, instead = mutant
    csrc = folder / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    for built in build.FOLDER.parent.glob("simt*"):  # what is not mutated need not be compiled again
        shutil.copytree(built, folder / built.name)
    path = csrc / name
    source = path.read_text()
    if text not in source:
        sys.exit(f"{name} no longer holds {text!r}: mend the mutant")
    path.write_text(source.replace(text, instead))
    environment = os.environ | {"FUSED_LOSSES_SIMT_CSRC": str(csrc), "FUSED_LOSSES_SIMT_BUILD": str(folder)}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", tests]
    return (
        subprocess.run(
            [*command, "test_cuda_on_cpu.py"], cwd=TESTS, env=environment, capture_output=True
        ).returncode
        == 0
    )


def main() -> None:
    table = Table("mutant", "tests")
    survivors = 0
    jobs = [(mutant, "not sanitizers") for mutant in MUTANTS]
    jobs += [(mutant, "sanitizers and thread") for mutant in RACES]
    for mutant, tests in track(jobs, "mutants", console=Console(stderr=True)):
        with tempfile.TemporaryDirectory() as folder:
            lives = survives(mutant, tests, Path(folder))
        survivors += lives
        table.add_row(mutant[0], "[red]pass: not noticed" if lives else "fail, as they should")
    Console().print(table)
    sys.exit(f"{survivors} of {len(jobs)} survive" if survivors else 0)


if __name__ == "__main__":
    main()
