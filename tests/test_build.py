"""The build: what it links against, what it ships, and what it says where it can't."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

import fused_losses._C

ROOT = Path(__file__).parents[1]
TORCH = Path(torch.__file__).parent
SITE_PACKAGES = sorted({str(TORCH.parent), *(path for path in sys.path if path.endswith("-packages"))})
NVCC = shutil.which("nvcc", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")


def clean_environment(**changes: str) -> dict[str, str]:
    ours = re.compile("FUSED_LOSSES_|CUDA_HOME|CUDA_PATH|TORCH_CUDA_ARCH_LIST|PYTHONPATH")
    return {name: value for name, value in os.environ.items() if not ours.match(name)} | changes


def run(*command: str | Path, cwd: Path, fails: bool = False, **environment: str) -> str:
    result = subprocess.run(
        command,
        cwd=cwd,
        env=clean_environment(**environment),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert (result.returncode != 0) == fails, result.stdout
    return result.stdout


def copy_tree(target: Path) -> Path:
    """A copy of the project, its objects included: building there compiles only what the test changes."""
    left = shutil.ignore_patterns("dist", "lib.*", "bdist.*", "compare", "*.egg-info", "__pycache__", "*.so")

    def ignored(folder: str, names: list[str]) -> set[str]:
        hidden = {name for name in names if name[0] == "." and not name.startswith(".ninja")}
        return hidden | left(folder, names)

    shutil.copytree(ROOT, target, ignore=ignored)
    return target


def headers() -> set[str]:
    csrc = ROOT / "csrc"
    return {str(path.relative_to(csrc)) for pattern in ("*.h", "*.cuh") for path in csrc.rglob(pattern)}


# -- Symbols


def torch_cpp_symbols(library: Path) -> list[str]:
    """The symbols it asks of torch's C++ interface, which changes from one release to the next."""
    listed = run("nm", "--dynamic", "--undefined-only", "--demangle", library, cwd=ROOT)
    return [line for line in listed.splitlines() if re.search(r"\b(at|c10|torch)::", line)]


def needed(library: Path) -> list[str]:
    return re.findall(r"\(NEEDED\).*\[(.*)\]", run("readelf", "--dynamic", library, cwd=ROOT))


LIBRARIES = sorted(Path(fused_losses._C.__file__).parent.glob("*.so"))


@pytest.mark.parametrize(
    "library", [path for path in LIBRARIES if "native_autograd" not in path.name], ids=lambda p: p.name
)
def test_asks_nothing_of_torch_cpp(library: Path) -> None:
    assert torch_cpp_symbols(library) == []
    assert "libtorch_cpu.so" in needed(library)


def test_the_symbol_check_can_fail() -> None:
    symbols = torch_cpp_symbols(TORCH / "lib" / "libtorch_python.so")
    for namespace in ("at::", "c10::", "torch::"):
        assert any(namespace in symbol for symbol in symbols), namespace


# -- Rebuilding


ONE_LOSS = """
import torch
import fused_losses.functional as F

loss = F.cross_entropy(torch.zeros(1, 2, requires_grad=True), torch.tensor([0]))
print(loss.grad_fn.name())
"""


def test_only_what_changed_is_compiled_again(tmp_path: Path) -> None:
    tree = copy_tree(tmp_path / "tree")
    build = [sys.executable, "setup.py", "build_ext", "--inplace"]
    run(*build, cwd=tree, FUSED_LOSSES_FORCE_CPU="1")
    assert "no work to do" in run(*build, cwd=tree, FUSED_LOSSES_FORCE_CPU="1")

    (tree / "csrc/math/focal.h").touch()
    ninja_file = next(tree.glob("build/*/build.ninja"))
    planned = run(sys.executable, "-m", "ninja", "-n", "-f", str(ninja_file.relative_to(tree)), cwd=tree)
    assert "cxx csrc/cpu/level_baseline.cpp" in planned
    assert "csrc/module.cpp" not in planned

    # A PyTorch whose autograd is not as it was costs the compiled form of it and nothing else.
    with (tree / "csrc/autograd/native_autograd.cpp").open("a") as source:
        source.write("#error\n")
    assert "the compiled autograd is left out" in run(*build, cwd=tree, FUSED_LOSSES_FORCE_CPU="1")
    assert not list((tree / "fused_losses").glob("_native_autograd*.so"))
    assert "StoredBackward" in run(sys.executable, "-c", ONE_LOSS, cwd=tree)


