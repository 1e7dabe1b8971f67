"""benchmarks/compare.py as people run it."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
COMPARE = BENCHMARKS / "compare.py"


def run(*command: Any, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=BENCHMARKS,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, dict[str, Any]]:
    """One run with everything: what it printed, where it wrote, and what it says it measured."""
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("compare") / "new"
    cases = (
        "ce:N=33,C=7,dtype=bf16,label_smoothing=0.1",
        "bce:N=8,C=3,reduction=none",
        "focal:N=8,C=3,gamma=1.5",
    )
    result = run(
        COMPARE,
        *("--quick", "--rounds", "3", "--threads", "1", "--device", "cpu"),
        *("--baselines", "eager,torchvision,liger"),
        *("--json", folder / "a.json", "--plot", folder / "pictures"),
        *(word for case in cases for word in ("--case", case)),
        PYTHONPATH=f"{fake_packages(folder.parent)}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    )
    assert result.returncode == 0, result.stderr
    return result.stdout, folder, json.loads((folder / "a.json").read_text())


def test_an_interrupted_run_keeps_what_it_measured(tmp_path: Path) -> None:
    """As it is when somebody has seen enough."""
    command = [
        COMPARE,
        "--device",
        "cpu",
        "--threads",
        "1",
        "--baselines",
        "eager",
        "--json",
        tmp_path / "a.json",
    ]
    cases = ["--case", "ce:N=8,C=3", "--case", "bce:N=9,C=3", "--rounds", "100"]
    with subprocess.Popen(
        [sys.executable, *map(str, command), *cases],
        cwd=BENCHMARKS,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # What a shell starts in the background ignores SIGINT, and so does all that it starts in turn.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        said = ""
        while "BCE 9 x 3" not in said:  # the second case has begun
            line = process.stderr.readline()
            assert line, said
            said += line
        process.send_signal(signal.SIGINT)
        table = process.stdout.read()
        assert process.wait(timeout=60) == 130
    report = json.loads((tmp_path / "a.json").read_text())
    assert [case["label"] for case in report["cases"]] == ["cross entropy 8 x 3, fp32"]
    assert {"name": "the rest", "reason": "interrupted"} in report["left_out"]
    assert "interrupted" in table


def fake_packages(folder: Path) -> Path:
    """A torchvision with the one function it is asked for. There is no liger."""
    ops = folder / "site" / "torchvision" / "ops"
    ops.mkdir(parents=True)
    (ops.parent / "__init__.py").touch()
    (ops / "__init__.py").write_text("from baselines import sigmoid_focal_loss\n")
    return folder / "site"


def test_table(found: tuple[str, Path, dict[str, Any]]) -> None:
    printed, _, _ = found
    assert "cross entropy 33 x 7, bf16, label_smoothing=0.1  warm" in printed
    assert "  eager torchvision" in printed
    assert max(map(len, printed.splitlines())) <= 100
    assert "…" not in printed
    assert "left out: torchvision: it has focal only" in printed
    assert "left out: liger: cannot be imported" in printed


def test_json(found: tuple[str, Path, dict[str, Any]]) -> None:
    _, _, report = found
    assert report["rounds"] == 3
    copy = report["copy_bytes_per_second"]
    assert 0 < copy["low"] <= copy["median"] <= copy["high"]
    environment = report["environment"]
    assert environment["threads"] == 1
    assert environment["last_level_cache_bytes"] > 0
    assert {
        "date",
        "cpu",
        "torch",
        "torch_build",
        "load_average",
        "fused_losses_cpu_level",
    } <= environment.keys()
    assert {"torchvision", "liger", "in place"} == {entry["name"] for entry in report["left_out"]}

    first, second, third = report["cases"]
    assert set(first["implementations"]) == {"eager", "fused", "in place"}
    assert set(second["implementations"]) == {"eager", "fused"}
    assert set(third["implementations"]) == {"eager", "torchvision", "fused", "in place"}
    for case in report["cases"]:
        assert case["inputs"] == "warm"
        for implementation in case["implementations"].values():
            assert 0 < implementation["both"]["low"] <= implementation["both"]["median"]
            assert implementation["both"]["median"] <= implementation["both"]["high"]
            assert implementation["bytes_per_second"] > 0
            assert 0 <= implementation["value_error"] < 1e-2
            assert 0 <= implementation["gradient_error"] < 1e-2
        times = {name: row["both"]["median"] for name, row in case["implementations"].items()}
        assert case["speedup"]["fused"]["eager"] == pytest.approx(times["eager"] / times["fused"])
    product = 1.0
    for case in report["cases"]:
        product *= case["speedup"]["fused"]["eager"]
    assert report["geometric_mean"]["all"]["fused"]["eager"] == pytest.approx(product ** (1 / 3))
    assert report["geometric_mean"]["cases"] == report["geometric_mean"]["all"]


def test_pictures(found: tuple[str, Path, dict[str, Any]]) -> None:
    _, folder, _ = found
    assert (folder / "pictures" / "cases.png").read_bytes().startswith(b"\x89PNG")


def test_diff(found: tuple[str, Path, dict[str, Any]]) -> None:
    """B: the first case ten times as fast, the second within the spread, the third another one."""
    _, folder, measured = found
    report = copy.deepcopy(measured)
    for case in report["cases"]:
        for implementation in case["implementations"].values():
            implementation["both"] = {"low": 9e-6, "median": 1e-5, "high": 2e-5}
    (folder / "a.json").write_text(json.dumps(report))
    report["cases"][0]["implementations"]["fused"]["both"] = {"low": 9e-7, "median": 1e-6, "high": 2e-6}
    report["cases"][0]["implementations"]["in place"]["both"] = {"low": 8e-6, "median": 9e-6, "high": 1e-5}
    report["cases"][1]["implementations"]["fused"]["both"] = {"low": 1e-5, "median": 2e-5, "high": 3e-5}
    report["cases"][2] |= {"case": "focal:N=9,C=3", "label": "sigmoid focal 9 x 3"}
    report["environment"]["threads"] = 2
    (folder / "b.json").write_text(json.dumps(report))
    result = run(COMPARE, "--diff", folder / "a.json", folder / "b.json")
    assert result.returncode == 0, result.stderr
    printed = result.stdout
    assert "threads: 1 -> 2" in printed
    assert printed.count("10.00x faster") == 1
    assert printed.count("the same") == 4  # eager and in place of the first, both of the second
    assert "only in A: sigmoid focal 8 x 3, fp32, gamma=1.5" in printed
    assert "only in B: sigmoid focal 9 x 3" in printed
    assert "geometric mean of 2: fused 2.24 times as fast in B" in printed
    assert max(map(len, printed.splitlines())) <= 100


def test_sweep(tmp_path: Path) -> None:
    """Over rows small enough for a test; a cache of 1 KB, so that inputs rotate from the second size on."""
    pytest.importorskip("matplotlib")
    smaller = "import cases; cases.SWEEPS['rows'] = ('N', [2, 50, 99], ''); "
    cache = "import compare; compare.last_level_cache = lambda device: 1024; "
    result = run(
        *("-c", smaller + cache + "compare.main()", "--quick", "--rounds", "2", "--threads", "1"),
        *("--sweep", "rows", "--case", "bce_logits:N=1,C=9"),
        *("--json", tmp_path / "sweep.json", "--plot", tmp_path),
    )
    assert result.returncode == 0, result.stderr
    assert "rows, from BCE with logits 2 x 9, fp32 on" in result.stdout
    report = json.loads((tmp_path / "sweep.json").read_text())
    assert report["cases"] == []
    points = report["sweeps"]["rows"]["points"]
    assert [point["dims"] for point in points] == [{"N": 2, "C": 9}, {"N": 99, "C": 9}]
    assert [(point["inputs"], point["input_sets"]) for point in points] == [("warm", 1), ("rotating", 1)]
    assert (tmp_path / "rows.png").read_bytes().startswith(b"\x89PNG")
    result = run(COMPARE, "--diff", tmp_path / "sweep.json", tmp_path / "sweep.json")
    assert result.stdout.count("the same") == 6


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"environment": 3}', "\x00"])
def test_diff_of_something_else(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    if content is not None:
        path.write_text(content)
    result = run(COMPARE, "--diff", path, path)
    assert result.returncode == 1
    assert result.stderr.startswith(f"compare.py: {path} ")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("options", [("--json", ""), ("--json", "file/a.json"), ("--plot", "file")])
def test_what_cannot_be_written_ends_at_once(options: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = run(COMPARE, options[0], tmp_path / options[1])
    assert result.returncode == 1
    assert "cannot be written to" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_closed_pipe_loses_no_result(tmp_path: Path) -> None:
    command = [sys.executable, str(COMPARE), "--quick", "--rounds", "1", "--case", "ce:N=4,C=3"]
    command += ["--json", str(tmp_path / "a.json")]
    with subprocess.Popen(
        command, cwd=BENCHMARKS, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        process.stdout.close()
    assert len(json.loads((tmp_path / "a.json").read_text())["cases"]) == 1


# -- the command line ------------------------------------------------------------------------------------------

ERRORS = {
    "--case nll:N=4,C=2": "no loss 'nll'; there are ce, bce_logits",
    "--case ce:N=4,C=2,smoothing=0.1": "ce has no 'smoothing'",
    "--case ce:N=four,C=2": "N must be int, not 'four'",
    "--case ce:N=4": "C missing",
    "--case ce:N=4,C=0": "every dimension must be at least 1",
    "--case ce:N=4,C=2,dtype=int8": "dtype must be one of fp32, bf16, fp16, fp64, not 'int8'",
    "--case ce:N=4,C=2,reduction=max": "reduction must be none, mean or sum, not 'max'",
    "--case ce:N=4,C=2,label_smoothing=2": "label_smoothing is 2.0; expected a number from 0.0 to 1.0",
    "--rounds 0": "--rounds must be at least 1, got 0",
    "--baselines eager,lighter": "--baselines: no 'lighter'; there are eager, compile, torchvision, liger",
    "--sweep rows --case ce:N=1,C=2 --case ce:N=1,C=3": "--sweep rows: one --case, not 2",
    "--sweep rows --case pairwise:G=1,A=2,C=3": "--sweep rows: pairwise:G=1,A=2,C=3 has no N",
    "--suite tiny --case ce:N=4,C=2": "leave out --suite",
}

# In a process of its own, where `cases` is the one beside compare.py; one for all, since importing torch takes long.
PARSE_EACH = """
import sys, compare
compare.parse([])
for line in sys.argv[1:]:
    try:
        compare.parse(line.split())
    except SystemExit as stop:
        print(f"exit {stop.code}", file=sys.stderr)
