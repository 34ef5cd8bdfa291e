"""What the peers of one stage do together with one value of each: the arithmetic of collectives.

A *meeting* is one collective of one item. Three operations, as `bundle.sharding.Collective`:

- reduce: all get the sum. The value is a flat vector, cut into one piece for each rank. Each rank
  sends each other one the piece that that one owns (a `part`); the owner adds all of them and its
  own in rank order, and sends the sum to the others (a `total`).
- scatter: each gets its piece of the sum: the `part`s alone.
- gather: all get everybody's pieces, which may differ in length: each sends its own (a `slice`).

Not a ring: the members of a view are all linked with each other. A peer sends 2 (n - 1) / n of a
reduced vector, as in a ring, but in two hops. Additions follow the ranks, never arrival, so the
bits depend neither on time nor on who owns which piece.

Replicas reduce the gradients of each segment: key (microbatch 0, segment, index 0), pieces of
`even_lengths`. Shards have a meeting for each collective of each microbatch: `index` numbers the
collectives of a segment's forward parts and then of its backward parts; pieces are the values'
slices along the collective's axis, which the caller cuts contiguous before and puts side by side
afterwards. `runtime.exchange.meeting` does what is decided here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from p2ptrain.bundle.manifest import Manifest
from p2ptrain.errors import RemoteProtocolError
from p2ptrain.training.layout import flat_layout

Array = NDArray[np.float32]
Operation = Literal["reduce", "gather", "scatter"]
FRAMES: Final[Mapping[Operation, tuple[str, ...]]] = {
    "reduce": ("part", "total"),
    "scatter": ("part",),
    "gather": ("slice",),
}
"""What each operation's frames are called on the wire."""
FRAME_KINDS: Final = ("part", "total", "slice")
ELEMENT_BYTES: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class MeetingKey:
    """Names one meeting within an item, equally at every rank."""

    microbatch: int
    segment: int
    index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Meeting:
    """What one meeting does; all values are float32."""

    operation: Operation
    lengths: tuple[int, ...]
    """Elements of every rank's piece, by rank; those of length 0 are not sent."""

    def body_bytes(self, kind: str, *, sender: int, receiver: int) -> int:
        """The size of one frame of it.

        Raises:
            RemoteProtocolError: there is no such frame in this meeting; close the link.
        """
        piece = receiver if kind == "part" else sender
        if kind not in FRAMES[self.operation] or self.lengths[piece] == 0 or sender == receiver:
            raise RemoteProtocolError(f"a {kind} in a {self.operation} that has none")
        return self.lengths[piece] * ELEMENT_BYTES

    def senders(self, kind: str, rank: int) -> tuple[int, ...]:
        """Ranks from which `rank` gets a frame of this kind."""
        others = (other for other in range(len(self.lengths)) if other != rank)
        return tuple(o for o in others if self.lengths[rank if kind == "part" else o] > 0)


def even_lengths(elements: int, ranks: int) -> tuple[int, ...]:
    """A vector's pieces by rank, as equal as can be; the first ones are the longer ones."""
    shortest, more = divmod(elements, ranks)
    return tuple(shortest + (rank < more) for rank in range(ranks))


def pieces_of(vector: Array, lengths: Sequence[int]) -> tuple[Array, ...]:
    """Views of a flat vector's pieces, by rank; ValueError when the lengths do not cover it."""
    if vector.ndim != 1 or vector.size != sum(lengths):
        raise ValueError(f"pieces of {sum(lengths)} elements, not of {vector.shape}")
    ends = [sum(lengths[: rank + 1]) for rank in range(len(lengths))]
    return tuple(vector[end - n : end] for end, n in zip(ends, lengths, strict=True))


def add_by_rank(own: Array, rank: int, others: Mapping[int, Array]) -> None:
    """Replace a piece by everybody's sum, added in the order of the ranks.

    Args:
        own: This rank's term, which becomes the sum.
        rank: This one.
        others: The terms of all other ranks; they are overwritten.
    """
    terms = {**others, rank: own}
    total, *rest = (terms[each] for each in range(len(terms)))
    for term in rest:
        np.add(total, term, out=total)
    if total is not own:
        np.copyto(own, total)


def gradient_meetings(manifest: Manifest, segments: range, ranks: int) -> dict[MeetingKey, Meeting]:
    """What so many replicas of these segments do once per step."""
    return {
        MeetingKey(microbatch=0, segment=segment, index=0): Meeting(
            operation="reduce", lengths=even_lengths(flat_layout(manifest, segment).length, ranks)
        )
        for segment in segments
    }


def held_bytes(meetings: Sequence[Meeting], rank: int) -> int:
    """What all frames of these meetings take at one rank if they come before it takes any."""
    return ELEMENT_BYTES * sum(
        meeting.lengths[rank] * (len(meeting.lengths) - 1)
        if kind == "part"
        else sum(meeting.lengths) - meeting.lengths[rank]
        for meeting in meetings
        for kind in FRAMES[meeting.operation]
    )
