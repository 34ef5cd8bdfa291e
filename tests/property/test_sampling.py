"""Orders of records are permutations; windows are where they have always been."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2ptrain.training.sampling import (
    heldout_records,
    record_order,
    split_order,
    training_records,
    training_windows,
)

SEEDS = st.integers(0, 2**63 - 1)


@given(count=st.integers(1, 5000), seed=SEEDS, data_epoch=st.integers(0, 2**40))
def test_order_visits_every_record_once(count: int, seed: int, data_epoch: int) -> None:
    order = record_order(count, seed=seed, data_epoch=data_epoch)
    visited = order.at(np.arange(count))
    assert np.array_equal(np.sort(visited), np.arange(count))


def test_small_orders_and_powers_of_two_are_permutations() -> None:
    for count in [*range(1, 130), 255, 256, 257, 4095, 4096, 4097, 5000]:
        for order in (record_order(count, seed=count, data_epoch=1), split_order(count)):
            assert np.array_equal(np.sort(order.at(np.arange(count))), np.arange(count))


@given(count=st.integers(1, 2**61), seed=SEEDS)
def test_order_of_any_length_stays_in_range(count: int, seed: int) -> None:
    positions = np.array([0, count // 3, count - 1])
    found = record_order(count, seed=seed, data_epoch=0).at(positions)
    assert ((found >= 0) & (found < count)).all()
    assert len(set(found.tolist())) == len(set(positions.tolist()))


@pytest.mark.parametrize("count", [2, 3, 5, 10, 17])
def test_orders_are_uniform_enough(count: int) -> None:
    """Chi-square of (position, record) over 1000 seeds, below its mean and six deviations."""
    hits = np.zeros((count, count))
    for seed in range(1000):
        hits[
            np.arange(count), record_order(count, seed=seed, data_epoch=0).at(np.arange(count))
        ] += 1
    expected = 1000 / count
    freedom = (count - 1) ** 2
    assert ((hits - expected) ** 2 / expected).sum() < freedom + 6 * (2 * freedom) ** 0.5


@given(
    records=st.integers(1, 60),
    minibatch=st.integers(1, 20),
    data_epochs=st.integers(1, 3),
    seed=SEEDS,
)
def test_every_data_epoch_has_every_record_once(
    records: int, minibatch: int, data_epochs: int, seed: int
) -> None:
    steps = -(-records * data_epochs // minibatch)
    drawn = [
        training_records(
            records, seed=seed, step=step, minibatch_size=minibatch, first_sample=0, count=minibatch
        )
        for step in range(1, steps + 1)
    ]
    visited = np.concatenate(drawn)[: records * data_epochs].reshape(data_epochs, records)
    assert (np.sort(visited, axis=1) == np.arange(records)).all()


@given(seed=SEEDS, step=st.integers(1, 2**40), cut=st.integers(0, 12))
def test_records_do_not_depend_on_the_split_into_microbatches(
    seed: int, step: int, cut: int
) -> None:
    def records(first: int, count: int) -> np.ndarray:
        return training_records(
            7, seed=seed, step=step, minibatch_size=12, first_sample=first, count=count
        )

    parts = np.concatenate([records(0, cut), records(cut, 12 - cut)])
    assert np.array_equal(parts, records(0, 12))


def test_data_epochs_and_seeds_have_different_orders() -> None:
    orders = {
        tuple(record_order(50, seed=seed, data_epoch=data_epoch).at(np.arange(50)))
        for seed in range(3)
        for data_epoch in range(3)
    }
    assert len(orders) == 9


def test_order_golden_values() -> None:
    """What a seed means may not change: a run resumes on the samples it would have seen."""
    assert record_order(10, seed=7, data_epoch=3).at(np.arange(10)).tolist() == GOLDEN_ORDER
    assert split_order(10).at(np.arange(10)).tolist() == GOLDEN_SPLIT


@given(count=st.integers(1, 500), samples=st.integers(1, 200))
def test_heldout_records_are_spread_evenly(count: int, samples: int) -> None:
    found = heldout_records(count, sample_count=samples, first_sample=0, count=samples)
    assert found.min() == 0
    assert found.max() < count
    assert (np.diff(found) >= 0).all()
    if samples <= count:
        assert len(set(found.tolist())) == samples


@given(
    size=st.integers(9, 400),
    seed=SEEDS,
    step=st.integers(0, 2**63),
    first=st.integers(0, 1000),
    dtype=st.sampled_from([np.uint8, np.uint16, np.uint32]),
)
def test_windows_are_drawn_as_ever(
    size: int, seed: int, step: int, first: int, dtype: type[np.generic]
) -> None:
    tokens = (np.arange(size) % 251).astype(dtype)
    made = training_windows(tokens, seed=seed, step=step, first_sample=first, count=3, context=8)
    for row in range(3):
        generator = np.random.Philox(
            key=np.array([seed, 3 << 56], np.uint64),
            counter=np.array([0, first + row, step, 0], np.uint64),
        )
        offset = (int(generator.random_raw()) * (size - 8)) >> 64
        assert made.inputs[row].tolist() == tokens[offset : offset + 8].tolist()
        assert made.labels[row].tolist() == tokens[offset + 1 : offset + 9].tolist()


GOLDEN_ORDER = [8, 6, 7, 4, 9, 5, 3, 2, 0, 1]
GOLDEN_SPLIT = [1, 3, 2, 7, 4, 6, 5, 9, 0, 8]