"""


def test_errors_are_one_clear_line() -> None:
    result = run("-c", PARSE_EACH, *ERRORS)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("exit 2") == len(ERRORS)
    messages = [line for line in result.stderr.splitlines() if ": error: " in line]
    assert len(messages) == len(ERRORS)
    for message, expected in zip(messages, ERRORS.values(), strict=True):
        assert expected in message


# -- the parts -------------------------------------------------------------------------------------------------

# Packages as their sources have them, over torch: what is tested is how they are called.
PACKAGES = """
import sys, types
import torch, torch.nn.functional as F

def module(name, **functions):
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(functions)

class Overwriting(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target, ignore_index, label_smoothing):
        assert logits.dim() == 2
        with torch.enable_grad():
            leaf = logits.detach().clone().requires_grad_()
            loss = F.cross_entropy(leaf, target, ignore_index=ignore_index, label_smoothing=label_smoothing)
            logits.data.copy_(torch.autograd.grad(loss, leaf)[0])
        ctx.save_for_backward(logits.detach())
        return loss.detach()

    @staticmethod
    def backward(ctx, upstream):
        return ctx.saved_tensors[0], None, None, None

def liger_cross_entropy(input, target, weight=None, size_average=None, ignore_index=-100, reduce=None,
                        reduction="mean", label_smoothing=0.0, lse_square_scale=0.0, softcap=None):
    return Overwriting.apply(input, target, ignore_index, label_smoothing)

