"""torch.compile, torch.export, and what they ask of every op: fake kernels, schemas that tell the truth."""

from __future__ import annotations

import copy
from typing import Any

import cases
import pytest
import torch
from cases import CASES, IN_PLACE_CASES, Case
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend, EagerAndRecordGraphs
from torch._functorch.aot_autograd import make_boxed_func
from torch.utils._python_dispatch import TorchDispatchMode

import fused_losses
import fused_losses.functional as F
from fused_losses.detection import multi_level, pairwise_bce_cost

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
NAMESPACE = "fused_losses::"
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class OpCalls(TorchDispatchMode):
    """Keeps the first call of each of our ops, with copies of its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[Any, Arguments] = {}

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op._schema.name.startswith(NAMESPACE):
            copies = torch.utils._pytree.tree_map_only(Tensor, copy_of, (args, kwargs or {}))
            self.calls.setdefault(op, copies)
        return op(*args, **(kwargs or {}))


def copy_of(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor).copy_(tensor) if tensor.dim() else tensor.detach().clone()


def detection_cases() -> list[tuple[Any, Tensor, dict[str, Any]]]:
    target = fused_losses.IndexTarget(torch.tensor([0, 4, -1, 2, -2, 3]), scores=torch.rand(6))
    losses = (
        F.binary_cross_entropy_with_logits,
        F.sigmoid_focal_loss,
        F.quality_focal_loss,
        F.varifocal_loss,
    )
    names = ("target", "targets", "target", "target")
    anchors = [(f, torch.randn(6, 5), {name: target}) for f, name in zip(losses, names, strict=True)]
    return [*anchors, (F.distribution_focal_loss, torch.randn(6, 8), {"target": torch.rand(6) * 7})]


def op_calls() -> list[tuple[Any, Arguments]]:
    """Every op of the package, as the losses call it."""
    with OpCalls() as seen:
        calls = [(case.ours, *case.make(torch.float32), case.in_place) for case in CASES]
        calls += [(*one, True) for one in detection_cases()]
        for ours, data, options, in_place in calls:
            for reduction in ("mean", "none"):
                ours(data, **options, reduction=reduction)
                for keyword in ({}, {"inplace_backward": True}) if in_place else ({},):
                    logits = data.clone().requires_grad_() * 1
                    loss = ours(logits, **options, reduction=reduction, **keyword)
                    (loss.sum() * 1.5).backward()
        for ours, data, options in detection_cases()[:4]:
            for keyword in ({}, {"inplace_backward": True}):
                logits = data.clone().requires_grad_() * 1
                ours(logits, **options, reduction="mean", return_probabilities=True, **keyword)
                ours(data, **options, reduction="mean", return_probabilities=True)
        pairwise_bce_cost(torch.randn(6, 5), torch.tensor([0, 4, 2]))
    # What overwrites the input of a loss that has no inplace_backward.
    extra = [(getattr(torch.ops.fused_losses, name), name) for name in ("bce_train_", "bce_backward_")]
    args = {op._schema.name: args for op, args in seen.calls.items()}
    return [*seen.calls.items(), *((op.default, args[NAMESPACE + name[:-1]]) for op, name in extra)]


CALLS = op_calls()


def test_the_calls_are_of_every_op() -> None:
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith(NAMESPACE)}
    assert {op.name() for op, _ in CALLS} == names


@pytest.mark.parametrize(("op", "arguments"), CALLS, ids=[str(op.name()) for op, _ in CALLS])
def test_opcheck(op: Any, arguments: Arguments) -> None:
    torch.library.opcheck(op, *arguments)


@every_case
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("of_the_logits_alone", [False, True])
def test_fake_strides_are_the_real_ones(
    case: Case, reduction: str, autocast: bool, of_the_logits_alone: bool
) -> None:
    """A compiler builds its memory plan on them."""
    data, options = case.make(torch.bfloat16 if autocast else torch.float32)
    if autocast and case.name == "bce" and data.is_cuda:
        pytest.skip("on CUDA torch refuses it under autocast")
    target = "targets" if "targets" in options else "target"
    for arrange in (
        lambda x: x,
        lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
        lambda x: torch.stack([x, x], -1)[..., 0],
        lambda x: x[:, :1].expand_as(x),
        lambda x: x[:1].expand_as(x),
    ):
        logits, rest = arrange(data), dict(options)
        if rest[target].shape == data.shape and not of_the_logits_alone:
            rest[target] = arrange(rest[target])
        with OpCalls() as seen:
            with cases.autocast(enabled=autocast):
                loss = case.ours(logits.detach().requires_grad_(), **rest, reduction=reduction)
            loss.sum().backward()
        assert seen.calls
        for op, (args, _) in seen.calls.items():
            real = op(*args)
            with torch._subclasses.FakeTensorMode() as mode:
                fake = op(*torch.utils._pytree.tree_map_only(Tensor, mode.from_tensor, args))
            for a, b in zip(*map(torch.utils._pytree.tree_leaves, (real, fake)), strict=True):
                if a is not None:  # scale_ returns nothing
                    assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


def compiled(function: Any, ops: list[str], **options: Any) -> Any:
    """torch.compile that writes the ops of its graphs to `ops`."""

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        def keep(inner: torch.fx.GraphModule, _: Any) -> Any:
            ops.extend(str(node.target) for node in inner.graph.nodes if node.op == "call_function")
            return make_boxed_func(inner.forward)

        return aot_autograd(fw_compiler=keep)(graph, inputs)

    torch._dynamo.reset()
    return torch.compile(function, backend=backend, fullgraph=True, **options)


def value_and_gradient(function: Any, data: Tensor) -> tuple[Tensor, Tensor]:
    leaf = data.clone().requires_grad_()
    loss = function(leaf)
    loss.backward(torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype).reshape(loss.shape))
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


@every_case
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_one_graph_with_the_fused_op(case: Case, reduction: str) -> None:
    data, options = case.make(torch.float32)

    def loss_of(x: Tensor) -> Tensor:
        return case.ours(x * 0.9, **options, reduction=reduction)

    ops: list[str] = []
    ours = compiled(loss_of, ops)
    torch.testing.assert_close(value_and_gradient(ours, data), value_and_gradient(loss_of, data))
    assert sum("fused_losses" in op for op in ops) == (1 if reduction == "mean" else 2)
    with torch.no_grad():
        torch.testing.assert_close(ours(data), loss_of(data))


@pytest.mark.parametrize("case", IN_PLACE_CASES, ids=lambda case: case.name)
def test_in_place_is_left_to_the_compiler(case: Case) -> None:
    data, options = case.make(torch.float32)

    def loss_of(x: Tensor) -> Tensor:
        return case.ours(x * 0.9, **options, reduction="sum", inplace_backward=True)

    torch.testing.assert_close(
        value_and_gradient(compiled(loss_of, []), data), value_and_gradient(loss_of, data)
    )


def test_float16_gradients_come_after_the_loss_scale() -> None:
    logits, target = torch.randn(64, 5000).half(), torch.randint(5000, (64,))

    def loss_of(x: Tensor) -> Tensor:
        return F.cross_entropy(x * 1, target).float() * 65536

    torch.testing.assert_close(
        value_and_gradient(compiled(loss_of, []), logits), value_and_gradient(loss_of, logits)
    )


class Network(nn.Module):
    """A classifier with a loss of every kind on its logits."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(7, 5)
        self.losses = nn.ModuleList(
            [
                fused_losses.CrossEntropyLoss(label_smoothing=0.1),
                fused_losses.SoftmaxFocalLoss(),
                fused_losses.BCEWithLogitsLoss(pos_weight=torch.full((5,), 2.0)),
                fused_losses.SigmoidFocalLoss(),
            ]
        )
        self.losses.append(self.losses[3])

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        logits = self.layer(x)
        dense = torch.nn.functional.one_hot(index, 5).to(logits.dtype)
        targets = (index, index, dense, dense, dense)
        return sum(loss(logits, t) for loss, t in zip(self.losses, targets, strict=True)) + F.binary_cross_entropy(
            logits.sigmoid(), dense
        )  # fmt: skip


