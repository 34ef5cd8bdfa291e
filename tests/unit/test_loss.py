"""What counts as a label, and how much it weighs."""

from __future__ import annotations

import numpy as np
import pytest

from p2ptrain.bundle.manifest import Loss
from p2ptrain.training.loss import counted_labels, loss_weight

LABELS = np.array([[1, -100, 2], [-100, -100, 0]])


@pytest.mark.parametrize(("ignore_index", "count"), [(-100, 3), (0, 5), (7, 6)])
def test_cross_entropy_leaves_ignored_labels_out(ignore_index: int, count: int) -> None:
    loss = Loss(kind="cross-entropy", ignore_index=ignore_index)
    assert counted_labels(loss, LABELS) == count


@pytest.mark.parametrize("kind", ["mse", "l1", "bce"])
def test_every_element_of_other_labels_counts(kind: str) -> None:
    labels = np.full((4, 3), -100.0, np.float32)
    assert counted_labels(Loss(kind=kind), labels) == 12


def test_weight_of_a_minibatch_does_not_depend_on_its_split() -> None:
    loss = Loss(kind="cross-entropy")
    halves = counted_labels(loss, LABELS[:1]) + counted_labels(loss, LABELS[1:])
    assert loss_weight(halves) == loss_weight(counted_labels(loss, LABELS)) == 1 / 3


def test_weight_of_text_windows_is_one_over_samples_times_context() -> None:
    assert loss_weight(16 * 64) == 1.0 / (16 * 64)