def quack_cross_entropy(x, target, lse_partial=None, weight=None, ignore_index=-100, reduction="mean",
                        inplace_backward=False):
    assert x.dim() == 2 and lse_partial is None
    return F.cross_entropy(x, target, weight, ignore_index=ignore_index, reduction=reduction)

class SoftmaxCrossEntropyLoss:
    @staticmethod
    def apply(logits, labels, smoothing=0.0, padding_idx=0, half_to_float=False):
        assert logits.dim() == 2
        return F.cross_entropy(logits, labels, ignore_index=padding_idx, label_smoothing=smoothing, reduction="none")

for name in ("liger_kernel", "liger_kernel.transformers", "quack", "apex", "apex.contrib"):
    module(name)
module("liger_kernel.transformers.functional", liger_cross_entropy=liger_cross_entropy)
module("quack.cross_entropy", cross_entropy=quack_cross_entropy)
module("apex.contrib.xentropy", SoftmaxCrossEntropyLoss=SoftmaxCrossEntropyLoss)
"""

CALL_EACH = """
import baselines, measure
from cases import Case

baselines.PACKAGES |= {name: __import__("dataclasses").replace(package, cuda_only=False)
                       for name, package in baselines.PACKAGES.items()}
for spec in ("ce:N=40,C=5", "ce:N=2,C=5,H=6,W=7,ignore_index=255", "ce:N=40,C=5,reduction=sum"):
    case = Case.parse(spec)
    inputs = case.inputs("cpu")
    value, gradient = measure.exact(case, inputs)
    for name in ("liger", "quack", "apex"):
        call = measure.Call(case, name, inputs)
        for _ in range(2):  # twice: a call must not spoil the inputs of the next
            found = call()
        if name == "liger" and "sum" in spec:
            continue  # the module above has only the mean
        assert measure.error(found[0], value) < 1e-6, (spec, name)
        assert measure.error(found[1], gradient) < 1e-5, (spec, name)
