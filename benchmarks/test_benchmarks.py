"""The cases of compare.py under pytest-benchmark, for tracking over time: pytest benchmarks --benchmark-autosave"""

from __future__ import annotations

from typing import Any

import pytest
from cases import OURS, SUITES, Case, Unavailable
from measure import Call

pytest.importorskip("pytest_benchmark")


@pytest.mark.parametrize("name", ["eager", *OURS])
@pytest.mark.parametrize("spec", [spec for suite in SUITES.values() for spec in suite])
def test_forward_and_backward(benchmark: Any, spec: str, name: str) -> None:
    case = Case.parse(spec)
    try:
        call = Call(case, name, *case.inputs("cpu"))
    except Unavailable as reason:
        pytest.skip(str(reason))
    benchmark.group = case.label
    benchmark(call)
