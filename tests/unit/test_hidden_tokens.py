"""Masked language modelling: how many tokens are hidden and behind what; drawn again alike."""

from __future__ import annotations

import numpy as np

from p2ptrain.training.hidden_tokens import HidingRule, hide_tokens

RULE = HidingRule(probability=0.15, mask_token=999, vocabulary=1000, ignore_index=-100)
TOKENS = np.tile(np.arange(500, dtype=np.int64), (40, 1))


def hidden(first: int, count: int, **place: int) -> tuple[np.ndarray, np.ndarray]:
    at = {"seed": 1, "step": 1, **place}
    return hide_tokens(TOKENS[first : first + count], RULE, first_sample=first, **at)


def test_labels_are_the_tokens_that_were_hidden() -> None:
    inputs, labels = hidden(0, 40)
    predicted = labels != -100
    assert (labels[predicted] == TOKENS[predicted]).all()
    assert (inputs[~predicted] == TOKENS[~predicted]).all()


def test_shares_are_fifteen_then_eighty_ten_ten_percent() -> None:
    inputs, labels = hidden(0, 40)
    predicted = labels != -100
    masked, kept = inputs[predicted] == 999, inputs[predicted] == labels[predicted]
    assert abs(predicted.mean() - 0.15) < 0.01
    assert abs(masked.mean() - 0.8) < 0.03
    assert abs(kept.mean() - 0.1) < 0.02
    random = inputs[predicted][~masked & ~kept]
    assert random.min() >= 0
    assert random.max() < 1000
    assert len(set(random.tolist())) > 0.7 * len(random)


def test_hiding_follows_from_seed_step_and_sample_alone() -> None:
    whole = hidden(0, 8)
    parts = [hidden(0, 3), hidden(3, 5)]
    for index in range(2):
        joined = np.concatenate([part[index] for part in parts])
        np.testing.assert_array_equal(joined, whole[index])
    for changed in ({"seed": 2}, {"step": 2}):
        assert (hidden(0, 8, **changed)[1] != whole[1]).any()


def test_every_sample_predicts_something() -> None:
    rule = HidingRule(probability=0.0, mask_token=9, vocabulary=10, ignore_index=-100)
    _, labels = hide_tokens(TOKENS[:, :3], rule, seed=0, step=0, first_sample=0)
    assert ((labels != -100).sum(axis=1) == 1).all()


def test_tokens_are_left_as_they_were() -> None:
    before = TOKENS.copy()
    hidden(0, 40)
    np.testing.assert_array_equal(TOKENS, before)
