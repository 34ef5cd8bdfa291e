"""How long a run waits for its members to fetch what they need."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from p2ptrain import limits
from p2ptrain.runtime.keeping.stage_weights import prepare_timeout_s
from tests.bundles import tiny_bundle
from tests.weights import some_weights, write_weighted

TINY = tiny_bundle()
RATE = limits.PREPARE_BYTES_PER_S_MIN
ALL = sum(tensor.elements for tensor in TINY.manifest.tensors)


def test_bundle_that_is_drawn_is_waited_for_as_long_as_ever() -> None:
    assert prepare_timeout_s(TINY.manifest, resumed=False) == limits.PREPARE_TIMEOUT_S


def test_checkpoint_is_waited_for_by_its_size() -> None:
    longest = 3  # parameters and AdamW's two vectors
    waited_s = prepare_timeout_s(TINY.manifest, resumed=True) - limits.PREPARE_TIMEOUT_S
    assert waited_s == pytest.approx(4 * longest * ALL / RATE)


def test_weights_are_waited_for_by_their_size(tmp_path: Path) -> None:
    weighted = write_weighted(tmp_path / "w", TINY, some_weights(TINY, ("block0.w", "head.head")))
    given = 4 * sum(weighted.manifest.tensor(n).elements for n in ("block0.w", "head.head"))
    fresh_s = prepare_timeout_s(weighted.manifest, resumed=False) - limits.PREPARE_TIMEOUT_S
    assert fresh_s == pytest.approx(given / RATE)
    frozen = tuple(
        dataclasses.replace(t, binding="frozen") if t.name == "head.head" else t
        for t in weighted.manifest.tensors
    )
    manifest = dataclasses.replace(weighted.manifest, tensors=frozen)
    head = manifest.tensor("head.head").elements
    resumed_s = prepare_timeout_s(manifest, resumed=True) - limits.PREPARE_TIMEOUT_S
    assert resumed_s == pytest.approx(4 * (head + 3 * (ALL - head)) / RATE)