def of_network(size: int) -> tuple[Any, ...]:
    return torch.randn(size, 7), torch.randint(5, (size,))


class Head(nn.Module):
    """A detector's head: every loss on index targets, the dense ones, sides of boxes as distributions, two levels."""

    def __init__(self) -> None:
        super().__init__()
        self.classes, self.sides = nn.Linear(7, 5), nn.Linear(7, 4 * 8)
        self.losses = nn.ModuleList(
            [
                fused_losses.BCEWithLogitsLoss(),
                fused_losses.SigmoidFocalLoss(alpha=torch.linspace(0.2, 0.4, 5)),
                fused_losses.QualityFocalLoss(),
                fused_losses.VarifocalLoss(),
            ]
        )
        self.distribution = fused_losses.DistributionFocalLoss()

    def forward(
        self, x: Tensor, target: fused_losses.IndexTarget, labels: Tensor, dense: Tensor, places: Tensor
    ) -> Tensor:
        logits, bins = self.classes(x), self.sides(x).view(-1, 4, 8)
        assert target.scores is not None
        factor = target.scores.sum()
        total = self.distribution(bins, places, target.scores, avg_factor=factor)
        for loss in self.losses:
            total = total + loss(logits, target, avg_factor=factor)
        for loss in self.losses[2:]:
            total = total + loss(logits, dense)
        levels = [(logits, fused_losses.IndexTarget(labels)), (logits * 0.5, dense)]
        value, each = multi_level("varifocal_loss", levels, [4.0, 0.4], avg_factor=factor)
        by_element, probabilities = F.quality_focal_loss(
            logits, target, reduction="none", return_probabilities=True
        )
        result: Tensor = total + value + each.sum() + (by_element * probabilities).sum()
        return result


