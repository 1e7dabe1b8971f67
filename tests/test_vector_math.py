"""The vector functions at the level in use, in units in the last place (ulp) against mpmath."""

from __future__ import annotations

import math
from collections.abc import Callable

import mpmath
import numpy as np
import pytest
from numpy.typing import NDArray

from fused_losses import _C

Array = NDArray[np.floating]

pytestmark = pytest.mark.every_level

EXACT: dict[str, Callable[..., mpmath.mpf]] = {
    "exp": mpmath.exp,
    "exp_term": mpmath.exp,
    "exp_term_coarse": mpmath.exp,
    "exp_minus_magnitude": lambda x: mpmath.exp(-abs(x)),
    "exp_minus_magnitude_coarse": lambda x: mpmath.exp(-abs(x)),
    "log": mpmath.log,
    "log1p": mpmath.log1p,
    "log_unit": mpmath.log,
    "log_complement": lambda x: mpmath.log1p(-x),
    "log1p_unit": mpmath.log1p,
    "log1p_unit_coarse": mpmath.log1p,
    "odds": lambda e: mpmath.mpf(e) / (1 + mpmath.mpf(e)),
    "odds_coarse": lambda e: mpmath.mpf(e) / (1 + mpmath.mpf(e)),
    "sqrt": mpmath.sqrt,
}

# The largest errors allowed, in ulp.
BOUNDS = [
    ("exp", np.float32, 1.0),
    ("exp", np.float64, 1.0),
    ("exp_term", np.float32, 1.2),
    ("exp_term", np.float64, 1.0),
    ("exp_term_coarse", np.float32, 150.0),
    ("exp_minus_magnitude", np.float32, 1.2),
    ("exp_minus_magnitude", np.float64, 1.0),
    ("exp_minus_magnitude_coarse", np.float32, 150.0),
    ("log", np.float32, 1.0),
    ("log", np.float64, 1.0),
    ("log1p", np.float32, 1.0),
    ("log1p", np.float64, 1.0),
    ("log_unit", np.float32, 1.0),
    ("log_unit", np.float64, 1.0),
    ("log_complement", np.float32, 1.1),
    ("log_complement", np.float64, 1.0),
    ("log1p_unit", np.float32, 1.5),
    ("log1p_unit", np.float64, 1.0),
    ("log1p_unit_coarse", np.float32, 30.0),
    ("odds", np.float32, 1.5),
    ("odds", np.float64, 1.5),
    ("odds_coarse", np.float32, 3.0),
    ("sqrt", np.float32, 0.5),
    ("sqrt", np.float64, 0.5),
]


def evaluate(name: str, x: Array, parameter: float = 0.0) -> Array:
    y = np.full_like(x, np.nan)
    _C.evaluate(name, x, y, parameter)
    return y


def points(name: str, dtype: type[np.floating]) -> Array:
    """Where the losses use the function, the ends of the dtype's range and the neighbourhood of its zeros."""
    random = np.random.default_rng(3)
    info = np.finfo(dtype)
    if name == "exp_minus_magnitude":  # its subnormal numbers, too
        x = random.uniform(-1, 1, 4000) * np.log(float(info.smallest_subnormal)) * np.repeat([1, 0.01], 2000)
    elif name.startswith("exp"):
        low, high = float(np.log(info.smallest_normal)), float(np.log(info.max)) if name == "exp" else 0.0
        x = np.concatenate(
            [
                random.uniform(low, high, 3000),
                random.uniform(-1, min(high, 1), 1000),
                np.minimum(random.normal(0, 1e-5, 200), high),
                [0, -0.0],
            ]
        )
    elif name in ("log_unit", "log_complement"):
        smallest = np.log10(float(info.smallest_subnormal)) if name == "log_unit" else -30
        small = np.maximum(10.0 ** random.uniform(smallest, 0, 2000), float(info.smallest_subnormal))
        x = np.concatenate([random.uniform(0, 1, 3000), small, [0.5, 1 / 3]])
        x = np.concatenate([x, 1 - x[x > 1e-3], np.nextafter(np.array([0.5, 0.25, 1], dtype), dtype(0))])
        x = x[(x.astype(dtype) > 0) & (x.astype(dtype) < 1)]
    elif name.startswith(("log1p_unit", "odds")):
        x = np.concatenate([random.uniform(0, 1, 3000), 10.0 ** random.uniform(-30, 0, 1000), [0, 1, 0.5]])
    elif name == "log1p":
        x = np.concatenate(
            [
                random.uniform(-1 + 1e-6, 2, 2000),
                10.0 ** random.uniform(-30, 30, 2000),
                -(10.0 ** random.uniform(-30, -1, 1000)),
                [0, 1],
            ]
        )
    else:
        exponents = random.uniform(np.log2(info.smallest_normal), np.log2(info.max) - 1e-6, 3000)
        x = np.concatenate(
            [2.0**exponents, random.uniform(0.5, 2, 2000), 1 + random.normal(0, 1e-4, 500), [1]]
        )
    return x.astype(dtype)


