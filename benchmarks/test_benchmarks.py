"""The cases of compare.py under pytest-benchmark, for tracking over time: make bench"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from baselines import OURS, Unavailable
from cases import SUITES, Case
from measure import Call, input_sets, last_level_cache

pytest.importorskip("pytest_benchmark")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("name", ["eager", *OURS])
@pytest.mark.parametrize("spec", [spec for suite in SUITES.values() for spec in suite])
def test_forward_and_backward(benchmark: Any, spec: str, name: str) -> None:
    case = Case.parse(spec)
    try:
        call = Call(case, name, *input_sets(case, DEVICE, last_level_cache(DEVICE)))
    except Unavailable as reason:
        pytest.skip(str(reason))
    turn: list[tuple[torch.Tensor, ...]] = []

    def next_inputs() -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
        """Outside of the clock, like the copies that in place works on: all of a turn's at once, as in compare.py."""
        if not turn:
            turn.extend(call.ready(index) for index in range(len(call.sets)))
        return turn.pop(), {}

    def step(*ready: torch.Tensor) -> None:
        call.backward(call.forward(*ready), ready[0])
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = case.label
    benchmark.extra_info["floor_bytes"] = case.floor_bytes
    benchmark.pedantic(step, setup=next_inputs, rounds=50, warmup_rounds=5)
