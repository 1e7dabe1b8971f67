"""Builds fused_losses._C, fused_losses._native_autograd and, where it can, the CUDA kernels in fused_losses/_cuda.so,
with ninja.

FUSED_LOSSES_FORCE_CUDA=1   build the CUDA kernels beside a CPU build of PyTorch too, or fail
FUSED_LOSSES_FORCE_CPU=1    leave the CUDA kernels out
CUDA_HOME                   the CUDA toolkit, else the nvcc on PATH or in /usr/local/cuda
TORCH_CUDA_ARCH_LIST        architectures to compile for, as in "8.0;9.0+PTX"
MAX_JOBS, NVCC_THREADS      compilations at a time, architectures at a time in each of nvcc's
CXX, CXXFLAGS, LDFLAGS      the C++ compiler and more flags for it
"""

from __future__ import annotations

import fcntl
import io
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.command.dist_info import dist_info

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
PIP = "python -m pip install"
CUDA_ARCHITECTURES = "8.0;8.6;8.9;9.0;10.0;12.0+PTX"
OPTIMISED = ["-O2", "-DNDEBUG"]
# No psabi: vector types are passed between inlined functions only.
HOST = ["-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden", "-Wall", "-Wextra", "-Wno-psabi"]


def fail(sentence: str) -> NoReturn:
    sys.exit(f"fused_losses: {sentence}")


def say(line: str) -> None:
    print(f"fused_losses: {line}", flush=True)


def switched_on(variable: str) -> bool:
    return os.environ.get(variable, "").lower() not in ("", "0", "false", "no", "off")


def output_of(*command: str) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        fail(f"`{shlex.join(command)}` does not run here ({error}): mend it or choose another.")


def sources(*patterns: str) -> list[str]:
    """Relative to the root, so that a moved tree is still up to date."""
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in CSRC.glob(pattern))


@dataclass
class Torch:
    version: str
    cuda: str | None  # the CUDA version it was built for
    folder: Path


