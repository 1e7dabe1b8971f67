"""What nvcc made of the CUDA kernels: registers, stack, spills and 16-byte accesses of each, as a table in docs/cuda.md.

    make cuda-report                          (python benchmarks/cuda_report.py --write)
    python benchmarks/cuda_report.py --architecture 8.0

Needs nvcc and no GPU. Where nvdisasm is installed, too (the CUDA toolkit has it, and so has `pip install
nvidia-cuda-nvdisasm`), the instructions of the longest unrolled loop body that stores 16 bytes are counted.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "cuda.md"
BEGIN, END = "<!-- cuda_report.py: begin -->", "<!-- end -->"
WARNINGS = ["-Xcompiler=-Wall,-Wextra", "--Werror=all-warnings", "-Xptxas=-v,--warn-on-spills"]
DTYPES = {"float": "fp32", "bf16": "bf16", "f16": "fp16", "double": "fp64"}
FOCUSING = ["gamma 0", "gamma below 1", "gamma 1", "gamma 1.5", "gamma 2", "any gamma"]


@dataclass
class Kernel:
    name: str  # as C++ spells it, without namespaces
    registers: int
    stack: int  # bytes of local memory, arguments of a printf included
    spills: int  # bytes
    loads: int = 0  # instructions that move 16 bytes: from global memory to registers,
    copies: int = 0  # from global to shared memory,
    stores: int = 0  # and to global memory

    @property
    def dtypes(self) -> list[str]:
        """Of the input, and of the loss where that may differ."""
        return [DTYPES[word] for word in re.findall(r"\w+", self.name.partition("<")[2]) if word in DTYPES]

    @property
    def dtype(self) -> str:
        return self.dtypes[0] if self.dtypes else ""

    @property
    def family(self) -> str:
        """The kernel and what it is specialised for, without the dtype."""
        base, _, arguments = self.name.partition("<")
        words = [word.strip() for word in re.split(r",(?![^(<]*[)>])", arguments.removesuffix(">"))]
        words = [word for word in words if word and word not in DTYPES]
        flags = {
            "softmax_lanes_kernel": [("index", "dense"), None],
            "softmax_block_kernel": [("index", "dense"), ("reread", "staged")],
            "softmax_columns_kernel": [("index", "dense")],
        }.get(base, [])
        said = []
        for word, pair in zip(words, [*flags, *[None] * len(words)], strict=False):
            if focusing := re.match(r"(\w+)<\(.*?\)(\d)>", word):
                said.append(f"{focusing[1]}, {FOCUSING[int(focusing[2])]}")
            elif pair and word in ("true", "false"):
                said.append(pair[word == "true"])
            else:
                said.append(f"{word} a lane" if base == "softmax_lanes_kernel" else word)
        if len(set(self.dtypes)) > 1:
            said.append(f"{self.dtypes[1]} loss")
        return " ".join([base.removesuffix("_kernel"), f"({', '.join(said)})" if said else ""]).strip()


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin" if home else f"{os.environ['PATH']}:/usr/local/cuda/bin")


def nvdisasm() -> str | None:
    if found := shutil.which("nvdisasm", path=f"{os.environ['PATH']}:/usr/local/cuda/bin"):
        return found
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or [] if spec else []:
        for path in Path(folder).glob("*/bin/nvdisasm"):
            return str(path)
    return None


def demangle(names: list[str]) -> list[str]:
    shown = subprocess.run(
        ["c++filt", "-p"], input="\n".join(names), capture_output=True, text=True, check=True
    )
    return [
        re.sub(r"fused_losses::(cuda::)?|\(anonymous namespace\)::", "", line)
        for line in shown.stdout.splitlines()
    ]


@cache
def compiled(source: Path, architecture: str, folder: Path) -> tuple[Path, str]:
    """The cubin, beside the PTX it is made of, and what the compiler said. Every warning is an error."""
    number = architecture.replace(".", "")
    target = folder / f"{source.stem}.cubin"
    command = [nvcc() or "nvcc", "-std=c++17", "-O2", "-DNDEBUG", "-I", str(ROOT / "csrc")]
    command += ["-cubin", "--keep", "--keep-dir", str(folder), *WARNINGS]
    command += [f"-gencode=arch=compute_{number},code=sm_{number}", "-o", str(target), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{source.name} for {architecture}: {done.stdout}{done.stderr}")
    return target, done.stdout + done.stderr


def kernels(source: Path, architecture: str, folder: Path) -> list[Kernel]:
    cubin, said = compiled(source, architecture, folder)
    found = re.findall(
        r"Compiling entry function '(\S+)' for .*?\n.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads\n.*?Used (\d+) registers",
        said,
        re.DOTALL,
    )
    ptx = cubin.with_suffix(".ptx").read_text()
    bodies = dict(re.findall(r"\.entry (\w+)\((.*?)\n}\n", ptx, re.DOTALL))
    result = []
    names = demangle([entry[0] for entry in found])
    for name, (mangled, stack, stored, loaded, registers) in zip(names, found, strict=True):
        body = bodies[mangled]
        result.append(
            Kernel(
                name,
                int(registers),
                int(stack),
                int(stored) + int(loaded),
                loads=len(
                    re.findall(r"\bld\.(?:global\.)?(?:nc\.)?v(?:4\.[uf]32|4\.b32|2\.[uf]64|2\.b64)", body)
                ),
                copies=len(re.findall(r"\bcp\.async\.\w+\.shared\.global \[.*?\], \[.*?\], 16", body)),
                stores=len(re.findall(r"\bst\.global\.v4\.b32", body)),
            )
        )
    return result


def every_kernel(architecture: str, folder: Path) -> list[Kernel]:
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    return [kernel for source in sources for kernel in kernels(source, architecture, folder)]


# -- SASS ------------------------------------------------------------------------------------------------------


@dataclass
class Loop:
    """A loop body without another loop in it."""

    kernel: str
    opcodes: list[str]
    # What each vote of a warp chooses between: instructions of the longer and of the shorter way.
    voted: list[tuple[int, int]]

    def instructions(self, shorter: bool) -> int:
        return len(self.opcodes) - sum(way[0 if shorter else 1] for way in self.voted)


def ways(jumps: dict[int, int], opcodes: list[str], vote: int) -> tuple[int, int] | None:
    """A vote, a branch over the first way, and at its end a jump over the second."""
    branch = next((at for at in range(vote, vote + 4) if at in jumps), None)
    if branch is None or jumps[branch] - 1 not in jumps:
        return None
    second = jumps[branch]
    lengths = second - branch - 1, jumps[second - 1] - second
    return max(lengths), min(lengths)


def loops(sass: str) -> Iterator[Loop]:
    parts = re.split(r"\n\.text\.(\S+):\n", sass)
    for name, body in zip(parts[1::2], parts[2::2], strict=True):
        opcodes: list[str] = []
        labels: dict[str, int] = {}
        targets: dict[int, str] = {}
        for line in body.splitlines():
            if label := re.match(r"(\.L_x_\d+):", line):
                labels[label[1]] = len(opcodes)
            elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(\S+)(.*)", line):
                opcodes.append(instruction[1].rstrip(";"))
                target = re.search(r"\((\.L_x_\d+)\)", instruction[2])
                if opcodes[-1] == "BRA" and target:
                    targets[len(opcodes) - 1] = target[1]
        jumps = {at: labels[label] for at, label in targets.items() if label in labels}
        spans = [(to, at + 1) for at, to in jumps.items() if to <= at]
        for begin, end in spans:
            if not any(begin <= other[0] and other[1] <= end and other != (begin, end) for other in spans):
                votes = [at for at in range(begin, end) if opcodes[at].startswith("VOTE.ANY")]
                voted = [way for vote in votes if (way := ways(jumps, opcodes, vote))]
                yield Loop(name, opcodes[begin:end], voted)


def instructions_an_element(architecture: str, folder: Path) -> dict[str, float]:
    """For each kernel that stores 16 bytes in a loop: the instructions of its loops, an element."""
    tool = nvdisasm()
    result: dict[str, float] = {}
    if tool is None:
        return result
    for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
        cubin, _ = compiled(source, architecture, folder)
        sass = subprocess.run([tool, "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
        found = list(loops(sass))
        for name, loop in zip(demangle([loop.kernel for loop in found]), found, strict=True):
            stores = sum(opcode.startswith("STG.E.128") for opcode in loop.opcodes)
            loads = sum(opcode.startswith("LDS.128") for opcode in loop.opcodes)
            size = {"fp32": 4, "bf16": 8, "fp16": 8, "fp64": 2}.get(Kernel(name, 0, 0, 0).dtype, 0)
            packs = stores or (loads if "softmax_block" in name and "MUFU.EX2" in loop.opcodes else 0)
            if not packs or not size:
                continue
            for shorter in (False, True) if loop.voted else (False,):
                key = f"{name} {'zeros' if shorter else 'out' if stores else 'in'}"
                # of several loops the unrolled one
                result[key] = min(result.get(key, 1e9), loop.instructions(shorter) / packs / size)
    return result


# -- the page --------------------------------------------------------------------------------------------------


def table(architecture: str, folder: Path) -> str:
    families: dict[str, dict[str, Kernel]] = {}
    for kernel in every_kernel(architecture, folder):
        families.setdefault(kernel.family, {})[kernel.dtype] = kernel
    lines = [
        f"For sm_{architecture.replace('.', '')}, by {version()}. A column with four numbers: fp32, bf16, fp16, fp64.",
        "",
        "| kernel | registers | stack, bytes | spilled, bytes | 16-byte loads | copies | stores |",
        "|---|---|---|---|---|---|---|",
    ]
    for family, by_dtype in families.items():
        found = [by_dtype[dtype] for dtype in (*DTYPES.values(), "") if dtype in by_dtype]

        def column(field: str, kernels: list[Kernel] = found) -> str:
            values = [str(getattr(kernel, field)) for kernel in kernels]
            return values[0] if len(set(values)) == 1 else " ".join(values)

        cells = [column(field) for field in ("registers", "stack", "spills", "loads", "copies", "stores")]
        lines.append(f"| {family} | {' | '.join(cells)} |")
    counted = instructions_an_element(architecture, folder)
    shown = [
        (name, value)
        for name, value in sorted(counted.items())
        if re.search(
            r"plain_kernel<.*(Logits|Focal<.*\)4>), (float|bf16), \w+>|block_kernel<(float|bf16), \w+, false, true",
            name,
        )
    ]
    if shown:
        lines += [
            "",
            "Instructions an element, of the main loops (the branches that are seldom taken included):",
            "",
        ]
        lines += ["| loop | instructions |", "|---|---|"]
        for name, value in shown:
            kernel = Kernel(name.rpartition(" ")[0], 0, 0, 0)
            said = {"in": ", first pass", "out": ", second pass" if "block" in name else ""}
            said["zeros"] = ", targets of 0"
            lines.append(f"| {kernel.family}, {kernel.dtype}{said[name.rpartition(' ')[2]]} | {value:.0f} |")
    return "\n".join(lines)


def version() -> str:
    said = subprocess.run([nvcc() or "nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return f"nvcc {re.search(r'release ([0-9.]+)', said)[1]}"  # type: ignore[index]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--architecture", default="9.0")
    parser.add_argument("--write", action="store_true", help="into docs/cuda.md, instead of printing it")
    options = parser.parse_args()
    if nvcc() is None:
        sys.exit("cuda_report.py: there is no nvcc in PATH or /usr/local/cuda/bin, or in CUDA_HOME's bin")
    with tempfile.TemporaryDirectory() as folder:
        made = table(options.architecture, Path(folder))
    if not options.write:
        print(made)
        return
    page = PAGE.read_text()
    before, rest = page.split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{made}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
