"""What nvcc makes of the kernels: no warning, no spilled register, local memory and 16-byte accesses as meant.

For one architecture; with --all-architectures for every one that setup.py builds for.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import cuda_report  # noqa: E402

pytestmark = pytest.mark.skipif(cuda_report.nvcc() is None, reason="no nvcc here")


def default_architectures() -> list[str]:
    names = re.search(r'^CUDA_ARCHITECTURES = "(.*)"', (ROOT / "setup.py").read_text(), re.MULTILINE)
    assert names
    return [name.removesuffix("+PTX") for name in names[1].split(";")]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "architecture" in metafunc.fixturenames:
        every = metafunc.config.getoption("--all-architectures")
        metafunc.parametrize("architecture", default_architectures() if every else ["9.0"])


def test_kernels(architecture: str, tmp_path: Path) -> None:
    """Compiles with every warning an error, so this is also the test that there is none."""
    kernels = cuda_report.every_kernel(architecture, tmp_path)
    assert len(kernels) > 100
    for kernel in kernels:
        assert kernel.spills == 0, kernel
        # What printf is handed before an assertion stops the kernel lies in local memory, and nothing else.
        prints = kernel.name.startswith(
            ("softmax", "count", "pairwise", "encode", "distribution_focal")
        ) or re.match(r"elementwise\w*_kernel<Bce,", kernel.name)
        assert kernel.stack <= (16 if prints else 0), kernel
        if kernel.name.startswith(("elementwise", "scale", "softmax_block")):
            staged = re.match(r"softmax_block_kernel<.*true>", kernel.name)
            assert (kernel.copies if staged else kernel.loads) > 0, kernel
            assert kernel.stores > 0, kernel


def test_it_notices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that spills, and one with an array in local memory."""
    source = tmp_path / "bad.cu"
    source.write_text("""
__global__ void __launch_bounds__(1024, 2) spills(float* x) {
  float y[64];
#pragma unroll
  for (int i = 0; i < 64; ++i) y[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 64; ++i) x[i * 1024 + threadIdx.x] = y[i] * y[63 - i];
}
__global__ void indexes(float* x, int at) {
  float y[8];
  for (int i = 0; i < 8; ++i) y[i] = x[i];
  y[at] = 1;
  for (int i = 0; i < 8; ++i) x[i] = y[i ^ at];
}
""")
    with pytest.raises(RuntimeError, match="spill"):
        cuda_report.kernels(source, "9.0", tmp_path)
    monkeypatch.setattr(cuda_report, "WARNINGS", ["-Xptxas=-v"])
    kernels = {
        kernel.name.partition("(")[0]: kernel for kernel in cuda_report.kernels(source, "9.0", tmp_path)
    }
    assert kernels["spills"].spills > 0
    assert kernels["indexes"].stack > 0
