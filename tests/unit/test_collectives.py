"""Pieces, frames and additions of collectives."""

from __future__ import annotations

import numpy as np
import pytest

from p2ptrain.errors import RemoteProtocolError
from p2ptrain.planner.traffic import all_reduce_bytes, gather_bytes
from p2ptrain.training.collectives import (
    FRAMES,
    Meeting,
    Operation,
    add_by_rank,
    even_lengths,
    held_bytes,
    pieces_of,
)


@pytest.mark.parametrize(
    ("elements", "ranks", "lengths"),
    [(10, 3, (4, 3, 3)), (4, 4, (1, 1, 1, 1)), (2, 3, (1, 1, 0)), (0, 2, (0, 0))],
)
def test_even_lengths_differ_by_one(elements: int, ranks: int, lengths: tuple[int, ...]) -> None:
    assert even_lengths(elements, ranks) == lengths


def test_pieces_are_views_that_cover_a_vector() -> None:
    vector = np.arange(7, dtype=np.float32)
    pieces = pieces_of(vector, (3, 0, 4))
    assert [piece.tolist() for piece in pieces] == [[0, 1, 2], [], [3, 4, 5, 6]]
    assert all(piece.base is vector for piece in pieces)
    with pytest.raises(ValueError, match="pieces of 6"):
        pieces_of(vector, (3, 3))
    with pytest.raises(ValueError, match="pieces of 7"):
        pieces_of(vector.reshape(7, 1), (3, 4))


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
def test_terms_are_added_in_the_order_of_ranks(rank: int) -> None:
    # (1e8 - 1e8) + 1 + 1 is 2 in that order only: 1e8 + 1 is 1e8 in float32.
    terms = [np.array([value], np.float32) for value in (1e8, -1e8, 1.0, 1.0)]
    own = terms[rank]
    add_by_rank(own, rank, {r: term for r, term in enumerate(terms) if r != rank})
    assert own.tolist() == [2.0]


def test_frames_of_each_operation() -> None:
    lengths = (3, 0, 5)
    reduce = Meeting(operation="reduce", lengths=lengths)
    assert reduce.senders("part", 0) == (1, 2)
    assert reduce.senders("part", 1) == ()  # it owns nothing
    assert reduce.senders("total", 0) == (2,)
    assert reduce.body_bytes("part", sender=1, receiver=2) == 20
    assert reduce.body_bytes("total", sender=0, receiver=2) == 12
    gather = Meeting(operation="gather", lengths=lengths)
    assert gather.senders("slice", 1) == (0, 2)
    assert gather.body_bytes("slice", sender=2, receiver=1) == 20


@pytest.mark.parametrize(
    ("operation", "kind", "sender", "receiver"),
    [
        ("reduce", "slice", 0, 1),
        ("scatter", "total", 0, 1),
        ("gather", "part", 0, 1),
        ("gather", "slice", 2, 1),  # nothing of length 0 is sent
        ("reduce", "part", 1, 1),
    ],
)
def test_frames_that_an_operation_has_not_are_refused(
    operation: Operation, kind: str, sender: int, receiver: int
) -> None:
    meeting = Meeting(operation=operation, lengths=(2, 2, 0))
    with pytest.raises(RemoteProtocolError):
        meeting.body_bytes(kind, sender=sender, receiver=receiver)


@pytest.mark.parametrize("ranks", [2, 3, 4, 7])
@pytest.mark.parametrize("operation", ["reduce", "gather", "scatter"])
def test_bytes_are_those_that_the_planner_predicts(operation: Operation, ranks: int) -> None:
    elements = 4 * ranks * 5
    meeting = Meeting(operation=operation, lengths=even_lengths(elements, ranks))
    sent = sum(
        meeting.body_bytes(kind, sender=0, receiver=other)
        for kind in FRAMES[operation]
        for other in range(1, ranks)
    )
    predicted = all_reduce_bytes if operation == "reduce" else gather_bytes
    assert sent == predicted(4 * elements, ranks)
    assert held_bytes([meeting, meeting], 0) == 2 * sent


@pytest.mark.parametrize("operation", list(FRAMES))
@pytest.mark.parametrize("lengths", [(4, 3, 3), (0, 2, 5, 0), (0, 0), (7,)])
def test_what_is_held_is_every_frame_that_comes(
    operation: Operation, lengths: tuple[int, ...]
) -> None:
    meeting = Meeting(operation=operation, lengths=lengths)
    for rank in range(len(lengths)):
        frames = [
            meeting.body_bytes(kind, sender=sender, receiver=rank)
            for kind in FRAMES[operation]
            for sender in meeting.senders(kind, rank)
        ]
        assert held_bytes([meeting], rank) == sum(frames)
