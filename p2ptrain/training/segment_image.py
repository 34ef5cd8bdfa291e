"""The file of one segment's state in one buffer, whose values are filled in place.

A snapshot is then one copy of the stage's memory: nothing is gathered, serialised or joined
afterwards, and what is hashed, sent and stored is the buffer itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np

from p2ptrain.bundle.manifest import Manifest
from p2ptrain.ids import Digest
from p2ptrain.training.contract import Contract
from p2ptrain.training.safetensors import read_layout
from p2ptrain.training.segment_state import (
    SegmentState,
    StateHeader,
    segment_head,
    state_view,
    values_bytes,
)


class SegmentImage:
    """One segment's file: the header is complete, `state` holds anything until it is filled."""

    def __init__(
        self,
        manifest: Manifest,
        header: StateHeader,
        state_names: tuple[str, ...],
        contract: Contract | None = None,
        slices: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        """Args: contract: Of the run; None: without residuals. slices: Of a shard, the shapes of
        what it has of tensors, by name."""
        head = segment_head(manifest, header, state_names, contract, slices)
        size = len(head) + values_bytes(manifest, header.segment, state_names, contract, slices)
        self._buffer = np.empty(size, np.uint8)
        self._buffer[: len(head)] = np.frombuffer(head, np.uint8)
        self._start = len(head)
        self.header = header
        places = read_layout(self._buffer.data).places
        self.state: SegmentState = state_view(
            {
                name: self._buffer[place.start : place.start + place.nbytes]
                .view(place.dtype)
                .reshape(place.shape)
                for name, place in places.items()
            },
            step=header.step,
            state_names=state_names,
        )
        """Writable views into the buffer."""

    @property
    def content(self) -> memoryview:
        """The whole file, read only; it must not be filled again once it is handed out."""
        return self._buffer.data.toreadonly()

    @property
    def values(self) -> memoryview:
        """The file without its head, as `content`."""
        return self.content[self._start :]

    def state_digest(self) -> Digest:
        """As `SegmentState.digest`: the values lie in its order, without gaps."""
        return Digest(hashlib.sha256(self.values).hexdigest())
