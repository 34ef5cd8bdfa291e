"""Square sums and clipping: fixed chunks, ordered additions, nothing infinite passes."""

from __future__ import annotations

import math

import numpy as np
import pytest

from p2ptrain.errors import NumericsError
from p2ptrain.training.clipping import Clip, clip_scale
from p2ptrain.training.squares import square_sum


@pytest.mark.parametrize(
    ("squares", "clip_norm", "expected"),
    [
        ([9.0, 16.0], 10.0, Clip(5.0, 1.0)),
        ([9.0, 16.0], 5.0, Clip(5.0, 1.0)),
        ([9.0, 16.0], 1.0, Clip(5.0, 0.2)),
        ([9.0, 16.0], 0.0, Clip(5.0, 1.0)),
        ([0.0], 1.0, Clip(0.0, 1.0)),
        ([], 1.0, Clip(0.0, 1.0)),
    ],
)
def test_clip_scale_cases(squares: list[float], clip_norm: float, expected: Clip) -> None:
    assert clip_scale(squares, clip_norm) == expected


def test_clip_scale_adds_in_the_given_order() -> None:
    squares = [1.0, 1e-16, 1e-16, 1e16]
    ordered = ((1.0 + 1e-16) + 1e-16) + 1e16
    assert clip_scale(squares, 0.0).norm == math.sqrt(ordered)
    small_first = [1e-16] * 10_000 + [1.0]
    assert clip_scale(small_first, 0.0).norm != clip_scale(small_first[::-1], 0.0).norm


@pytest.mark.parametrize("squares", [[1.0, math.inf], [math.nan], [1e308, 1e308]])
def test_clip_scale_refuses_what_is_not_finite(squares: list[float]) -> None:
    with pytest.raises(NumericsError, match="not finite"):
        clip_scale(squares, 1.0)


@pytest.mark.parametrize("size", [0, 1, 65_535, 65_536, 65_537, 200_000])
def test_square_sum_is_close_to_the_exact_sum(size: int) -> None:
    gradient = np.random.default_rng(1).standard_normal(size).astype(np.float32)
    exact = math.fsum(float(x) * float(x) for x in gradient)
    assert square_sum(gradient) == pytest.approx(exact, rel=1e-12)


def test_square_sum_does_not_depend_on_alignment_shape_or_scratch() -> None:
    gradient = np.random.default_rng(1).standard_normal(200_000).astype(np.float32)
    expected = square_sum(gradient)
    shifted = np.empty(200_003, np.float32)
    shifted[3:] = gradient
    assert square_sum(shifted[3:]) == expected
    assert square_sum(gradient.reshape(200, 1000)) == expected
    assert square_sum(gradient, np.empty(65_536)) == expected


def test_square_sum_works_in_float64() -> None:
    assert square_sum(np.full(4, 1e30, np.float32)) == pytest.approx(4e60, rel=1e-6)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_square_sum_passes_on_what_is_not_finite(value: float) -> None:
    assert not math.isfinite(square_sum(np.array([1.0, value], np.float32)))