def largest_error(y: Array, exact: list[mpmath.mpf]) -> tuple[float, int]:
    """In ulp, and where."""
    info = np.finfo(y.dtype)
    smallest = mpmath.mpf(float(info.smallest_subnormal))
    errors = []
    for value, right in zip(y.tolist(), exact, strict=True):
        _, exponent = mpmath.frexp(right)
        ulp = max(mpmath.ldexp(1, exponent - info.nmant - 1), smallest)
        errors.append(float(abs(mpmath.mpf(value) - right) / ulp))
    worst = int(np.argmax(errors))
    return errors[worst], worst


@pytest.mark.parametrize(("name", "dtype", "bound"), BOUNDS)
def test_error(name: str, dtype: type[np.floating], bound: float) -> None:
    x = points(name, dtype)
    y = evaluate(name, x)
    with mpmath.workdps(40):
        error, at = largest_error(y, [EXACT[name](value) for value in x.tolist()])
    assert error <= bound, f"{name}({x[at]!r}) = {y[at]!r} is {error:.2f} ulp off"


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("power", [0.0, 0.01, 0.5, 1.0, 1.5, 2.7, 5.0, 20.0])
def test_error_of_powers(power: float, dtype: type[np.floating]) -> None:
    """A float's logarithm has more digits than a float; in double the error grows with the exponent of the result."""
    random = np.random.default_rng(4)
    near_one = 1 - 10.0 ** random.uniform(-7, -1, 500)
    x = np.concatenate([10.0 ** random.uniform(-7, 0, 1500), random.uniform(0, 1, 1500), near_one, [1.0]])
    x = x.astype(dtype)
    y = evaluate("pow", x, power)
    with mpmath.workdps(40):
        error, at = largest_error(y, [mpmath.mpf(value) ** mpmath.mpf(power) for value in x.tolist()])
    through_double = _C.cpu_level() == "baseline"  # without fused multiply-add
    bound = 2 + 32 * power if dtype == np.float64 else 0.51 if through_double else 1.1
    assert error <= bound, f"{x[at]!r} ** {power} = {y[at]!r} is {error:.2f} ulp off"


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_special_values(dtype: type[np.floating]) -> None:
    tiny = float(np.finfo(dtype).smallest_subnormal)
    inf, nan = math.inf, math.nan
    table = {
        "exp": {0.0: 1.0, -inf: 0.0, inf: inf, nan: nan, -1e4: 0.0, 1e4: inf},
        "exp_term": {0.0: 1.0, -inf: 0.0, nan: nan, -1e4: 0.0, math.log(tiny): 0.0},
        "log": {1.0: 0.0, 0.0: -inf, inf: inf, -1.0: nan, nan: nan, tiny: math.log(tiny)},
        "log1p": {0.0: 0.0, -1.0: -inf, inf: inf, -2.0: nan, nan: nan, tiny: tiny},
        "log1p_unit": {0.0: 0.0, tiny: tiny, nan: nan},
        "sqrt": {0.0: 0.0, 1.0: 1.0, inf: inf, nan: nan, -1.0: nan},
    }
    for name, values in table.items():
        y = evaluate(name, np.array(list(values), dtype))
        np.testing.assert_allclose(y, list(values.values()), rtol=1e-6, err_msg=name)
    # What is infinite may be anything below the -100 of binary cross entropy.
    ends = np.array([0.0, 1.0], dtype)
    assert np.maximum(evaluate("log_unit", ends), -100).tolist() == [-100, 0]
    assert np.maximum(evaluate("log_complement", ends), -100).tolist() == [0, -100]
    assert evaluate("pow", ends, 0.0).tolist() == [1.0, 1.0]
    for power in (0.5, 3.0, 1e30, 1e300):
        assert evaluate("pow", ends, power).tolist() == [0.0, 1.0]
        assert np.isnan(evaluate("pow", np.array([nan], dtype), power))
    assert evaluate("pow", np.array([0.3, 1e-30, tiny], dtype), 1e30).tolist() == [0.0, 0.0, 0.0]
    np.testing.assert_allclose(evaluate("pow", np.array([4 * tiny], dtype), 0.5), [2 * tiny**0.5], rtol=1e-6)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 33])
def test_every_length(count: int) -> None:
    """The tail of a loop is the body's result, bit for bit, and nothing is written behind it."""
    for dtype in (np.float32, np.float64):
        x = np.linspace(-3, 3, 64).astype(dtype)
        y = np.full_like(x, 7)
        _C.evaluate("exp", x[:count], y[:count], 0.0)
        assert (y[:count] == evaluate("exp", x)[:count]).all()
        assert (y[count:] == 7).all()


def test_unknown_function_and_wrong_buffers() -> None:
    x = np.zeros(3, np.float32)
    with pytest.raises(ValueError, match="tangent"):
        _C.evaluate("tangent", x, x.copy(), 0.0)
    with pytest.raises(ValueError, match="one length"):
        _C.evaluate("exp", x, np.zeros(4, np.float32), 0.0)
