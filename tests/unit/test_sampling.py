"""Windows of text: a function of seed, step and sample; held-out windows fixed and apart."""

from __future__ import annotations

import numpy as np
import pytest

from p2ptrain.errors import DataError
from p2ptrain.training.sampling import heldout_windows, training_windows
from p2ptrain.training.text import byte_tokens, split_heldout

TOKENS = np.arange(256, dtype=np.uint8)


def windows(first: int, count: int, *, seed: int = 1, step: int = 1) -> np.ndarray:
    return training_windows(
        TOKENS, seed=seed, step=step, first_sample=first, count=count, context=8
    ).inputs


def test_training_windows_are_text_and_what_follows_it() -> None:
    made = training_windows(TOKENS, seed=1, step=1, first_sample=0, count=5, context=8)
    assert made.inputs.shape == made.labels.shape == (5, 8)
    assert made.inputs.dtype == made.labels.dtype == np.int64
    assert made.inputs.flags.c_contiguous
    assert made.labels.flags.c_contiguous
    np.testing.assert_array_equal(made.inputs + 1, made.labels)
    np.testing.assert_array_equal(np.diff(made.inputs, axis=1), 1)


def test_training_windows_do_not_depend_on_the_split_into_microbatches() -> None:
    whole = windows(0, 8)
    np.testing.assert_array_equal(np.concatenate([windows(0, 2), windows(2, 6)]), whole)


def test_training_windows_change_with_seed_step_and_sample() -> None:
    starts = {
        tuple(windows(0, 8)[:, 0]),
        tuple(windows(0, 8, seed=2)[:, 0]),
        tuple(windows(0, 8, step=2)[:, 0]),
        tuple(windows(8, 8)[:, 0]),
    }
    assert len(starts) == 4


def test_training_windows_reach_every_offset() -> None:
    starts = windows(0, 4000)[:, 0]
    assert (starts.min(), starts.max()) == (0, 247)
    assert len(set(starts)) == 248


def test_training_windows_golden_offsets() -> None:
    assert list(windows(0, 4, seed=7, step=3)[:, 0]) == GOLDEN


def test_heldout_windows_are_even_and_do_not_overlap_where_they_fit() -> None:
    made = heldout_windows(TOKENS, sample_count=20, first_sample=0, count=20, context=8)
    starts = made.inputs[:, 0]
    assert (starts[0], starts[-1]) == (0, 247)
    assert np.diff(starts).min() >= 8
    part = heldout_windows(TOKENS, sample_count=20, first_sample=5, count=3, context=8)
    np.testing.assert_array_equal(part.labels, made.labels[5:8])


def test_heldout_windows_overlap_only_where_they_must() -> None:
    made = heldout_windows(TOKENS[:12], sample_count=6, first_sample=0, count=6, context=8)
    assert list(made.inputs[:, 0]) == [0, 0, 1, 1, 2, 3]


@pytest.mark.parametrize("size", [1, 8])
def test_windows_refuse_text_shorter_than_a_sample(size: int) -> None:
    with pytest.raises(DataError, match="needs 9"):
        training_windows(TOKENS[:size], seed=1, step=1, first_sample=0, count=1, context=8)
    with pytest.raises(DataError, match="needs 9"):
        heldout_windows(TOKENS[:size], sample_count=1, first_sample=0, count=1, context=8)


def test_windows_take_text_of_exactly_one_sample() -> None:
    made = training_windows(TOKENS[:9], seed=1, step=1, first_sample=0, count=3, context=8)
    assert (made.inputs[:, 0] == 0).all()


def test_byte_tokens_are_the_bytes() -> None:
    assert list(byte_tokens("né".encode())) == [110, 195, 169]
    with pytest.raises(DataError, match="empty"):
        byte_tokens(b"")


@pytest.mark.parametrize(("size", "heldout"), [(1000, 50), (100, 9), (18, 9)])
def test_split_heldout_keeps_the_end_and_at_least_a_sample(size: int, heldout: int) -> None:
    tokens = byte_tokens(bytes(i % 256 for i in range(size)))
    split = split_heldout(tokens, context=8)
    assert split.heldout.size == heldout
    np.testing.assert_array_equal(np.concatenate(split), tokens)


def test_split_heldout_refuses_text_without_two_samples() -> None:
    with pytest.raises(DataError, match="takes 18"):
        split_heldout(TOKENS[:17], context=8)


GOLDEN = [3, 10, 26, 44]