def of_head(size: int) -> tuple[Any, ...]:
    labels, scores = torch.randint(-2, 6, (size,)), torch.rand(size)
    labels[0] = 3
    target = fused_losses.IndexTarget(labels, scores)
    dense = target.dense(5)[0]
    return torch.randn(size, 7), target, labels, dense, torch.rand(size, 4) * 7


@pytest.mark.parametrize(("kind", "batch"), [(Network, of_network), (Head, of_head)])
def test_inductor_trains_without_recompiling(kind: type[nn.Module], batch: Any) -> None:
    """Batches of several sizes, all of the first one's graph; the same weights as without compile."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    compiled_network, network = kind(), kind()
    network.load_state_dict(compiled_network.state_dict())
    counter = CompileCounterWithBackend("inductor")
    step = torch.compile(compiled_network, backend=counter, fullgraph=True, dynamic=True)
    graphs = 0
    for size in (6, 9, 4):
        inputs = batch(size)
        for model, call in ((compiled_network, step), (network, network)):
            model.zero_grad()
            call(*inputs).backward()
            with torch.no_grad():
                for p in model.parameters():
                    p -= 0.1 * p.grad
        graphs = graphs or counter.frame_count
    assert counter.frame_count == graphs
    for ours, theirs in zip(compiled_network.parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    "criterion",
    [
        fused_losses.BCEWithLogitsLoss(pos_weight=torch.rand(5, device="cpu")),
        fused_losses.FocalLoss(nn.BCEWithLogitsLoss(pos_weight=torch.rand(5, device="cpu"))),
        fused_losses.FocalLoss(nn.BCEWithLogitsLoss(), alpha=0.3),
        fused_losses.SigmoidFocalLoss(alpha=torch.rand(5, device="cpu")),
    ],
    ids=["bce", "FocalLoss", "FocalLoss without", "focal"],
)
def test_weights_in_buffers_and_batches_of_any_size(criterion: nn.Module) -> None:
    """Dynamo knows a buffer's shape and not the input's."""
    torch._dynamo.reset()
    graphs = EagerAndRecordGraphs()
    criterion = copy.deepcopy(criterion).to(torch.get_default_device())
    compiled = torch.compile(criterion, backend=graphs, fullgraph=True, dynamic=True)
    for size in (6, 9):
        logits, target = torch.randn(size, 5), torch.rand(size, 5)
        torch.testing.assert_close(compiled(logits, target), criterion(logits, target))
    (graph,) = graphs.graphs
    assert any("fused_losses" in str(node.target) for node in graph.graph.nodes)


@every_case
def test_unreduced_losses_of_batches_of_any_size(case: Case) -> None:
    torch._dynamo.reset()

    def loss_of(logits: Tensor, options: dict[str, Any]) -> Tensor:
        return case.ours(logits, **options, reduction="none")

    compiled = torch.compile(loss_of, backend="aot_eager", fullgraph=True, dynamic=True)
    logits, options = case.make(torch.float32)
    results = []
    for function in (compiled, loss_of):
        leaf = logits.clone().requires_grad_()
        loss = function(leaf, options)
        results.append((loss.detach(), *torch.autograd.grad(loss.square().sum(), leaf)))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)


def test_a_number_of_rows_that_only_the_run_knows() -> None:
    torch._dynamo.reset()

    def loss_of(logits: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        return F.cross_entropy(logits[mask], target[mask], reduction="none").sum()

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(loss_of, backend="aot_eager", fullgraph=True)
        logits, target, mask = (
            torch.randn(8, 5, requires_grad=True),
            torch.randint(5, (8,)),
            torch.rand(8) < 0.5,
        )
        torch.testing.assert_close(compiled(logits, target, mask), loss_of(logits, target, mask))


@pytest.mark.parametrize("strict", [True, False])
def test_export(strict: bool) -> None:
    network = Network().eval()
    x, index = torch.randn(6, 7), torch.randint(5, (6,))
    batch = torch.export.Dim("batch", min=2, max=64)
    shapes = {"x": {0: batch}, "index": {0: batch}}
    program = torch.export.export(network, (x, index), dynamic_shapes=shapes, strict=strict)
    x, index = torch.randn(11, 7), torch.randint(5, (11,))
    torch.testing.assert_close(program.module()(x, index), network(x, index))
    assert "fused_losses" not in str(program.graph)  # it runs where the package is not
    gradients = []
    for module in (program.module(), network):
        module.zero_grad()
        module(x, index).backward()
        gradients.append([parameter.grad for parameter in module.parameters()])
    torch.testing.assert_close(*gradients)


@every_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast_in_a_graph(case: Case, reduction: str, dtype: torch.dtype) -> None:
    """The fused op with a float32 loss, as without torch.compile, and no copy of the logits."""
    data, options = case.make(dtype)

    def loss_of(x: Tensor) -> Tensor:
        with torch.autocast(data.device.type, torch.bfloat16):
            return case.ours(x, **options, reduction=reduction)

    if case.name == "bce" and data.is_cuda:
        pytest.skip("on CUDA torch refuses it under autocast")
    ops: list[str] = []
    ours, expected = value_and_gradient(compiled(loss_of, ops), data), value_and_gradient(loss_of, data)
    assert [tensor.dtype for tensor in ours] == [torch.float32, dtype]
    torch.testing.assert_close(ours, expected)
    stored = reduction == "mean" and dtype is torch.bfloat16
    assert sum("fused_losses" in op for op in ops) == (1 if stored else 2)
    weights = sum(isinstance(o, Tensor) and o.dim() == 1 and o.is_floating_point() for o in options.values())
    assert sum("_to_copy" in op for op in ops) <= weights  # (C), as the kernels read them


@pytest.mark.parametrize(
    ("ours", "data", "options"), detection_cases(), ids=lambda value: getattr(value, "__name__", "")
)
def test_autocast_of_a_detectors_losses_in_a_graph(ours: Any, data: Tensor, options: dict[str, Any]) -> None:
    data = data.bfloat16()

    def loss_of(x: Tensor) -> Tensor:
        with torch.autocast(data.device.type, torch.bfloat16):
            loss: Tensor = ours(x, **options, reduction="mean")
            return loss

    ops: list[str] = []
    traced = value_and_gradient(compiled(loss_of, ops), data)
    assert [tensor.dtype for tensor in traced] == [torch.float32, torch.bfloat16]
    torch.testing.assert_close(traced, value_and_gradient(loss_of, data))
    assert sum("fused_losses" in op for op in ops) == 1
