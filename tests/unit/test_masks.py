"""Dropout masks depend on their place and on nothing else."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np
import pytest

from p2ptrain.errors import InvariantBroken
from p2ptrain.training.masks import MaskPlace, draw_mask

PLACE = MaskPlace(seed=3, step=1, microbatch=2, segment=4, site=0)


def drawn(place: MaskPlace, probability: float, shape: tuple[int, ...]) -> np.ndarray:
    out = np.full(shape, 9.0, np.float32)
    draw_mask(place, probability, out)
    return out


def test_mask_holds_zeros_and_the_exact_scale_in_the_asked_share() -> None:
    mask = drawn(PLACE, 0.1, (40, 1000))
    assert set(np.unique(mask)) == {np.float32(0.0), np.float32(1 / 0.9)}
    assert abs((mask == 0).mean() - 0.1) < 0.01
    assert abs(mask.mean() - 1.0) < 0.01


def test_mask_of_probability_zero_is_ones() -> None:
    assert (drawn(PLACE, 0.0, (3, 5)) == 1.0).all()


@pytest.mark.parametrize("change", ["seed", "step", "microbatch", "segment", "site"])
def test_mask_changes_with_every_part_of_its_place(change: str) -> None:
    other = dataclasses.replace(PLACE, **{change: getattr(PLACE, change) + 1})
    first, second = drawn(PLACE, 0.5, (64, 64)), drawn(other, 0.5, (64, 64))
    assert 0.4 < (first == second).mean() < 0.6


def test_mask_is_drawn_again_with_the_same_bits_and_prefix_for_any_size() -> None:
    whole = drawn(PLACE, 0.3, (100_003,))
    assert drawn(PLACE, 0.3, (100_003,)).tobytes() == whole.tobytes()
    assert drawn(PLACE, 0.3, (33_333,)).tobytes() == whole[:33_333].tobytes()


def test_mask_golden_bits_hold_on_every_machine() -> None:
    mask = drawn(PLACE, 0.25, (50_000,)).astype("<f4")
    assert hashlib.sha256(mask.tobytes()).hexdigest() == GOLDEN


@pytest.mark.parametrize("probability", [-0.1, 1.0, float("nan")])
def test_mask_refuses_what_is_no_probability(probability: float) -> None:
    with pytest.raises(InvariantBroken):
        drawn(PLACE, probability, (4,))


GOLDEN = "52a7f8dcc89eb5e494729541bf3125e8059f93994d56f69d152de7cb5533bb4b"