try:
    measure.Call(Case.parse("ce:N=40,C=5,label_smoothing=0.1"), "quack", inputs)()
except TypeError as error:
    assert "label_smoothing" in str(error)
else:
    raise SystemExit("quack has no label smoothing")
"""

CUDA_ONLY = """
import baselines
from cases import Case
try:
    baselines.implementation(Case.parse("ce:N=4,C=5"), "liger", "cpu")
except baselines.Unavailable as reason:
    assert str(reason) == "it runs on CUDA only"
else:
    raise SystemExit("liger on the CPU")
"""

ROTATION = """
import measure
from cases import Case
case = Case.parse("ce:N=64,C=8")  # 2 KB of logits, 0.5 KB of targets
for cache, sets in ((2**15, 1), (2**14, 13), (2**10, 1)):
    inputs = measure.input_sets(case, "cpu", cache)
    assert len(inputs) == sets, (cache, len(inputs))
    assert len({logits.data_ptr() for logits, _ in inputs}) == sets
    assert measure.is_warm(case, cache) == (cache == 2**15)
seen = []
call = measure.Call(case, "in place", *measure.input_sets(case, "cpu", 2**14))
function = call.function
call.function = lambda logits, *rest, **options: (seen.append(logits.data_ptr()), function(logits, *rest, **options))[1]
measure._round(call, 2, "cpu")
assert len(seen) == 26
assert len(set(seen[:13])) == 13  # copies that live at the same time
assert all((a[0] == b[0]).all() for a, b in zip(call.sets, measure.input_sets(case, "cpu", 2**14)))
assert measure.last_level_cache("cpu") >= 2**18
"""

# Events of a device that does nothing at once: what is tested is that we wait for it to have slept long enough.
BACKLOG = """
import time, torch

class Event:
    enough = 2**20
    def __init__(self, enable_timing=False): pass
    def record(self): self.at = time.perf_counter()
    def query(self): return slept[-1] < self.enough
    def elapsed_time(self, end): return 1e3 * (end.at - self.at)

slept = []
torch.cuda.Event, torch.cuda.synchronize, torch.cuda._sleep = Event, lambda: None, slept.append
for enough, backlog, queued_ahead in ((2**20, 2**20, True), (2**40, 2**27, False)):
    Event.enough = enough
    call = measure.Call(Case.parse("ce:N=8,C=8"), "eager", *measure.input_sets(Case.parse("ce:N=8,C=8"), "cpu", 2**20))
    spreads = measure.times({"eager": call}, "cuda", 2, 1e-3)
    assert (call.backlog, call.queued_ahead) == (backlog, queued_ahead)
    assert 0 < spreads["eager"]["forward"].median < spreads["eager"]["both"].median
"""

MEMORY = """
from cases import Case
from measure import PeakMemory
case, peak = Case.parse("ce:N=1024,C=1024"), PeakMemory("cpu")
in_place, fused, eager = (peak(case, name) for name in ("in place", "fused", "eager"))
assert peak(case.small(), "fused") is None
peak.close()
if eager is not None:  # the system says
    assert in_place < case.logits_bytes / 2 < fused < 1.5 * case.logits_bytes < eager, (in_place, fused, eager)