# -- Distributions


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = copy_tree(tmp_path_factory.mktemp("sdist") / "tree")
    run(sys.executable, "setup.py", "--quiet", "sdist", cwd=tree)
    return next(tree.glob("dist/*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sdist, so from nothing that the sdist forgot, amid the leavings of an earlier build."""
    folder = tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder)
    tree = next(folder.iterdir())
    shutil.copytree(sdist.parents[1] / "build", tree / "build")
    leavings = (
        tree / "build" / f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}" / "fused_losses"
    )
    leavings.mkdir(parents=True)
    for name in ("_cuda.so", "forgotten.py"):
        (leavings / name).touch()
    options = ["--quiet", "--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", str(folder)]
    run(sys.executable, "-m", "pip", "wheel", *options, tree, cwd=folder, FUSED_LOSSES_FORCE_CPU="1")
    return next(folder.glob("*.whl"))


def inside(names: Iterable[str], folder: str) -> set[str]:
    return {name.partition(folder)[2] for name in names if folder in name}


def test_sdist_holds_every_source(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = archive.getnames()
    assert headers() <= inside(names, "/csrc/")
    for kind in ("*.cpp", "*.cu", "*.py", "py.typed"):
        for path in [*ROOT.glob(f"csrc/**/{kind}"), *ROOT.glob(f"fused_losses/**/{kind}")]:
            assert any(name.endswith(f"/{path.relative_to(ROOT)}") for name in names), path
    assert not [name for name in names if name.endswith((".so", ".o"))]


def test_wheel_holds_every_header_and_no_leavings(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert inside(names, "fused_losses/include/") == headers()
    package = ROOT / "fused_losses"
    modules = {str(path.relative_to(package)) for path in package.rglob("*.py")}
    assert inside(names, "fused_losses/") >= modules | {"py.typed"}
    assert not inside(names, "fused_losses/") & {"_cuda.so", "forgotten.py"}
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"fused_losses"}


def test_wheel_installs_into_a_clean_environment(wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=tmp_path)
    python = environment / "bin" / "python"
    site = Path(
        run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip()
    )
    # torch comes from here; a .pth file below these folders, such as our own editable install's, is not read.
    (site / "torch.pth").write_text("\n".join(SITE_PACKAGES))
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index", "--no-deps"]
    run(*pip, wheel, cwd=tmp_path)
    program = """
import torch, fused_losses, fused_losses._C
logits, target = torch.randn(8, 10, requires_grad=True), torch.randint(10, (8,))
losses = [package.CrossEntropyLoss()(logits, target) for package in (torch.nn, fused_losses)]
gradients = [torch.autograd.grad(loss, logits)[0] for loss in losses]
torch.testing.assert_close(*losses)
torch.testing.assert_close(*gradients)
print(fused_losses.__file__, fused_losses._C.__file__, sep="\\n")
"""
    for file in run(python, "-c", program, cwd=tmp_path).split():
        assert Path(file).is_relative_to(site)


# -- What it says


@pytest.fixture
def modules(tmp_path: Path) -> Path:
    """A folder to import from that holds setuptools and nothing else."""
    import setuptools

    packages = Path(setuptools.__file__).parents[1]
    # Before 82 it imports pkg_resources, and reads the arguments setup() takes from its metadata.
    for pattern in ("setuptools*", "_distutils_hack", "pkg_resources"):
        for found in packages.glob(pattern):
            (tmp_path / found.name).symlink_to(found)
    return tmp_path


def refusal(*options: str, **environment: str) -> str:
    """The one sentence a build says that can't be."""
    said = run(sys.executable, *options, "setup.py", "-q", "build_ext", cwd=ROOT, fails=True, **environment)
    assert "Traceback" not in said
    sentence = said.strip().splitlines()[-1]
    assert sentence.startswith("fused_losses: "), said
    return sentence


def test_says_that_torch_is_missing(modules: Path) -> None:
    said = refusal("-S", PYTHONPATH=str(modules))
    assert "python -m pip install 'torch>=2.11'" in said
    assert "python -m pip install --no-build-isolation ." in said


def test_says_that_torch_is_too_old(modules: Path) -> None:
    (modules / "torch").mkdir()
    (modules / "torch" / "__init__.py").touch()
    (modules / "torch" / "version.py").write_text("__version__ = '2.9.1+cpu'\ncuda = None\n")
    assert re.search(
        r"2\.9\.1\+cpu is too old.*2\.11 or later.*--upgrade 'torch>=2.11'",
        refusal("-S", PYTHONPATH=str(modules)),
    )


def test_says_that_build_tools_are_missing(modules: Path) -> None:
    (modules / "torch").symlink_to(TORCH)
    said = refusal("-S", PYTHONPATH=str(modules))
    assert "needs ninja and pybind11: `python -m pip install ninja pybind11`" in said


@pytest.mark.parametrize("chosen", ["", "no-such-compiler"])
def test_says_that_the_compiler_is_missing(tmp_path: Path, chosen: str) -> None:
    said = refusal(PATH=str(tmp_path), CXX=chosen)
    assert f"no C++ compiler ({f'CXX={chosen}' if chosen else 'c++, g++, clang++'})" in said


def test_says_it_before_pip_fetches_anything(tmp_path: Path) -> None:
    command = [
        "-m",
        "pip",
        "install",
        "--no-build-isolation",
        "--no-index",
        "--target",
        str(tmp_path / "site"),
        str(ROOT),
    ]
    said = run(sys.executable, *command, cwd=tmp_path, fails=True, PATH=str(tmp_path), CXX="")
    assert "no C++ compiler" in said
    assert "Traceback" not in said


def test_forced_cuda_without_nvcc_is_an_error(tmp_path: Path) -> None:
    said = refusal(FUSED_LOSSES_FORCE_CUDA="1", CUDA_HOME=str(tmp_path))
    assert f"there is no nvcc in {tmp_path}/bin: install the CUDA toolkit or set CUDA_HOME" in said


def test_forcing_both_is_an_error() -> None:
    assert "unset one" in refusal(FUSED_LOSSES_FORCE_CUDA="1", FUSED_LOSSES_FORCE_CPU="1")


# -- CUDA

KERNEL = """
__global__ void fill(int* x) { *x = 1; }
void launch(int* x, void* stream) { fill<<<1, 1, 0, static_cast<cudaStream_t>(stream)>>>(x); }
"""
CALLER = """
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
void launch(int* x, void* stream);
__attribute__((visibility("default"))) void call(int* x) {
  void* stream;
  aoti_torch_get_current_cuda_stream(0, &stream);
  launch(x, stream);
}
"""


@pytest.fixture
def cuda_tree(tmp_path: Path) -> Path:
    tree = copy_tree(tmp_path / "tree")
    if not list(tree.glob("csrc/cuda/*.cu")):
        (tree / "csrc/cuda").mkdir(exist_ok=True)
        (tree / "csrc/cuda/probe.cu").write_text(KERNEL)
        (tree / "csrc/torch/cuda_probe.cpp").write_text(CALLER)
    return tree


@pytest.mark.skipif(NVCC is None, reason="no nvcc here")
def test_forced_cuda_builds_beside_any_torch(cuda_tree: Path) -> None:
    build = [sys.executable, "setup.py", "build_ext", "--inplace"]
    said = run(*build, cwd=cuda_tree, FUSED_LOSSES_FORCE_CUDA="1", TORCH_CUDA_ARCH_LIST="9.0")
    assert "CUDA kernels for 9.0 by" in said

    library = cuda_tree / "fused_losses/_cuda.so"
    assert {"libtorch_cuda.so", "libtorch_cpu.so"} <= set(needed(library))
    assert not [name for name in needed(library) if "cudart" in name or "python" in name]
    assert torch_cpp_symbols(library) == []
    undefined = run("nm", "--dynamic", "--undefined-only", library, cwd=cuda_tree)
    assert not re.search(r" U _?Py", undefined)
    defined = run("nm", "--dynamic", "--defined-only", library, cwd=cuda_tree)
    assert not re.search(r" T cuda", defined)

    program = "import torch, fused_losses._C as native; print(native.__file__, native.cuda_architectures())"
    assert run(sys.executable, "-c", program, cwd=cuda_tree).strip().endswith("['9.0']")


@pytest.mark.skipif(NVCC is None, reason="no nvcc here")
def test_unknown_architecture_is_an_error(cuda_tree: Path) -> None:
    build = [sys.executable, "setup.py", "-q", "build_ext"]
    said = run(*build, cwd=cuda_tree, fails=True, FUSED_LOSSES_FORCE_CUDA="1", TORCH_CUDA_ARCH_LIST="9.0;3.5")
    assert re.search(r"TORCH_CUDA_ARCH_LIST names '3\.5' and .* compiles for .*9\.0", said)


@pytest.mark.skipif(NVCC is None, reason="no nvcc here")
def test_cpu_torch_leaves_cuda_out_unless_forced(cuda_tree: Path) -> None:
    if torch.version.cuda is not None:
        pytest.skip("this PyTorch has CUDA")
    assert "no CUDA kernels: PyTorch" in run(sys.executable, "setup.py", "build_ext", cwd=cuda_tree)
