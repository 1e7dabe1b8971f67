"""Builds fused_losses._C and, where it can, the CUDA kernels in fused_losses/_cuda.so, with ninja.

FUSED_LOSSES_FORCE_CUDA=1   build the CUDA kernels beside a CPU build of PyTorch too, or fail
FUSED_LOSSES_FORCE_CPU=1    leave the CUDA kernels out
TORCH_CUDA_ARCH_LIST        architectures to compile for, as in "8.0;9.0+PTX"
MAX_JOBS, NVCC_THREADS      compilations at a time, architectures at a time in each of nvcc's
CXX, CXXFLAGS, LDFLAGS      the C++ compiler and more flags for it
"""

from __future__ import annotations

import importlib
import importlib.util
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
from pathlib import Path
from typing import NoReturn

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
PACKAGE = "fused_losses"
OLDEST_TORCH = (2, 11)
INSTALL = "python -m pip install --no-build-isolation ."
CUDA_ARCHITECTURES = "8.0;8.6;8.9;9.0;10.0;12.0+PTX"
CXX_FLAGS = "-std=c++17 -O3 -DNDEBUG -fPIC -fvisibility=hidden -fvisibility-inlines-hidden".split()
WARNINGS = "-Wall -Wextra -Wno-psabi".split()  # psabi: vector types are passed between inlined functions only


def fail(sentence: str) -> NoReturn:
    sys.exit(f"{PACKAGE}: {sentence}")


def say(line: str) -> None:
    print(f"{PACKAGE}: {line}", flush=True)


def switched_on(variable: str) -> bool:
    return os.environ.get(variable, "0") not in ("", "0")


def sources(*patterns: str) -> list[str]:
    """Relative to the root: an object's command, and so its up-to-dateness, survives a move of the tree."""
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in CSRC.glob(pattern))


@dataclass
class Torch:
    version: str
    cuda: str | None
    folder: Path

    @staticmethod
    def find() -> Torch:
        """Found without importing it, which would take longer than a build with nothing to do."""
        spec = importlib.util.find_spec("torch")
        if spec is None or spec.origin is None:
            fail(
                f"PyTorch is not installed where this build runs: run `python -m pip install 'torch>=2.11'`, then "
                f"`{INSTALL}` (without --no-build-isolation pip hides the installed PyTorch from the build)."
            )
        folder = Path(spec.origin).parent
        facts = runpy.run_path(str(folder / "version.py"))
        version = str(facts["__version__"])
        if tuple(int(number) for number in re.findall(r"\d+", version)[:2]) < OLDEST_TORCH:
            fail(
                f"PyTorch 2.11 or later is needed and {version} is installed: "
                f"run `python -m pip install --upgrade 'torch>=2.11'`, then `{INSTALL}`."
            )
        return Torch(version, facts.get("cuda"), folder)


def require_build_tools() -> None:
    missing = [name for name in ("ninja", "pybind11") if importlib.util.find_spec(name) is None]
    if missing:
        fail(f"{' and '.join(missing)} missing: run `python -m pip install {' '.join(missing)}`, then `{INSTALL}`.")
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.exists():
        fail(f"Python's C headers are missing ({header}): install your system's python3-dev (python3-devel) package.")


def find_compiler() -> list[str]:
    chosen = shlex.split(os.environ.get("CXX", ""))
    for command in [chosen] if chosen else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    fail(
        f"no C++ compiler found (looked for {chosen[0] if chosen else 'c++, g++ and clang++'}): "
        f"install one, for example with `apt install g++`, or name yours in CXX."
    )


def first_line(command: list[str]) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip().split("\n")[0]
    except (OSError, subprocess.CalledProcessError) as error:
        fail(f"`{shlex.join(command)}` does not run here: {error}.")


