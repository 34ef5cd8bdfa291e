"""Which elements each shard has, and that all of them make up the whole."""

from __future__ import annotations

import numpy as np
import pytest

from p2ptrain.errors import InvariantBroken, PlanInfeasible
from p2ptrain.training.shard_cuts import Cut, unit_counts

COUNTS = [
    (4, (1, 1), (2, 2)),
    (7, (1, 1), (4, 3)),
    (7, (4, 3), (4, 3)),
    (12, (4, 3), (7, 5)),
    (7, (2, 1, 1), (3, 2, 2)),
    (3, (1, 1, 1), (1, 1, 1)),
    (3, (100, 1, 1), (1, 1, 1)),
    (4, (1, 100, 1), (1, 2, 1)),
    (10, (1, 3), (3, 7)),
    (128, (1000, 999), (64, 64)),
]


@pytest.mark.parametrize(("units", "weights", "counts"), COUNTS)
def test_units_follow_the_weights_and_nobody_has_none(
    units: int, weights: tuple[int, ...], counts: tuple[int, ...]
) -> None:
    assert unit_counts(units, weights) == counts


def test_fewer_units_than_peers_are_refused() -> None:
    with pytest.raises(PlanInfeasible, match="2 units for 3 peers"):
        unit_counts(2, (1, 1, 1))


CUTS = [
    ((12, 3), Cut(axis=0, blocks=(1,), counts=(7, 5))),
    ((3, 28), Cut(axis=1, blocks=(4,), counts=(4, 3))),
    ((3, 21, 2), Cut(axis=1, blocks=(2, 1, 4), counts=(2, 1))),
    ((5,), Cut(axis=0, blocks=(1,), counts=(1, 3, 1))),
]


@pytest.mark.parametrize(("shape", "cut"), CUTS)
def test_slices_make_up_the_whole(shape: tuple[int, ...], cut: Cut) -> None:
    whole = np.arange(np.prod(shape)).reshape(shape)
    slices = [cut.slice(whole, rank) for rank in range(len(cut.counts))]
    assert [s.shape for s in slices] == [cut.shape(shape, r) for r in range(len(cut.counts))]
    assert all(s.flags.c_contiguous for s in slices)
    np.testing.assert_array_equal(cut.join(slices), whole)


def test_each_block_gives_a_shard_its_units() -> None:
    """A fused query, key and value of three units: a shard's part is in each of the three."""
    cut = Cut(axis=0, blocks=(2, 1, 1), counts=(1, 2))
    whole = np.arange(12)
    assert cut.slice(whole, 0).tolist() == [0, 1, 6, 9]
    assert cut.slice(whole, 1).tolist() == [2, 3, 4, 5, 7, 8, 10, 11]


def test_a_value_of_another_size_is_not_cut() -> None:
    with pytest.raises(InvariantBroken, match="cut otherwise"):
        Cut(axis=0, blocks=(4,), counts=(4, 3)).slice(np.zeros((27,)), 0)
