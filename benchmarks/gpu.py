"""Everything there is to ask of a machine with a GPU, in one run of at most eight minutes and without a network.

    python benchmarks/gpu.py          (make gpu)

builds for this GPU, measures the bandwidth of the losses beside a copy's, runs the tests on CUDA, compute-sanitizer
and compare.py. A step that fails or runs out of its time does not stop the next one. summary.txt, summary.json and
the steps' output (gpu.log) go to $OUT, or to build/gpu.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 470  # for all steps together
GOAL = 0.9  # of the copy's bandwidth, on the bytes that no implementation can avoid
GRACE = 15  # seconds for a step that is told to end
LOG_BYTES = 400_000  # kept of each step's output


COMPARED = [
    "ce:N=8192,C=50257,dtype=bf16",
    "ce:N=4096,C=1000,label_smoothing=0.1",
    "ce:N=100000,C=10",
    "bce_logits:N=64,A=8400,C=80,dtype=bf16",
    "focal:N=64,A=8400,C=80",
    "focal_index:N=64,A=8400,C=80,dtype=bf16",
]

# -- steps -----------------------------------------------------------------------------------------------------


@dataclass
class Step:
    name: str
    command: list[str]
    limit: float  # seconds
    needs: tuple[str, ...] = ()  # Python modules, and programs as "bin:NAME"
    variables: dict[str, str] | None = None


@dataclass
class Result:
    name: str
    state: str  # "ok", "failed", "out of time", "left out"
    seconds: float
    said: str  # its last line, or why it was left out


def missing(needs: tuple[str, ...]) -> list[str]:
    found = {
        name: shutil.which(name[4:]) if name.startswith("bin:") else importlib.util.find_spec(name)
        for name in needs
    }
    return [name.removeprefix("bin:") for name, place in found.items() if place is None]


def listen() -> None:
    """To SIGINT, which a shell lets what it starts in the background ignore, and all that this starts in turn."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run(step: Step, seconds_left: float, log: Path) -> Result:
    if absent := missing(step.needs):
        return Result(step.name, "left out", 0, f"not installed here: {', '.join(absent)}")
    if seconds_left < 5:
        return Result(step.name, "left out", 0, "no time was left")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment |= {"PYTHONUNBUFFERED": "1"} | (step.variables or {})
    start, state = time.perf_counter(), "ok"
    with log.open("ab+") as output:
        output.write(f"\n==== {step.name}: {' '.join(step.command)}\n".encode())
        output.flush()
        begin = output.tell()
        process = subprocess.Popen(
            step.command,
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=listen,
        )
        try:
            if process.wait(min(step.limit, seconds_left)) != 0:
                state = "failed"
        except subprocess.TimeoutExpired:
            state = "out of time"
            # pytest then says what has failed, compare.py what it has measured.
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(begin)
        said = output.read()
        if len(said) > LOG_BYTES:
            output.truncate(begin)
            output.write(b"(...)\n" + said[-LOG_BYTES:])
    lines = [line for line in said.decode(errors="replace").splitlines() if line.strip()]
    return Result(step.name, state, time.perf_counter() - start, lines[-1].strip()[:200] if lines else "")