@dataclass
class Cuda:
    nvcc: str
    architectures: list[str]  # as in TORCH_CUDA_ARCH_LIST

    @staticmethod
    def find(torch: Torch) -> Cuda | str:
        """The CUDA kernels' build, or the reason why there is none."""
        forced = switched_on("FUSED_LOSSES_FORCE_CUDA")
        if switched_on("FUSED_LOSSES_FORCE_CPU"):
            if forced:
                fail("FUSED_LOSSES_FORCE_CUDA and FUSED_LOSSES_FORCE_CPU are both set: unset one of them.")
            return "FUSED_LOSSES_FORCE_CPU is set"
        homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
        folders = [f"{home}/bin" for home in homes if home]
        folders += [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
        nvcc = shutil.which("nvcc", path=os.pathsep.join(folders))
        if nvcc is None:
            if forced:
                fail(
                    "FUSED_LOSSES_FORCE_CUDA is set and no nvcc was found in CUDA_HOME, CUDA_PATH, PATH or "
                    "/usr/local/cuda: install the CUDA toolkit or set CUDA_HOME to its folder."
                )
            return "no nvcc was found"
        if torch.cuda is None and not forced:
            return f"PyTorch {torch.version} has no CUDA; FUSED_LOSSES_FORCE_CUDA=1 builds them all the same"
        if not sources("cuda/*.cu"):
            if forced:
                fail("FUSED_LOSSES_FORCE_CUDA is set and csrc/cuda holds no kernel.")
            return "csrc/cuda holds no kernel"
        return Cuda(nvcc, Cuda.choose_architectures(nvcc))

    @staticmethod
    def choose_architectures(nvcc: str) -> list[str]:
        listed = subprocess.run([nvcc, "--list-gpu-arch"], check=True, capture_output=True, text=True).stdout
        known = set(re.findall(r"compute_(\d+)", listed))
        asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").replace(",", " ").split()
        chosen = []
        for name in asked or CUDA_ARCHITECTURES.split(";"):
            match = re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", name)
            if match and match[1] + match[2] in known:
                chosen.append(name)
            elif asked:
                fail(
                    f"TORCH_CUDA_ARCH_LIST names {name!r}, which {nvcc} does not compile for: write numbers as in "
                    f"'8.0;9.0+PTX' out of {', '.join(f'{n[:-1]}.{n[-1]}' for n in sorted(known, key=int))}."
                )
        if not asked and not chosen[-1].endswith("+PTX"):  # an older nvcc: newer devices still need code to start from
            chosen[-1] += "+PTX"
        return chosen

    def gencode(self) -> list[str]:
        flags = []
        for architecture in self.architectures:
            number = architecture.removesuffix("+PTX").replace(".", "")
            flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
            if architecture.endswith("+PTX"):
                flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
        return flags


def ninja_file(folder: str, torch: Torch, cxx: list[str], cuda: Cuda | None) -> tuple[str, dict[str, str]]:
    """The text of build.ninja and the shared object of each extension."""
    from ninja.ninja_syntax import Writer

    def quoted(*arguments: str) -> str:
        return shlex.join(arguments).replace("$", "$$")

    headers = [str(torch.folder / "include"), sysconfig.get_path("include")]
    headers.insert(0, importlib.import_module("pybind11").get_include())
    system = [argument for header in headers for argument in ("-isystem", header)]
    flags = ["-Icsrc", *system, "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    cxx_flags = [*CXX_FLAGS, *WARNINGS, *flags, *shlex.split(os.environ.get("CXXFLAGS", ""))]
    libraries = ["-L" + str(torch.folder / "lib"), "-ltorch_cpu", *shlex.split(os.environ.get("LDFLAGS", ""))]

    out = io.StringIO()
    ninja = Writer(out, width=110)
    ninja.variable("builddir", folder)
    ninja.variable("cxx", quoted(*cxx))

    def compile_all(rule: str, paths: list[str], defines: dict[str, str]) -> list[str]:
        objects = []
        for path in paths:
            objects.append(f"{folder}/{path}.o")
            ninja.build(objects[-1:], rule, [path], variables={"defines": defines.get(path, "")})
        return objects

    # -MD rather than -MMD: an upgrade of PyTorch must recompile what includes its headers.
    command = f"$cxx {quoted(*cxx_flags)} $defines -MD -MF $out.d -c $in -o $out"
    ninja.rule("cxx", command, description="C++ $in", depfile="$out.d", deps="gcc")
    ninja.rule("link", f"$cxx -shared -o $out $in -Wl,--no-as-needed {quoted(*libraries)}", description="link $out")
    built_for = ";".join(cuda.architectures) if cuda else ""
    defines = {"csrc/module.cpp": quoted(f'-DFUSED_LOSSES_CUDA_ARCHS="{built_for}"')}
    paths = [path for path in sources("*.cpp", "cpu/*.cpp", "torch/*.cpp") if "/cuda_" not in path]
    library = {f"{PACKAGE}._C": f"{folder}/_C.so"}
    ninja.build([library[f"{PACKAGE}._C"]], "link", compile_all("cxx", paths, defines))

    if cuda:
        host = ",".join([*(flag for flag in CXX_FLAGS if not flag.startswith(("-std", "-O", "-D"))), *WARNINGS])
        nvcc = [cuda.nvcc, "-std=c++17", "-O3", "-DNDEBUG", "-DUSE_CUDA", *flags, f"-Xcompiler={host}"]
        nvcc += [*cuda.gencode(), f"--threads={os.environ.get('NVCC_THREADS', '4')}"]
        nvcc += [f"-ccbin={cxx[0]}"] if len(cxx) == 1 else []
        ninja.rule(
            "nvcc", f"{quoted(*nvcc)} -MD -MF $out.d -c $in -o $out", "nvcc $in", depfile="$out.d", deps="gcc"
        )
        # The kernels find torch's CUDA stream in libtorch_cuda.so, which a CPU build of PyTorch does not have to link
        # against: an empty library of that name makes the loader look for the real one.
        stub = f"{folder}/libtorch_cuda.so"
        ninja.rule("stub", "$cxx -shared -nostdlib -Wl,-soname,libtorch_cuda.so -x c++ /dev/null -o $out", "stub $out")
        ninja.build([stub], "stub")
        # --exclude-libs: the static CUDA runtime's symbols must not meet those of the runtime PyTorch loads.
        options = "--cudart=static -Xlinker=--exclude-libs=ALL -Xlinker=--no-as-needed"
        ninja.rule("nvlink", f"{quoted(cuda.nvcc)} -shared {options} -o $out $in {quoted(*libraries)}", "link $out")
        objects = compile_all("nvcc", sources("cuda/*.cu", "torch/cuda_*.cpp"), {})
        library[f"{PACKAGE}._cuda"] = f"{folder}/_cuda.so"
        ninja.build([library[f"{PACKAGE}._cuda"]], "nvlink", [*objects, stub])
    return out.getvalue(), library


class CleanBuild(build):
    def run(self) -> None:
        # What an earlier build copied there and the tree no longer holds must not get into a wheel.
        shutil.rmtree(Path(self.build_lib) / PACKAGE, ignore_errors=True)
        super().run()


class NinjaBuild(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        # Loaded by torch.ops.load_library, not imported: no Python version in its name.
        filename: str = super().get_ext_filename(fullname)
        return filename.split(".")[0] + ".so" if fullname.endswith("_cuda") else filename

    def build_extensions(self) -> None:
        if sys.platform != "linux":
            fail(f"it builds on Linux, and this is {sys.platform}.")
        torch = Torch.find()
        require_build_tools()
        cxx = find_compiler()
        cuda = Cuda.find(torch)
        levels = [Path(path).stem.removeprefix("level_") for path in sources("cpu/level_*.cpp")]
        x86 = sysconfig.get_platform().endswith("x86_64")
        say(f"PyTorch {torch.version} in {torch.folder}")
        say(f"C++ compiler {first_line([*cxx, '--version'])}")
        say(f"CPU kernels: {', '.join(levels) if x86 else 'baseline'}; the best the machine has is taken at load")
        if isinstance(cuda, Cuda):
            say(f"CUDA kernels: {' '.join(cuda.architectures)}, by {cuda.nvcc}")
        else:
            say(f"CUDA kernels: left out, {cuda}")

        folder = Path("build") / str(sysconfig.get_config_var("SOABI"))
        (ROOT / folder).mkdir(parents=True, exist_ok=True)
        text, library = ninja_file(str(folder), torch, cxx, cuda if isinstance(cuda, Cuda) else None)
        (ROOT / folder / "build.ninja").write_text(text)
        jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
        command = [sys.executable, "-m", "ninja", "-f", str(folder / "build.ninja"), "-j", jobs]
        if subprocess.run(command, cwd=ROOT).returncode != 0:
            fail("the build stopped at the error shown above.")

        for extension in self.extensions:
            target = Path(self.get_ext_fullpath(extension.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            if extension.name in library:
                self.copy_file(str(ROOT / library[extension.name]), str(target))
            else:  # left out now, perhaps not the last time
                target.unlink(missing_ok=True)
                Path(self.get_ext_filename(extension.name)).unlink(missing_ok=True)
        self.extensions = [extension for extension in self.extensions if extension.name in library]
        for header in [*CSRC.rglob("*.h"), *CSRC.rglob("*.cuh")]:
            copy = Path(self.build_lib) / PACKAGE / "include" / header.relative_to(CSRC)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(header, copy)


setup(
    ext_modules=[Extension(f"{PACKAGE}._C", []), Extension(f"{PACKAGE}._cuda", [])],
    cmdclass={"build": CleanBuild, "build_ext": NinjaBuild},
)
