"""Which meetings an item of shards has: those that its workers come to, in their sizes."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import pytest

from p2ptrain.bundle.shard_traffic import shard_traffic
from p2ptrain.bundle.sharding import Mode
from p2ptrain.store.bundles import Bundle, load_bundle, shipped_bundles
from p2ptrain.training.collectives import MeetingKey
from p2ptrain.training.shard_cuts import Share
from p2ptrain.training.shard_meetings import ShardMeetings
from tests.bundles import contract_for
from tests.shipped_training import short_context

NAMES = ("gpt-nano", "bert-mini", "llama-nano")
MODES: tuple[Mode, ...] = ("tensor", "sequence")
MICROBATCHES, HELDOUT = 3, 2
SITES = range(64)


@functools.cache
def bundle(name: str) -> Bundle:
    return short_context(load_bundle(shipped_bundles()[name]))


def meetings(name: str, mode: Mode, weights: tuple[int, ...]) -> ShardMeetings:
    contract = contract_for(bundle(name), microbatches=MICROBATCHES)
    share = Share(mode=mode, weights=weights, rank=0)
    return ShardMeetings(bundle(name).manifest, contract, share)


def keys(name: str) -> Iterator[MeetingKey]:
    for segment in range(len(bundle(name).manifest.segments)):
        for microbatch in range(MICROBATCHES + 1):
            for index in SITES:
                yield MeetingKey(microbatch=microbatch, segment=segment, index=index)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", MODES)
def test_an_evaluation_has_the_forward_meetings_of_its_microbatches(name: str, mode: Mode) -> None:
    known, manifest = meetings(name, mode, (1, 1)), bundle(name).manifest
    wanted = sum(
        len(part.collectives)
        for segment in manifest.segments
        if (kind := manifest.sharding[mode].kinds.get(segment.kind))
        for part in kind.forward
    )
    found = [key for key in keys(name) if known.expected("evaluate", key)]
    assert len(found) == HELDOUT * wanted > 0
    assert {key.microbatch for key in found} == set(range(HELDOUT))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_summed_once_per_step(name: str) -> None:
    """Under sequence sharding every segment has one more meeting, of microbatch 0."""
    known, traffic = (
        meetings(name, "sequence", (1, 1)),
        shard_traffic(bundle(name).manifest, "sequence", batch=2),
    )
    for segment, each in enumerate(traffic):
        own = [key for key in keys(name) if key.segment == segment]
        counts = [
            sum(known.expected("train", key) is not None for key in own if key.microbatch == m)
            for m in range(MICROBATCHES + 1)
        ]
        per_microbatch = len(each.forward) + len(each.backward)
        ends = 1 if each.step_bytes else 0
        assert counts == [per_microbatch + ends, per_microbatch, per_microbatch, 0]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ranks", [2, 3])
def test_even_shares_send_what_the_manifest_predicts(name: str, mode: Mode, ranks: int) -> None:
    known = meetings(name, mode, (1,) * ranks)
    traffic = shard_traffic(bundle(name).manifest, mode, batch=2)
    collectives = [cost for each in traffic for cost in (*each.forward, *each.backward)]
    predicted = MICROBATCHES * sum(cost.ring_bytes(ranks) for cost in collectives)
    predicted += sum(2 * (ranks - 1) * each.step_bytes // ranks for each in traffic)
    sent = [known.sent_bytes(rank, "train") for rank in range(ranks)]
    assert sum(sent) / ranks == pytest.approx(predicted, rel=1e-3)


@pytest.mark.parametrize("mode", MODES)
def test_every_frame_that_a_rank_sends_is_one_that_another_expects(mode: Mode) -> None:
    weights = (4, 3, 1)
    known = meetings("gpt-nano", mode, weights)
    received = 0
    for key in keys("gpt-nano"):
        meeting = known.expected("train", key)
        for rank in range(3) if meeting else ():
            assert meeting is not None
            assert sum(meeting.lengths) > 0
            for kind in {"reduce": ("part", "total"), "gather": ("slice",), "scatter": ("part",)}[
                meeting.operation
            ]:
                received += sum(
                    meeting.body_bytes(kind, sender=sender, receiver=rank)
                    for sender in meeting.senders(kind, rank)
                )
    assert received == sum(known.sent_bytes(rank, "train") for rank in range(3))


def test_no_meeting_beyond_the_model_or_the_item() -> None:
    known = meetings("gpt-nano", "tensor", (1, 1))
    inside = MeetingKey(microbatch=0, segment=1, index=0)
    assert known.expected("train", inside) is not None
    for changed in ({"segment": 10}, {"segment": -1}, {"index": 9}, {"index": -1},
                    {"microbatch": MICROBATCHES}, {"microbatch": -1}):  # fmt: skip
        fields = {"microbatch": 0, "segment": 1, "index": 0} | changed
        assert known.expected("train", MeetingKey(**fields)) is None


def test_what_may_wait_is_two_meetings_at_most() -> None:
    known = meetings("gpt-nano", "sequence", (1, 1))
    largest = max(each.step_bytes for each in shard_traffic(
        bundle("gpt-nano").manifest, "sequence", batch=2
    ))  # fmt: skip
    assert math.isclose(known.held_bytes_max, 2 * largest, rel_tol=1e-3)