def steps(out: Path) -> list[Step]:
    major, minor = torch.cuda.get_device_capability()
    python, this = sys.executable, str(Path(__file__))
    workers = min(8, os.cpu_count() or 1)
    parallel = ["-n", str(workers)] if not missing(("xdist",)) else []
    pytest = [python, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", "--device", "cuda"]
    in_process = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}  # every worker would start as many as there are cores
    sanitizer = ["compute-sanitizer", "--error-exitcode", "9"]
    ours = ["--kernel-name", "kns=fused_losses"]
    # initcheck would not know what the kernels left out have written.
    options = {"memcheck": [*ours, "--report-api-errors", "explicit"], "racecheck": ours, "initcheck": []}
    compare = [
        python,
        "benchmarks/compare.py",
        "--device",
        "cuda",
        "--quick",
        "--baselines",
        "eager,compile,liger",
    ]
    compare += [word for case in COMPARED for word in ("--case", case)]
    compare += ["--json", str(out / "compare.json")]
    drawn = ["--plot", str(out)] if not missing(("matplotlib",)) else []
    # What is last may find no time left.
    return [
        Step("tools", ["nvidia-smi"], 10, ("bin:nvidia-smi",)),
        Step(
            "build",
            [python, "setup.py", "build_ext", "--inplace"],
            180,
            ("ninja", "pybind11", "setuptools"),
            {"TORCH_CUDA_ARCH_LIST": f"{major}.{minor}", "FUSED_LOSSES_FORCE_CUDA": "1"},
        ),
        Step("bandwidth", [python, this, "--only", "bandwidth", "--out", str(out)], 75),
        Step("tests of what only a GPU shows", [*pytest, "tests/test_cuda.py"], 90, ("pytest",)),
        Step(
            "tests of every loss",
            [*pytest, *parallel, "--ignore", "tests/test_cuda.py", "tests"],
            150,
            ("pytest", "hypothesis"),
            in_process,
        ),
        Step("compare", [*compare, *drawn], 100, ("rich",)),
        *(
            Step(
                tool,
                [*sanitizer, "--tool", tool, *options[tool], python, this, "--only", "workload"],
                60,
                ("bin:compute-sanitizer",),
                # each tensor its own allocation, so that its end is an end
                {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            )
            for tool in options
        ),
    ]


# -- a small run for compute-sanitizer -------------------------------------------------------------------------


def workload(device: str) -> None:
    """Every kernel once or twice, over sizes that do not fit it."""
    import fused_losses.functional as F
    from fused_losses import IndexTarget

    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        for shape in [(65, 3), (9, 33), (5, 1000), (3, 1027), (2, 50257), (1030, 5), (2, 5, 3, 7)]:
            logits = torch.randn(shape, device=device, dtype=dtype)
            index = torch.randint(shape[1], (shape[0], *shape[2:]), device=device)
            for smoothing in (0.0, 0.1):
                leaf = logits.clone().requires_grad_()
                (F.cross_entropy(leaf, index, label_smoothing=smoothing) * 2).backward()
            leaf = logits.clone().requires_grad_()
            F.softmax_focal_loss(leaf, index, reduction="none").sum().backward()
            F.cross_entropy(leaf * 1, index, inplace_backward=True).backward()
        for shape in [(9, 17), (33, 80)]:
            logits = torch.randn(shape, device=device, dtype=dtype)
            target, weight = torch.rand_like(logits), torch.rand_like(logits[0])
            for options in ({}, {"pos_weight": weight}, {"reduction": "none"}):
                leaf = logits.clone().requires_grad_()
                F.binary_cross_entropy_with_logits(leaf, target, **options).sum().backward()
            F.sigmoid_focal_loss(leaf, target, reduction="mean").backward()
            for classes in (1, shape[1]):
                labels = IndexTarget(torch.randint(-2, classes, shape[:1], device=device))
                F.sigmoid_focal_loss(leaf, labels, reduction="mean").backward()
                F.varifocal_loss(leaf, labels.dense(shape[1], dtype=dtype)[0], reduction="mean").backward()
            F.binary_cross_entropy(leaf.detach().sigmoid().requires_grad_(), target).backward()
    if device != "cpu":
        torch.cuda.synchronize()


# -- bandwidth -------------------------------------------------------------------------------------------------


def seconds(step: Callable[[], object], device: str, rounds: int) -> float:
    """The median over the rounds."""
    for _ in range(3):
        step()
    if device == "cpu":
        times = []
        for _ in range(rounds):
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
        return median(times)
    begin = [torch.cuda.Event(enable_timing=True) for _ in range(rounds)]
    end = [torch.cuda.Event(enable_timing=True) for _ in range(rounds)]
    torch.cuda.synchronize()
    # Cycles of a busy device: else a short step is timed by how long the host takes to launch it.
    torch.cuda._sleep(20_000_000)
    for first, last in zip(begin, end, strict=True):
        first.record()
        step()
        last.record()
    torch.cuda.synchronize()
    return median(first.elapsed_time(last) for first, last in zip(begin, end, strict=True)) / 1e3


def seconds_a_call(step: Callable[[], object], device: str, calls: int) -> float:
    """Of many in a row: what a training loop sees of a loss that is all launches."""
    for _ in range(10):
        step()
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        step()
    if device != "cpu":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


def copy_bandwidth(device: str, size: int) -> float:
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / seconds(lambda: target.copy_(source), device, 10)


GOALS = [
    *(("cross_entropy", (8192, classes), "bfloat16") for classes in (32000, 50257, 128256)),
    ("cross_entropy", (4096, 262144), "bfloat16"),
    *(
        (loss, (64, 8400, 80), dtype)
        for loss in ("bce_with_logits", "sigmoid_focal", "sigmoid_focal_index")
        for dtype in ("float32", "bfloat16")
    ),
]
SMALL = [("cross_entropy", (64, 10), "float32"), ("bce_with_logits", (64, 10), "float32")]


def losses(
    name: str, shape: tuple[int, ...], device: str
) -> tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor], torch.Tensor, int]:
    """Ours, what people use without it, the target, and how many tensors of the logits' size must be moved."""
    import fused_losses.functional as F
    from fused_losses import IndexTarget, reference

    if name == "cross_entropy":
        return (
            F.cross_entropy,
            torch.nn.functional.cross_entropy,
            torch.randint(shape[-1], shape[:-1], device=device),
            2,
        )
    # As a detector has them: an object in one anchor of a hundred.
    labels = torch.randint(shape[-1], shape[:-1], device=device)
    labels = labels.where(torch.rand(shape[:-1], device=device) < 0.01, -1)
    target, _ = IndexTarget(labels).dense(shape[-1])
    if name == "bce_with_logits":
        theirs = torch.nn.functional.binary_cross_entropy_with_logits
        return F.binary_cross_entropy_with_logits, theirs, target, 3

    def ours(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.sigmoid_focal_loss(logits, target, reduction="mean")

    def eager(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return reference.sigmoid_focal_loss(logits, target, None, None, 0.25, 0.75, 2.0, "mean")

    if name == "sigmoid_focal":
        return ours, eager, target, 3

    def ours_by_index(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.sigmoid_focal_loss(logits, IndexTarget(labels), reduction="mean")

    def eager_by_index(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return eager(logits, IndexTarget(labels).dense(logits.shape[-1], dtype=logits.dtype)[0])

    return ours_by_index, eager_by_index, labels, 2


def training_step(
    loss: Callable[..., torch.Tensor], leaf: torch.Tensor, target: torch.Tensor
) -> Callable[[], None]:
    def step() -> None:
        leaf.grad = None
        loss(leaf, target).backward()

    return step


def measure(
    name: str, shape: tuple[int, ...], dtype: str, device: str, copy: float, small: bool
) -> dict[str, Any]:
    ours, eager, target, tensors = losses(name, shape, device)
    leaf = torch.randn(shape, device=device, dtype=getattr(torch, dtype)).requires_grad_()
    if target.is_floating_point():
        target = target.to(leaf.dtype)
    found: dict[str, Any] = {"loss": name, "shape": list(shape), "dtype": dtype}
    for who, loss in (("fused", ours), ("eager", eager)):
        step = training_step(loss, leaf, target)
        try:
            found[who] = seconds_a_call(step, device, 200) if small else seconds(step, device, 10)
            if device != "cpu":
                leaf.grad = None
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                step()
                found[f"{who}_extra_bytes"] = torch.cuda.max_memory_allocated() - before
        except torch.cuda.OutOfMemoryError:
            found[who] = None
        leaf.grad = None
        if device != "cpu":
            torch.cuda.empty_cache()
    moved = tensors * leaf.nbytes
    found |= {"gradient_bytes": leaf.nbytes, "bytes": moved, "bytes_per_second": moved / found["fused"]}
    found["of_copy"] = found["bytes_per_second"] / copy
    faster = found["eager"] is None or found["fused"] < found["eager"]
    found["goal"] = faster if small else found["of_copy"] >= GOAL
    return found


def bandwidth(
    device: str, out: Path, goals: list[Any] = GOALS, small: list[Any] = SMALL, size: int = 2 << 30
) -> None:
    copy = copy_bandwidth(device, size)
    report: dict[str, Any] = {"copy_bytes_per_second": copy, "cases": []}
    for cases, is_small in ((small, True), (goals, False)):
        for name, shape, dtype in cases:
            try:
                report["cases"].append(measure(name, shape, dtype, device, copy, is_small))
            except Exception as error:  # the next shape may work
                report["cases"].append(
                    {"loss": name, "shape": list(shape), "dtype": dtype, "error": str(error)[:300]}
                )
            print(json.dumps(report["cases"][-1]), flush=True)
            (out / "bandwidth.json").write_text(json.dumps(report, indent=1))
    report["copy_bytes_per_second_again"] = copy_bandwidth(device, size)
    (out / "bandwidth.json").write_text(json.dumps(report, indent=1))


# -- the summary -----------------------------------------------------------------------------------------------


def facts() -> dict[str, Any]:
    nvcc = subprocess.run(
        "nvcc --version | tail -2 | head -1", shell=True, capture_output=True, text=True
    ).stdout
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = (
        subprocess.run(query, capture_output=True, text=True).stdout if shutil.which("nvidia-smi") else ""
    )
    device = torch.cuda.get_device_properties(0)
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "gpu": device.name,
        "capability": f"{device.major}.{device.minor}",
        "multiprocessors": device.multi_processor_count,
        "memory_bytes": device.total_memory,
        "driver": driver.strip(),
        "nvcc": nvcc.strip(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "python": platform.python_version(),
    }


def table(environment: dict[str, Any], results: list[Result], out: Path) -> str:
    lines = [", ".join(f"{name} {value}" for name, value in environment.items()), ""]
    lines += [f"{r.state:12} {r.seconds:5.0f} s  {r.name}: {r.said}" for r in results]
    path = out / "bandwidth.json"
    if path.exists():
        report = json.loads(path.read_text())
        lines += ["", f"a copy moves {report['copy_bytes_per_second'] / 1e9:.0f} GB/s"]
        for case in report["cases"]:
            what = f"{case['loss']} {' x '.join(map(str, case['shape']))} {case['dtype']}"
            if "error" in case:
                lines.append(f"{what}: {case['error']}")
                continue
            eager = "out of memory" if case["eager"] is None else f"{case['eager'] * 1e3:.3f} ms"
            extra = case.get("fused_extra_bytes", 0) / case["gradient_bytes"]
            lines.append(
                f"{what}: {case['fused'] * 1e3:.3f} ms (eager {eager}), {case['bytes_per_second'] / 1e9:.0f} GB/s, "
                f"{case['of_copy']:.0%} of the copy, extra memory {extra:.2f} gradients"
                f"{'' if case['goal'] else '  MISSED'}"
            )
    return "\n".join(lines) + "\n"


def run_all(todo: list[Step], environment: dict[str, Any], out: Path, budget: float = SECONDS) -> int:
    start, results = time.perf_counter(), []
    for step in todo:
        print(f"{step.name} ...", flush=True)
        results.append(run(step, budget - (time.perf_counter() - start), out / "gpu.log"))
        print(f"    {results[-1].state}: {results[-1].said}", flush=True)
        summary = {"environment": environment, "steps": [asdict(result) for result in results]}
        (out / "summary.json").write_text(json.dumps(summary, indent=1))
        (out / "summary.txt").write_text(table(environment, results, out))
    print(f"\n{(out / 'summary.txt').read_text()}\nin {out}")
    return int(any(result.state in ("failed", "out of time") for result in results))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or ROOT / "build" / "gpu"))
    parser.add_argument("--only", choices=["workload", "bandwidth"], help="one part, in this process")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        sys.exit(f"gpu.py: PyTorch {torch.__version__} sees no CUDA device here, so there is nothing to run.")
    if options.only == "workload":
        workload("cuda")
        return 0
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if options.only == "bandwidth":
        bandwidth("cuda", out)
        return 0
    for name in ("gpu.log", "bandwidth.json", "compare.json"):
        (out / name).unlink(missing_ok=True)
    return run_all(steps(out), facts(), out)


if __name__ == "__main__":
    sys.exit(main())
