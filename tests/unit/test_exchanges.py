"""What comes of meetings, and how a group in one process goes through them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from p2ptrain.errors import InvariantBroken
from p2ptrain.training.exchanges import Exchange, Exchanges, meet, together

Array = NDArray[Any]  # Any: any element type


def brought(
    kind: str, *arrays: Array, axis: int = 0, counts: tuple[int, ...] = ()
) -> list[Exchange]:
    return [
        Exchange(kind=kind, segment=1, site=2, array=array, axis=axis, counts=counts)
        for array in arrays
    ]


def test_terms_are_added_in_rank_order() -> None:
    terms = [np.float32([value]) for value in (1e8, 1.0, -1e8)]
    (first, *others) = meet(brought("reduce", *terms))
    assert first.tolist() == [(np.float32(1e8) + np.float32(1.0)) - np.float32(1e8)]
    assert [array.tolist() for array in others] == [first.tolist()] * 2
    assert terms[0].tolist() == [1e8]  # what was brought stays as it is


def test_slices_lie_side_by_side() -> None:
    parts = [np.full((2, count), rank) for rank, count in enumerate((1, 2))]
    for whole in meet(brought("gather", *parts, axis=1, counts=(1, 2))):
        assert whole.tolist() == [[0, 1, 1]] * 2


def test_each_gets_its_slice_of_a_sum() -> None:
    terms = [np.arange(6).reshape(2, 3), np.ones((2, 3), np.int64)]
    first, second = meet(brought("scatter", *terms, axis=1, counts=(1, 2)))
    assert first.tolist() == [[1], [4]]
    assert second.tolist() == [[2, 3], [5, 6]]


def shard(rank: int, kinds: list[str]) -> Exchanges[list[float]]:
    found = []
    for site, kind in enumerate(kinds):
        answer = yield Exchange(
            kind=kind, segment=0, site=site, array=np.float32([rank + 1.0]), counts=(1, 1)
        )
        found.append(float(answer.sum()))
    return found


def test_a_group_goes_through_its_meetings() -> None:
    assert together([shard(0, ["reduce", "gather"]), shard(1, ["reduce", "gather"])]) == [
        [3.0, 3.0],
        [3.0, 3.0],
    ]
    assert together([shard(0, []), shard(1, [])]) == [[], []]


@pytest.mark.parametrize(
    ("one", "other"),
    [(["reduce"], ["gather"]), (["reduce"], []), (["reduce", "reduce"], ["reduce"])],
)
def test_shards_that_part_are_noticed(one: list[str], other: list[str]) -> None:
    with pytest.raises(InvariantBroken, match="shards are"):
        together([shard(0, one), shard(1, other)])