"""

FORWARD_ONLY = """
case = Case.parse("pairwise:G=3,A=50,C=7,dtype=bf16")
assert case.shape == (50, 7) and case.floor_bytes == 2 * 350 + 4 * 150
value, gradient = measure.Call(case, "fused", *measure.input_sets(case, "cpu", 2**20))()
exact = measure.exact(case, case.inputs("cpu"))
assert value.shape == (3, 50) and gradient is exact[1] is None
assert measure.error(value, exact[0]) < 1e-5
"""

# What makes a label and a score of each anchor, and of what the dense tensors beside them are made.
ONE_CLASS_AN_ANCHOR = """
for spec, wanted in (
    ("bce_index:N=3,A=700,C=5", (3, 700, 5)),
    ("focal_index:N=2100,C=5,gamma=1.5,alpha=0.5,dtype=bf16", (2100, 5)),
    ("varifocal_index:N=3,A=700,C=5,gamma=1.5", (3, 700, 5)),
    ("dfl:N=2100,C=8", (2100, 8)),
):
    case = Case.parse(spec)
    inputs = case.inputs("cpu")
    assert case.shape == inputs[0].shape == wanted, spec
    assert all(other.shape == wanted[:-1] for other in inputs[1:]), spec
    assert case.floor_bytes == 2 * inputs[0].nbytes, spec
    if case.name == "dfl":
        assert 0 <= inputs[1].min() and inputs[1].max() < 7
    else:
        positive = inputs[1] >= 0
        assert 0 < positive.sum() < 60 and (inputs[1] < 5).all(), spec
        assert ((inputs[2] > 0) == positive).all(), spec
    value, gradient = measure.exact(case, inputs)
    tolerance = 1e-2 if case.dtype == "bf16" else 1e-5
    for name in ("eager", "fused", "in place"):
        call = measure.Call(case, name, inputs)
        for _ in range(2):
            found = call()
        assert measure.error(found[0], value) < tolerance, (spec, name)
        assert measure.error(found[1], gradient) < tolerance, (spec, name)
"""


@pytest.mark.parametrize(
    "program",
    [PACKAGES + CUDA_ONLY + CALL_EACH, ROTATION + FORWARD_ONLY + ONE_CLASS_AN_ANCHOR + BACKLOG, MEMORY],
    ids=["packages", "inputs", "memory"],
)
def test_parts(program: str) -> None:
    result = run("-c", program)
    assert result.returncode == 0, result.stderr


# -- the README ------------------------------------------------------------------------------------------------

README = """
import readme_table as r
readme = (r.ROOT / "README.md").read_text()
newest = r.newest(r.ROOT / "benchmarks" / "results")
assert newest, "no result under benchmarks/results"
assert r.rewritten(readme, newest) == readme, "README.md is not what readme_table.py writes: run it"
row = next(line for line in readme.splitlines() if line.startswith("| cross entropy 4096 x 80"))
assert r.rewritten(readme.replace(row, row.replace("**", "")), newest) == readme
for path in newest:
    for picture in path.parent.glob("*.png"):
        assert picture.stat().st_size < 200_000, picture
"""

NEWEST = """
import json, tempfile, pathlib
import readme_table as r
with tempfile.TemporaryDirectory() as folder:
    for name, date, device, level in [("a", "2026-01-02", "cpu", "avx2"), ("b", "2026-01-01", "cpu", "avx2"),
                                      ("c", "2025-01-01", "cpu", "avx512"), ("d", "2024-01-01", "cuda", "avx2"),
                                      ("e", "2024-01-02", "cuda", "avx512")]:
        path = pathlib.Path(folder, name, "results.json")
        path.parent.mkdir()
        environment = {"date": date, "device": device, "fused_losses_cpu_level": level}
        path.write_text(json.dumps({"environment": environment}))
    found = [path.parent.name for path in r.newest(pathlib.Path(folder))]
    assert found == ["e", "c", "a"], found
"""


@pytest.mark.parametrize("program", [README, NEWEST], ids=["readme", "newest"])
def test_readme_shows_the_newest_results(program: str) -> None:
    result = run("-c", program)
    assert result.returncode == 0, result.stderr
