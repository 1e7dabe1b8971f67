"""The assigner's classification cost, against what YOLOX writes out."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as torch_functional
from accuracy import DTYPES, LUCK, MANY, arrange, ulps
from cases import autocast
from torch import Tensor

from fused_losses import reference
from fused_losses.detection import pairwise_bce_cost

pytestmark = pytest.mark.every_level
SHAPES = [
    (1, 1, 1),
    (2, 3, 1),
    (3, 63, 7),
    (5, 64, 16),
    (4, 65, 33),
    (7, 131, 80),
    (6, 700, 3),
    (3, 40, 1203),
]


def expanded(logits: Tensor, gt_classes: Tensor, objectness: Tensor | None = None) -> Tensor:
    """YOLOX's get_assignments: both sides repeated to (G, A, C)."""
    p = logits.float() if logits.dtype != torch.float64 else logits
    p = p.sigmoid()
    if objectness is not None:
        p = (p * objectness.to(p.dtype).view(-1, 1).sigmoid()).sqrt()
    truths, (anchors, classes) = len(gt_classes), logits.shape
    target = torch_functional.one_hot(gt_classes, classes).to(p.dtype).unsqueeze(1).repeat(1, anchors, 1)
    return torch_functional.binary_cross_entropy(
        p.unsqueeze(0).repeat(truths, 1, 1), target, reduction="none"
    ).sum(-1)