def find_torch() -> Torch:
    """Without importing it, which takes longer than a build with nothing to do."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        fail(
            f"PyTorch is not installed where this build runs: `{PIP} 'torch>=2.11'`, then "
            f"`{PIP} --no-build-isolation .` (an isolated build does not see the PyTorch you have)."
        )
    folder = Path(spec.origin).parent
    facts = runpy.run_path(str(folder / "version.py"))
    version = str(facts["__version__"])
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < (2, 11):
        fail(f"PyTorch {version} is too old, it takes 2.11 or later: `{PIP} --upgrade 'torch>=2.11'`.")
    return Torch(version, facts.get("cuda"), folder)


def find_compiler() -> list[str]:
    chosen = shlex.split(os.environ.get("CXX", ""))
    for command in [chosen] if chosen else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    looked_for = f"CXX={chosen[0]}" if chosen else "c++, g++, clang++"
    fail(f"there is no C++ compiler ({looked_for}): `apt install g++` or the like, or name yours in CXX.")


def require_headers() -> None:
    missing = " ".join(name for name in ("ninja", "pybind11") if find_spec(name) is None)
    if missing:
        fail(f"the build needs {missing.replace(' ', ' and ')}: `{PIP} {missing}`.")
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.exists():
        fail(f"Python's C headers are missing ({header}): `apt install python3-dev` or the like.")


def find_nvcc(torch: Torch) -> tuple[str | None, str]:
    """The nvcc to use, or None and the reason."""
    forced = switched_on("FUSED_LOSSES_FORCE_CUDA")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else f"{os.environ['PATH']}:/usr/local/cuda/bin")
    if switched_on("FUSED_LOSSES_FORCE_CPU"):
        if forced:
            fail("FUSED_LOSSES_FORCE_CUDA and FUSED_LOSSES_FORCE_CPU contradict each other: unset one.")
        return None, "FUSED_LOSSES_FORCE_CPU is set"
    if not nvcc:
        reason = f"there is no nvcc in {f'{home}/bin' if home else 'PATH or /usr/local/cuda/bin'}"
    elif not sources("cuda/*.cu"):
        reason = "csrc/cuda holds no kernel"
    elif not torch.cuda and not forced:
        return None, f"PyTorch {torch.version} has no CUDA (FUSED_LOSSES_FORCE_CUDA=1 builds them anyway)"
    else:
        return nvcc, ""
    if forced:
        fail(f"FUSED_LOSSES_FORCE_CUDA is set and {reason}: install the CUDA toolkit or set CUDA_HOME to it.")
    return None, reason


def cuda_architectures(nvcc: str) -> list[str]:
    """In the notation of TORCH_CUDA_ARCH_LIST."""
    known = re.findall(r"compute_(\d+)(\d)", output_of(nvcc, "--list-gpu-arch"))
    asked = re.split(r"[;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip(";, "))
    chosen = []
    for name in asked if asked != [""] else CUDA_ARCHITECTURES.split(";"):
        match = re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", name)
        if match and match.groups()[:2] in known:
            chosen.append(name)
        elif asked != [""]:
            can = ", ".join(".".join(number) for number in known)
            fail(f"TORCH_CUDA_ARCH_LIST names {name!r} and {nvcc} compiles for {can}: write '8.0;9.0+PTX'.")
    if asked == [""] and not chosen[-1].endswith("+PTX"):
        chosen[-1] += (
            "+PTX"  # an nvcc older than the last in the list: later devices need something to compile
        )
    return chosen


def gencode(architecture: str) -> list[str]:
    number = architecture.removesuffix("+PTX").replace(".", "")
    targets = [f"sm_{number}"] + [f"compute_{number}"] * architecture.endswith("+PTX")
    return [f"-gencode=arch=compute_{number},code={target}" for target in targets]


def write_ninja(
    folder: Path, torch: Torch, cxx: list[str], nvcc: str | None, architectures: list[str]
) -> None:
    import pybind11
    from ninja.ninja_syntax import Writer

    out: Any = io.StringIO()  # the type stub asks for a str
    ninja: Any = Writer(out)  # nor do its other types hold
    ninja.variable("builddir", str(folder))

    def rule(name: str, *command: str) -> None:
        # -MD and not -MMD: an upgrade of PyTorch recompiles what includes its headers.
        track = {"depfile": "$out.d", "deps": "gcc"} if "-c" in command else {}
        line = shlex.join(command).replace("$", "$$") + (" $flags -MD -MF $out.d" if track else "")
        ninja.rule(
            name,
            f"{line} -o $out $in $libraries",
            description=f"{name} $in" if track else "link $out",
            **track,
        )

    def objects(name: str, paths: list[str], **flags: str) -> list[str]:
        for path in paths:
            ninja.build(f"{folder}/{path}.o", name, path, variables={"flags": flags.get(Path(path).stem, "")})
        return [f"{folder}/{path}.o" for path in paths]

    headers = [pybind11.get_include(), str(torch.folder / "include"), sysconfig.get_path("include")]
    common = [*OPTIMISED, "-Icsrc", *(flag for path in headers for flag in ("-isystem", path))]
    host = [*HOST, *shlex.split(os.environ.get("CXXFLAGS", "")), "-c"]
    libraries = shlex.join([f"-L{torch.folder}/lib", "-ltorch_cpu"]) + " " + os.environ.get("LDFLAGS", "")

    # Autograd is outside of the stable ABI: this part is for the PyTorch at hand, the others for any from 2.11 on.
    rule("native", *cxx, "-std=c++20", *common, *host)
    common += ["-std=c++17", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    rule("cxx", *cxx, *common, *host)
    rule("link", *cxx, "-shared", "-Wl,--no-as-needed")
    paths = [path for path in sources("*.cpp", "cpu/*.cpp", "torch/*.cpp") if "/cuda_" not in path]
    facts = {"CUDA_ARCHS": ";".join(architectures), "TORCH": torch.version}
    built_for = shlex.join(f'-DFUSED_LOSSES_{name}="{value}"' for name, value in facts.items())
    made = objects("cxx", paths, module=built_for)
    ninja.build(f"{folder}/_C.so", "link", made, variables={"libraries": libraries})
    required = [f"{folder}/_C.so"]
    made = objects("native", sources("autograd/*.cpp"))
    python = {"libraries": f"{libraries} -ltorch_python -lc10"}
    ninja.build(f"{folder}/_native_autograd.so", "link", made, variables=python)

    if nvcc:
        flags = [flag for architecture in architectures for flag in gencode(architecture)]
        flags += [
            f"--threads={os.environ.get('NVCC_THREADS', '4')}",
            f"-Xcompiler={','.join(HOST)}",
            "-DUSE_CUDA",
        ]
        compiler = [f"-ccbin={cxx[0]}"] if len(cxx) == 1 else []  # more words are a launcher or flags
        rule("nvcc", nvcc, *compiler, *common, *flags, "-c")
        # The current CUDA stream comes from libtorch_cuda.so, which a CPU build of PyTorch does not have:
        # linking against an empty library of that name makes the loader look for the real one.
        rule("stub", *cxx, "-shared", "-nostdlib", "-Wl,-soname,libtorch_cuda.so", "-xc++", "/dev/null")
        ninja.build(f"{folder}/libtorch_cuda.so", "stub")
        # PyTorch may load another CUDA runtime: the symbols of ours stay inside.
        hide = ["-Xlinker=--no-as-needed", "-Xlinker=--exclude-libs=ALL"]
        rule("nvlink", nvcc, *compiler, "-shared", "-nodlink", "--cudart=static", *hide)
        shared = [f"{folder}/csrc/torch/{name}.cpp.o" for name in ("arguments", "kept_memory", "tensors")]
        made = [*objects("nvcc", sources("cuda/*.cu", "torch/cuda_*.cpp")), *shared]
        libraries += f" -L{folder} -ltorch_cuda"
        stub = [f"{folder}/libtorch_cuda.so"]
        ninja.build(f"{folder}/_cuda.so", "nvlink", made, implicit=stub, variables={"libraries": libraries})
        required.append(f"{folder}/_cuda.so")
    ninja.build("required", "phony", required)
    (ROOT / folder / "build.ninja").write_text(out.getvalue())


def toolchain() -> tuple[Torch, list[str]]:
    if sys.platform != "linux":
        fail(f"it builds on Linux, and this is {sys.platform}.")
    torch, compiler = find_torch(), find_compiler()
    require_headers()
    return torch, compiler


class Metadata(dist_info):
    def run(self) -> None:
        # pip asks for this first: what is missing shows before gigabytes of dependencies are fetched.
        toolchain()
        super().run()


class CleanBuild(build):
    def run(self) -> None:
        # What the tree no longer holds must not reach a wheel from an earlier build.
        shutil.rmtree(Path(self.build_lib, "fused_losses"), ignore_errors=True)
        super().run()


class NinjaBuild(build_ext):
    extensions: list[Extension]

    def get_ext_filename(self, fullname: str) -> str:
        # torch.ops.load_library takes _cuda.so, Python never does: its name holds no Python version.
        filename: str = super().get_ext_filename(fullname)
        return filename.split(".")[0] + ".so" if fullname.endswith("_cuda") else filename

    def build_extensions(self) -> None:
        torch, cxx = toolchain()
        nvcc, reason = find_nvcc(torch)
        architectures = cuda_architectures(nvcc) if nvcc else []
        levels = [Path(path).stem.removeprefix("level_") for path in sources("cpu/level_*.cpp")]
        if not sysconfig.get_platform().endswith("x86_64"):
            levels = ["baseline"]  # the other files compile to nothing
        say(f"PyTorch {torch.version} in {torch.folder}")
        say(f"C++ compiler {output_of(*cxx, '--version').splitlines()[0]}")
        say(f"CPU kernels for {', '.join(levels)}: the best the machine has is taken at load")
        say(f"CUDA kernels for {' '.join(architectures)} by {nvcc}" if nvcc else f"no CUDA kernels: {reason}")

        left_out = [] if nvcc else ["_cuda"]
        folder = Path("build", str(sysconfig.get_config_var("SOABI")))
        (ROOT / folder).mkdir(parents=True, exist_ok=True)
        jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
        ninja = [sys.executable, "-m", "ninja", "-f", f"{folder}/build.ninja", "-j", jobs]
        with (ROOT / folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two at once would compile everything twice and spoil the log
            write_ninja(folder, torch, cxx, nvcc, architectures)
            if subprocess.run([*ninja, "-k", "0"], cwd=ROOT).returncode != 0:
                if subprocess.run([*ninja, "required"], cwd=ROOT).returncode != 0:
                    fail("the build stopped at the error shown above.")
                say("the compiled autograd is left out: Python's serves, some microseconds slower")
                left_out.append("_native_autograd")

        for extension in list(self.extensions):
            target, name = Path(self.get_ext_fullpath(extension.name)), extension.name.rpartition(".")[2]
            if name in left_out:
                self.extensions.remove(extension)
                for stale in (target, ROOT / "fused_losses" / target.name):
                    stale.unlink(missing_ok=True)
            else:
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / folder / f"{name}.so", target)
        for header in [*CSRC.rglob("*.h"), *CSRC.rglob("*.cuh")]:
            copy = Path(self.build_lib, "fused_losses", "include", header.relative_to(CSRC))
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(header, copy)


setup(
    license="BSD-3-Clause",
    ext_modules=[Extension(f"fused_losses.{name}", []) for name in ("_C", "_native_autograd", "_cuda")],
    cmdclass={"build": CleanBuild, "build_ext": NinjaBuild, "dist_info": Metadata},
)
