"""Where the tensors of a run land: boundary tensors straight in the stage's own buffers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

from p2ptrain.engine.contract import Array
from p2ptrain.errors import RemoteProtocolError
from p2ptrain.runtime.signal import Signal
from p2ptrain.training.program import Item
from p2ptrain.wire.frames import TensorHeader

Targets = Callable[[str, int], tuple[Array, ...]]
"""(kind, microbatch) -> the arrays of that tensor, one per port; raises RemoteProtocolError."""

FED_KINDS = ("input", "labels")
FED_AHEAD_MAX = 3
"""Items whose inputs or labels may wait here: the data holder feeds two ahead."""
DISCARD_BYTES = 64 * 1024


class BodyReader(Protocol):
    """Reads exactly the announced body of one frame."""

    async def read_into(self, view: memoryview) -> None:
        """Fill the view from the link."""


async def discard(reader: BodyReader, length: int) -> None:
    """Read and forget a body that nobody waits for."""
    scratch = memoryview(bytearray(min(length, DISCARD_BYTES)))
    while length > 0:
        part = scratch[: min(length, DISCARD_BYTES)]
        await reader.read_into(part)
        length -= len(part)


class TensorInbox:
    """Receives the tensors of one run.

    Inputs and labels (`fed`) are kept until their item comes. A boundary tensor for a later item
    waits for that item and holds up only its own data link; that cannot deadlock, because its
    sender begins an item only when the one before needs nothing more from it (PROTOCOL.md
    section 6.2).
    """

    def __init__(self, signal: Signal, *, fed_shape: tuple[int, int]) -> None:
        self._signal = signal
        self._fed_shape = fed_shape
        self._fed: dict[tuple[str, int], dict[tuple[str, int], Array]] = {}
        self._item: Item | None = None
        self._targets: Targets | None = None
        self._arrived: dict[tuple[str, int], set[int]] = {}
        self._closed = False

    def open(self, item: Item, targets: Targets) -> None:
        """Accept the boundary tensors of `item`; what belongs to earlier items is forgotten."""
        if self._item is not None:
            self._fed.pop((self._item.kind, self._item.step), None)
        self._item, self._targets, self._arrived = item, targets, {}
        self._signal.notify()

    def close(self) -> None:
        """Accept nothing more; tensors that wait or come later are discarded."""
        self._closed = True
        self._signal.notify()

    def begun(self) -> bool:
        """Whether anything of the open item has arrived."""
        return bool(self._arrived) or (
            self._item is not None and (self._item.kind, self._item.step) in self._fed
        )

    def arrived(self, kind: str, microbatch: int, ports: int) -> bool:
        """Whether all ports of one boundary tensor of the open item are in their buffers."""
        return len(self._arrived.get((kind, microbatch), ())) >= ports

    def fed(self, kind: str, microbatch: int) -> Array | None:
        """Inputs or labels of the open item, int64 (microbatch size, context), or None yet."""
        if self._item is None:
            return None
        fed = self._fed.get((self._item.kind, self._item.step), {})
        return fed.get((kind, microbatch))

    async def receive(self, header: TensorHeader, length: int, reader: BodyReader) -> None:
        """Take one frame off a data link.

        Raises:
            RemoteProtocolError: a tensor that the plan does not predict; the link is closed.
        """
        if header.kind in FED_KINDS and not self._closed:
            array = self._expect_fed(header, length)
            await reader.read_into(array.data.cast("B"))
            self._keep_fed(header, array)
            return
        await self._signal.wait_until(lambda: self._closed or self._is_open(header))
        if self._closed:
            await discard(reader, length)
            return
        target = self._target(header, length)
        if target is not None:
            await reader.read_into(target.data.cast("B"))
        self._arrived.setdefault((header.kind, header.microbatch), set()).add(header.index)
        self._signal.notify()

    def deliver(self, header: TensorHeader, array: Array) -> None:
        """Take inputs or labels from this very peer; the same rules as from a link."""
        if not self._closed:
            expected = self._expect_fed(header, array.nbytes)
            np.copyto(expected, array)
            self._keep_fed(header, expected)

    def _expect_fed(self, header: TensorHeader, length: int) -> Array:
        item = (header.phase, header.step)
        ahead = len(self._fed.keys() | {item}) > FED_AHEAD_MAX
        if ahead or (header.kind, header.microbatch) in self._fed.get(item, {}):
            raise RemoteProtocolError(f"{header.kind} for step {header.step} came out of turn")
        array = np.empty(self._fed_shape, dtype=np.int64)
        if array.nbytes != length:
            raise RemoteProtocolError(f"{header.kind} of {length} bytes, not {array.nbytes}")
        return array

    def _keep_fed(self, header: TensorHeader, array: Array) -> None:
        fed = self._fed.setdefault((header.phase, header.step), {})
        fed[header.kind, header.microbatch] = array
        self._signal.notify()

    def _is_open(self, header: TensorHeader) -> bool:
        item = self._item
        return item is not None and (item.kind, item.step) == (header.phase, header.step)

    def _target(self, header: TensorHeader, length: int) -> Array | None:
        targets = self._targets(header.kind, header.microbatch) if self._targets else ()
        if header.index in self._arrived.get((header.kind, header.microbatch), ()):
            raise RemoteProtocolError(f"{header.kind} {header.microbatch} came twice")
        if not targets and length == 0 and header.index == 0:
            return None
        if not 0 <= header.index < len(targets) or targets[header.index].nbytes != length:
            raise RemoteProtocolError(f"{header.kind} of {length} bytes, not what the plan says")
        return targets[header.index]