def draw(
    shape: tuple[int, int, int], dtype: torch.dtype, kind: str = "ordinary"
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, ground truths' classes and objectness logits for (G, A, C)."""
    truths, anchors, classes = shape
    logits = torch.randn(anchors, classes, dtype=torch.float64) * 3 - 4
    gt_classes, objectness = torch.randint(classes, (truths,)), torch.randn(anchors, dtype=torch.float64) * 3
    if kind == "confident":
        rows = torch.arange(anchors)
        logits[rows, gt_classes[rows % truths]] = 12
        logits, objectness = logits - 4, objectness.abs() + 8
    elif kind == "extreme":
        far = torch.tensor([-1e4, -120.0, -90.0, 0.0, 20.0, 90.0, 120.0, 1e4], dtype=torch.float64)
        logits = torch.where(torch.rand(logits.shape) < 0.3, far[torch.randint(8, logits.shape)], logits)
        objectness = torch.where(torch.rand(anchors) < 0.3, far[torch.randint(8, (anchors,))], objectness)
    return logits.to(dtype), gt_classes, objectness.to(dtype)


def check(logits: Tensor, gt_classes: Tensor, objectness: Tensor | None) -> None:
    """At most torch's own error in the same dtype, plus 1 ulp, against fp64."""
    ours, theirs = pairwise_bce_cost(logits, gt_classes, objectness), expanded(logits, gt_classes, objectness)
    wide = None if objectness is None else objectness.double()
    exact = reference.pairwise_bce_cost(logits.double(), gt_classes, wide)
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape == (len(gt_classes), len(logits))
    assert ours.isfinite().all()
    if logits.dtype == torch.float64:
        torch.testing.assert_close(ours, exact, rtol=1e-11, atol=1e-13)
        return
    allowed = ulps(theirs, exact, ours.dtype).max() + (1 if ours.numel() >= MANY else LUCK)
    assert ulps(ours, exact, ours.dtype).max() <= allowed


@pytest.mark.parametrize("product", [False, True], ids=["sigmoid", "product"])
@pytest.mark.parametrize("kind", ["ordinary", "confident", "extreme"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_accuracy(shape: tuple[int, int, int], dtype: torch.dtype, kind: str, product: bool) -> None:
    logits, gt_classes, objectness = draw(shape, dtype, kind)
    check(logits, gt_classes, objectness if product else None)


def test_small_costs_keep_their_digits() -> None:
    """One confident, right class: the cost is what the other classes leave, far below the target's own logit."""
    logits = -20 - torch.rand(2000, 80)
    logits[:, 3] = 60 + torch.rand(2000)
    signs = torch.ones(80).double()
    signs[3] = -1
    exact = torch_functional.softplus(logits.double() * signs).sum(1)
    cost = pairwise_bce_cost(logits, torch.tensor([3]))[0]
    assert ulps(cost, exact, torch.float32).max() <= 2
    # with an objectness of 200, p = sqrt(sigmoid(x))
    product = pairwise_bce_cost(2 * logits, torch.tensor([3]), torch.full((2000,), 200.0))[0]
    p = torch.sigmoid(2 * logits.double()).sqrt()
    exact = -torch.log1p(-p[:, signs > 0]).sum(1)
    assert ulps(product, exact, torch.float32).max() <= 2


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "misaligned", "sliced", "stepped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts(layout: str, dtype: torch.dtype) -> None:
    logits, gt_classes, objectness = draw((5, 131, 20), dtype)
    expected = pairwise_bce_cost(logits, gt_classes, objectness)
    assert torch.equal(pairwise_bce_cost(arrange(logits, layout), gt_classes, objectness), expected)
    assert torch.equal(pairwise_bce_cost(logits, gt_classes.repeat_interleave(2)[::2], objectness), expected)
    head = torch.cat([logits, objectness.unsqueeze(1)], 1)  # YOLOX's: objectness beside the classes
    assert torch.equal(pairwise_bce_cost(head[:, :-1], gt_classes, head[:, -1:]), expected)


def test_the_reference_is_what_yolox_writes_out() -> None:
    logits, gt_classes, objectness = draw((7, 200, 20), torch.float64)
    for o in (None, objectness):
        torch.testing.assert_close(
            reference.pairwise_bce_cost(logits, gt_classes, o),
            expanded(logits, gt_classes, o),
            rtol=1e-9,
            atol=0,
        )


def test_logarithms_stop_at_minus_100() -> None:
    """As in torch's binary_cross_entropy: a wrong certainty costs 100, also at infinity."""
    inf = float("inf")
    logits = torch.tensor([[inf, -inf], [-inf, inf], [1e4, 1e4], [inf, inf], [-1e4, -inf]])
    expected = torch.tensor([[0.0, 200.0, 100.0, 100.0, 100.0]])
    gt_classes = torch.tensor([0])
    assert torch.equal(expanded(logits, gt_classes), expected)
    assert torch.equal(pairwise_bce_cost(logits, gt_classes), expected)
    assert torch.equal(pairwise_bce_cost(logits, gt_classes, torch.full((5, 1), inf)), expected)
    nothing = torch.full((5, 1), -inf)
    assert torch.equal(pairwise_bce_cost(logits, gt_classes, nothing), torch.full((1, 5), 100.0))


def test_nan_stays() -> None:
    logits, objectness = torch.zeros(3, 2), torch.zeros(3)
    logits[1, 1] = torch.nan
    objectness[2] = torch.nan
    cost = pairwise_bce_cost(logits, torch.tensor([0]), objectness)
    assert cost.isnan().tolist() == [[False, True, True]]


@pytest.mark.parametrize("shape", [(0, 5, 3), (4, 0, 3), (0, 0, 3)])
def test_empty(shape: tuple[int, int, int]) -> None:
    truths, anchors, classes = shape
    cost = pairwise_bce_cost(torch.empty(anchors, classes), torch.zeros(truths, dtype=torch.long))
    assert cost.shape == (truths, anchors)


def test_gradient_where_one_is_wanted() -> None:
    logits, gt_classes, objectness = draw((3, 6, 4), torch.float64)
    given = (logits.requires_grad_(), objectness.requires_grad_())
    upstream = torch.randn(3, 6, dtype=torch.float64)
    ours = torch.autograd.grad(pairwise_bce_cost(logits, gt_classes, objectness), given, upstream)
    theirs = torch.autograd.grad(expanded(logits, gt_classes, objectness), given, upstream)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    with torch.no_grad():
        assert not pairwise_bce_cost(logits, gt_classes, objectness).requires_grad


def test_the_same_in_autocast_and_without() -> None:
    logits, gt_classes, objectness = draw((3, 70, 4), torch.float32)
    expected = pairwise_bce_cost(logits, gt_classes, objectness)
    with autocast():
        assert torch.equal(pairwise_bce_cost(logits, gt_classes, objectness), expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int16])
def test_integer_dtypes_of_classes(dtype: torch.dtype) -> None:
    logits, gt_classes, _ = draw((3, 9, 4), torch.float32)
    assert torch.equal(pairwise_bce_cost(logits, gt_classes.to(dtype)), pairwise_bce_cost(logits, gt_classes))


@pytest.mark.raises_on_the_cpu
@pytest.mark.parametrize("wants_gradient", [False, True])
@pytest.mark.parametrize("wrong", [-1, 4, 2**40])
def test_a_class_out_of_range(wrong: int, wants_gradient: bool) -> None:
    logits, gt_classes = torch.zeros(5, 4, requires_grad=wants_gradient), torch.tensor([0, wrong])
    if wants_gradient:
        with pytest.raises(RuntimeError, match="out of"):  # index_select's own
            pairwise_bce_cost(logits, gt_classes)
    else:
        with pytest.raises(IndexError, match=rf"gt_classes.*{wrong}.*4 classes"):
            pairwise_bce_cost(logits, gt_classes)


def test_errors() -> None:
    logits, gt_classes = torch.zeros(5, 4), torch.tensor([1, 2])
    bad = [
        ((torch.zeros(5), gt_classes), ValueError, r"logits.*\(5,\)"),
        ((torch.zeros(5, 0), gt_classes), ValueError, r"logits.*\(5, 0\)"),
        ((logits.long(), gt_classes), ValueError, "logits.*int64"),
        ((logits, gt_classes.float()), ValueError, "gt_classes.*float32"),
        ((logits, gt_classes.bool()), ValueError, "gt_classes.*bool"),
        ((logits, gt_classes[None]), ValueError, r"gt_classes.*\(1, 2\)"),
        ((logits, gt_classes, torch.zeros(4)), ValueError, r"objectness.*\(4,\).*\(5,\)"),
        ((logits, gt_classes, torch.zeros(5, 4)), ValueError, r"objectness.*\(5, 4\)"),
        ((logits, gt_classes, torch.zeros(5).double()), ValueError, "objectness.*float64"),
        ((logits, [1, 2]), TypeError, "gt_classes"),
        ((None, gt_classes), TypeError, "logits"),
        ((logits, gt_classes, 1.0), TypeError, "objectness"),
    ]
    for arguments, error, message in bad:
        with pytest.raises(error, match=message):
            pairwise_bce_cost(*arguments)  # type: ignore[arg-type]


def test_the_result_is_the_largest_tensor() -> None:
    """Peak memory of a process of its own: the eager expansion would take 2 GB here."""
    program = """
import re, torch
from fused_losses.detection import pairwise_bce_cost
torch.set_num_threads(1)

def peak():  # the highest resident size in KB; getrusage's is no lower than the parent process's
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])

logits, gt_classes, objectness = torch.randn(8400, 400), torch.randint(400, (150,)), torch.randn(8400)
pairwise_bce_cost(logits[:64], gt_classes, objectness[:64])
before = peak()
pairwise_bce_cost(logits, gt_classes, objectness)
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert 0.5 < int(done.stdout) * 1024 / (4 * 8400 * 150) < 1.5
