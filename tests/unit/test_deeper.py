"""Deeper models for measuring: which block repeats, and what a copy of it is."""

from __future__ import annotations

import pytest

from p2ptrain.errors import ConfigError
from tests.bundles import tiny_bundle
from tests.varied_bundle import varied_bundle
from tools.bench.deeper import Repetition, deeper_bundle, find_repetition


@pytest.mark.parametrize(
    ("kinds", "start", "period", "count"),
    [("eababababh", 1, 2, 4), ("emmfbbbh", 4, 1, 3), ("aaaa", 0, 1, 4), ("xabcabcy", 1, 3, 2)],
)
def test_repetition_is_the_longest_with_the_shortest_block(
    kinds: str, start: int, period: int, count: int
) -> None:
    assert find_repetition(tuple(kinds)) == Repetition(start=start, period=period, count=count)


def test_repetition_needs_two_blocks() -> None:
    assert find_repetition(tuple("abc")) is None
    with pytest.raises(ConfigError, match="repeats no block"):
        deeper_bundle(tiny_bundle(blocks=1), 3)


def test_deeper_bundle_is_never_shallower() -> None:
    with pytest.raises(ConfigError, match="more than 2"):
        deeper_bundle(tiny_bundle(blocks=3), 2)


@pytest.mark.parametrize("blocks", [3, 4, 7])
def test_deeper_bundle_repeats_segments_and_shares_their_graphs(blocks: int) -> None:
    before = tiny_bundle(blocks=3)
    manifest = deeper_bundle(before, blocks).manifest
    assert [s.kind for s in manifest.segments] == ["embed", *["block"] * blocks, "head"]
    assert manifest.graphs == before.manifest.graphs
    each = sum(tensor.elements for tensor in before.manifest.segment_tensors(1))
    more = (blocks - 3) * each
    assert manifest.parameter_count == before.manifest.parameter_count + more


def test_deeper_bundle_copies_running_values() -> None:
    manifest = deeper_bundle(varied_bundle(), 4).manifest
    names = [name for segment in manifest.segments for name in segment.running.values()]
    assert names == ["mix0.mean", "mix1.mean", "mix1.mean.copy2", "mix1.mean.copy3"]
