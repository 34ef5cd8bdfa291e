"""Where the tensors of a run land: boundary tensors straight in the stage's own buffers."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import trio

from p2ptrain.engine.contract import Array
from p2ptrain.errors import RemoteProtocolError
from p2ptrain.ids import DeviceId
from p2ptrain.runtime.exchange.bodies import BodyReader, discard
from p2ptrain.runtime.exchange.meeting import Meetings
from p2ptrain.runtime.signal import Signal
from p2ptrain.training.arrivals import Arrivals, TieKey
from p2ptrain.training.collectives import FRAME_KINDS
from p2ptrain.training.program import Item
from p2ptrain.training.tensor_codec import decode, encoded_bytes
from p2ptrain.wire.frames import TensorHeader

Targets = Callable[[str, int], tuple[Array, ...]]
"""(kind, microbatch) -> the arrays of that tensor, one per port; raises RemoteProtocolError."""

FED_KINDS = ("input", "labels")
LOSS_WEIGHT_INDEX = 1
"""Of the two values of `labels`."""
FED_AHEAD_MAX = 3
"""Items whose inputs or labels may wait here: the data holder feeds two ahead."""
DECODED_IN_PLACE_BYTES = 256 * 1024
"""Less than this is decoded at once (0.1 ms), more in a thread."""


class TensorInbox:
    """Receives the tensors of one run.

    Inputs and labels (`fed`) are kept until their item comes. Any other tensor of a later item
    waits for that item and holds up only its own data link; that cannot deadlock, because its
    sender begins an item only when the one before needs nothing more from it (PROTOCOL.md
    section 6.3). Tied gradients of the open item have their own buffers, made once; what peers of
    the stage bring together goes to their meetings.
    """

    def __init__(
        self, signal: Signal, *, arrivals: Arrivals, meetings: Meetings | None = None
    ) -> None:
        self._signal = signal
        self._arrivals, self._meetings = arrivals, meetings
        self._fed: dict[tuple[str, int], dict[tuple[str, int], dict[int, Array]]] = {}
        self._item: Item | None = None
        self._targets: Targets | None = None
        self._has_room: Callable[[int], bool] = lambda _: True
        self._arrived: dict[tuple[str, int], set[int]] = {}
        self._tied: dict[TieKey, Array] = {}
        self._tied_arrived: set[TieKey] = set()
        self._closed = False

    def open(
        self, item: Item, targets: Targets, has_room: Callable[[int], bool] = lambda _: True
    ) -> None:
        """Accept the tensors of `item`; what belongs to earlier items is forgotten.

        `has_room`: whether the buffers of a microbatch are free; a boundary tensor waits until
        they are. What frees them are microbatches before it, whose tensors came before it.
        """
        if self._item is not None:
            self._fed.pop((self._item.kind, self._item.step), None)
        self._item, self._targets, self._arrived = item, targets, {}
        self._has_room = has_room
        self._tied_arrived.clear()
        if self._meetings is not None:
            self._meetings.open(item.kind)
        self._signal.notify()

    def close(self) -> None:
        """Accept nothing more; tensors that wait or come later are discarded."""
        self._closed = True
        self._signal.notify()

    def begun(self) -> bool:
        """Whether anything of the open item has arrived."""
        if self._meetings is not None and self._meetings.begun:
            return True
        return bool(self._arrived) or (
            self._item is not None and (self._item.kind, self._item.step) in self._fed
        )

    def arrived(self, kind: str, microbatch: int, ports: int) -> bool:
        """Whether all ports of one boundary tensor of the open item are in their buffers."""
        return len(self._arrived.get((kind, microbatch), ())) >= ports

    def fed(self, kind: str, microbatch: int) -> tuple[Array, ...] | None:
        """All inputs, or labels and loss weight, of a microbatch of the open item; None before
        the last of them has arrived."""
        if self._item is None:
            return None
        fed = self._fed.get((self._item.kind, self._item.step), {})
        values = fed.get((kind, microbatch), {})
        count = len(self._arrivals.fed.get(kind, ()))
        return tuple(values[index] for index in range(count)) if len(values) == count else None

    def tied(self) -> dict[TieKey, Array] | None:
        """The tied gradients of the open item from all other stages; None before the last has
        arrived. They are overwritten in the next item."""
        return dict(self._tied) if self._tied_arrived == set(self._arrivals.tied) else None

    async def receive(
        self, sender: DeviceId, header: TensorHeader, length: int, reader: BodyReader
    ) -> None:
        """Take one frame off the data link with its sender.

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
        if header.kind == "tied":
            await self._receive_tied(header, length, reader)
            return
        if header.kind in FRAME_KINDS:
            if self._meetings is None:
                raise RemoteProtocolError(f"a {header.kind} for a peer that runs its stage alone")
            await self._meetings.receive(sender, header, length, reader)
            return
        await self._signal.wait_until(lambda: self._closed or self._has_room(header.microbatch))
        if self._closed:
            await discard(reader, length)
            return
        target = self._target(header, length)
        if target is not None:
            await self._fill(target, length, reader)
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
        came = self._fed.get(item, {}).get((header.kind, header.microbatch), {})
        if ahead or header.index in came:
            raise RemoteProtocolError(f"{header.kind} for step {header.step} came out of turn")
        values = self._arrivals.fed.get(header.kind, ())
        ours = self._arrivals.microbatches[header.phase]
        if not 0 <= header.index < len(values) or header.microbatch not in ours:
            raise RemoteProtocolError(f"{header.kind} that this stage does not expect")
        value = values[header.index]
        size = math.prod(value.shape) * np.dtype(value.dtype).itemsize
        if size != length:
            raise RemoteProtocolError(f"{header.kind} of {length} bytes, not {size}")
        return np.empty(value.shape, value.dtype)

    def _keep_fed(self, header: TensorHeader, array: Array) -> None:
        if header.kind == "labels" and header.index == LOSS_WEIGHT_INDEX:
            _check_weight(float(array[0]))
        fed = self._fed.setdefault((header.phase, header.step), {})
        fed.setdefault((header.kind, header.microbatch), {})[header.index] = array
        self._signal.notify()

    async def _receive_tied(self, header: TensorHeader, length: int, reader: BodyReader) -> None:
        key = TieKey(segment=header.segment, tensor_index=header.index)
        shape = self._arrivals.tied.get(key)
        if shape is None or header.phase != "train" or header.microbatch != 0:
            raise RemoteProtocolError("a tied gradient that this stage does not expect")
        if key in self._tied_arrived:
            raise RemoteProtocolError(f"the tied gradient of tensor {header.index} came twice")
        if length != math.prod(shape) * np.dtype(np.float32).itemsize:
            raise RemoteProtocolError(f"a tied gradient of {length} bytes for shape {shape}")
        buffer = self._tied.get(key)
        if buffer is None:
            buffer = self._tied[key] = np.empty(shape, np.float32)
        await reader.read_into(buffer.data.cast("B"))
        self._tied_arrived.add(key)
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
        if not 0 <= header.index < len(targets) or self._size(targets[header.index]) != length:
            raise RemoteProtocolError(f"{header.kind} of {length} bytes, not what the plan says")
        return targets[header.index]

    def _size(self, target: Array) -> int:
        return encoded_bytes(self._arrivals.codec, dtype=target.dtype.name, elements=target.size)

    async def _fill(self, target: Array, length: int, reader: BodyReader) -> None:
        """Read a boundary tensor into the stage's buffer, decoded where it is compressed."""
        if target.nbytes == length:
            await reader.read_into(target.data.cast("B"))
            return
        encoded = np.empty(length, np.uint8)
        await reader.read_into(encoded.data)
        if length < DECODED_IN_PLACE_BYTES:
            decode(self._arrivals.codec, encoded, target)
        else:
            await trio.to_thread.run_sync(decode, self._arrivals.codec, encoded, target)


def _check_weight(weight: float) -> None:
    """RemoteProtocolError for what cannot be one over a count."""
    if not (math.isfinite(weight) and 0.0 < weight <= 1.0):
        raise RemoteProtocolError(f"a loss weight of {weight}")
