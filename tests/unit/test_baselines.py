"""Counting baselines against cases that can be worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from p2ptrain.demo.baselines import baselines, bigram_probabilities, unigram_probabilities


def counted(text: bytes) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    return np.frombuffer(text, dtype=np.uint8)


def test_unigram_of_two_letters_is_one_bit() -> None:
    result = baselines(b"ab" * 100_000, b"ab" * 100)
    assert result.unigram == pytest.approx(math.log(2), abs=2e-3)


def test_bigram_of_alternating_letters_is_nearly_nothing() -> None:
    assert baselines(b"ab" * 100_000, b"ab" * 100).bigram < 1e-3


def test_unseen_bytes_cost_much_but_not_infinitely() -> None:
    result = baselines(b"a" * 1000, b"zzzz")
    assert math.log(1000) < result.unigram < 10
    assert math.isfinite(result.bigram)


def test_bigram_beats_unigram_on_english() -> None:
    text = b"the cat sat on the mat and the dog sat on the cat that sat on the mat " * 30
    result = baselines(text, text[:500])
    assert result.bigram < result.unigram - 0.5


def test_probabilities_sum_to_one() -> None:
    train_N = counted(b"hello world")
    unigram_V = unigram_probabilities(train_N)
    assert unigram_V.sum() == pytest.approx(1.0)
    np.testing.assert_allclose(bigram_probabilities(train_N, unigram_V).sum(axis=1), 1.0)


def test_one_added_count_is_exact() -> None:
    assert unigram_probabilities(counted(b"aab"))[ord("a")] == pytest.approx(3 / (3 + 256))


@pytest.mark.parametrize(("train", "heldout"), [(b"", b"ab"), (b"ab", b"a")])
def test_texts_too_short_to_count_in_are_refused(train: bytes, heldout: bytes) -> None:
    with pytest.raises(ValueError, match="two bytes"):
        baselines(train, heldout)
