"""One connection of one kind with one peer: HELLO, then frames until it breaks."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Final

import trio

from p2ptrain import limits
from p2ptrain.errors import InvariantBroken, RemoteProtocolError
from p2ptrain.ids import DeviceId
from p2ptrain.net.tls_link import LinkBroken, TlsLink
from p2ptrain.wire import frames
from p2ptrain.wire.codec import decode
from p2ptrain.wire.frames import BulkHeader, FrameType, Prefix, TensorHeader
from p2ptrain.wire.hello import Agreement, Hello, encode_hello, parse_hello

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

_DISCARD_BYTES: Final = 64 * 1024


class BodyReader:
    """Reads one frame's body; the handler takes exactly all of it."""

    def __init__(self, link: TlsLink, length: int) -> None:
        self._link = link
        self.remaining = length
        """Bytes not yet read."""

    async def read_into(self, *targets: WriteableBuffer) -> None:
        """Fill the buffers, in order; cancelling breaks the link.

        Raises:
            RemoteProtocolError: they hold more than the body has; let it through.
            LinkBroken: the link ended; let it through.
        """
        for target in targets:
            view = memoryview(target).cast("B")
            if len(view) > self.remaining:
                raise RemoteProtocolError("a tensor is shorter than it must be")
            await self._link.recv_exactly(view)
            self.remaining -= len(view)

    async def discard(self) -> None:
        """Read the rest and forget it: a tensor of another view."""
        scratch = memoryview(bytearray(min(_DISCARD_BYTES, self.remaining)))
        while self.remaining:
            await self.read_into(scratch[: self.remaining])


OnTensor = Callable[[DeviceId, TensorHeader, int, BodyReader], Awaitable[None]]
OnBulk = Callable[[DeviceId, BulkHeader, bytes], Awaitable[None]]
OnMessage = Callable[[DeviceId, object], Awaitable[None]]


class Connection:
    """An authenticated link of one kind with `device`; not up before HELLO was agreed."""

    def __init__(self, link: TlsLink, *, device: DeviceId, kind: str, dialled_here: bool) -> None:
        self.link = link
        self.device = device
        self.kind = kind
        self.dialled_here = dialled_here
        self.hello: Hello | None = None
        """What the peer said."""
        self.agreement: Agreement | None = None
        """What both sides speak."""
        self.clock_ahead_s = 0.0
        """How far the peer's wall clock was ahead of ours at HELLO."""
        self.address = ""
        """host:port where the peer listens, as far as we know."""
        self.ready = False
        self.scope = trio.CancelScope()
        """Of the task that reads; cancelling it closes the link."""
        self._queue_in, self._queue_out = trio.open_memory_channel[bytes](limits.CONTROL_QUEUE_MAX)
        self._queued_bytes = 0
        self._tensors_waiting = 0
        self._no_tensor_waits = trio.Event()
        self._no_tensor_waits.set()
        self._bulk_lock = trio.Lock()

    async def send_hello(self, hello: Hello) -> None:
        """Send HELLO; LinkBroken when the link ended."""
        body = encode_hello(hello)
        head = frames.encode_frame_head(FrameType.HELLO, b"", len(body))
        with _in_time("the peer takes no HELLO"):
            await self.link.send_all(head, body)

    async def receive_hello(self) -> Hello:
        """Read the peer's HELLO.

        Raises:
            LinkBroken: the link ended, or nothing came in time.
            RemoteProtocolError: something else came.
        """
        with _in_time("the peer did not say HELLO"):
            prefix = await self._receive_prefix()
            if prefix is None:
                raise LinkBroken("the peer closed the link before HELLO", closed_by_peer=True)
            if prefix.type is not FrameType.HELLO:
                raise RemoteProtocolError(f"a {prefix.type.name} frame before HELLO")
            hello = parse_hello(await self._receive(prefix.body_length))
        self.hello = hello
        self.clock_ahead_s = hello.clock_s - time.time()
        return hello

    def queue_control(self, body: bytes) -> bool:
        """Queue an encoded message for sending; False when the queue is full."""
        if self._queued_bytes + len(body) > limits.CONTROL_QUEUE_BYTES_MAX:
            return False
        try:
            self._queue_in.send_nowait(body)
        except trio.WouldBlock:
            return False
        self._queued_bytes += len(body)
        return True

    @property
    def queued_bytes(self) -> int:
        """Bytes held here for a peer that has not taken them."""
        return self._queued_bytes + self.link.statistics().unsent_bytes

    async def write_control(self) -> None:
        """Send queued messages until the link breaks (LinkBroken)."""
        async for body in self._queue_out:
            self._queued_bytes -= len(body)
            head = frames.encode_frame_head(FrameType.CONTROL, b"", len(body))
            await self.link.send_all(head, body)

    async def send_tensor(self, header: TensorHeader, buffers: tuple[ReadableBuffer, ...]) -> None:
        """Send one tensor, before any bulk chunk that waits; cancelling breaks the link."""
        length = sum(memoryview(buffer).nbytes for buffer in buffers)
        head = frames.encode_frame_head(FrameType.TENSOR, frames.encode_header(header), length)
        self._tensors_waiting += 1
        if self._no_tensor_waits.is_set():
            self._no_tensor_waits = trio.Event()
        try:
            await self.link.send_all(head, *buffers)
        finally:
            self._tensors_waiting -= 1
            if self._tensors_waiting == 0:
                self._no_tensor_waits.set()

    async def send_bulk(self, header: BulkHeader, chunk: ReadableBuffer) -> None:
        """Send one chunk once no tensor waits; at most one chunk is ahead of a tensor."""
        length = memoryview(chunk).nbytes
        head = frames.encode_frame_head(FrameType.BULK, frames.encode_header(header), length)
        async with self._bulk_lock:
            while not self._no_tensor_waits.is_set():
                await self._no_tensor_waits.wait()
            await self.link.send_all(head, chunk)

    async def read_control(self, on_message: OnMessage) -> None:
        """Decode messages for `on_message` until the peer closes the link.

        Raises:
            LinkBroken, RemoteProtocolError: the link is not usable any more.
        """
        while (prefix := await self._receive_prefix()) is not None:
            if prefix.type is not FrameType.CONTROL:
                raise RemoteProtocolError(f"a {prefix.type.name} frame on a control link")
            message = decode(await self._receive(prefix.body_length))
            await on_message(self.device, message)

    async def read_data(self, on_tensor: OnTensor, on_bulk: OnBulk) -> None:
        """Hand tensors and chunks to their handlers until the peer closes the link.

        Raises:
            LinkBroken, RemoteProtocolError: the link is not usable any more.
        """
        while (prefix := await self._receive_prefix()) is not None:
            if prefix.type is FrameType.TENSOR:
                await self._receive_tensor(prefix, on_tensor)
            elif prefix.type is FrameType.BULK:
                await self._receive_bulk(prefix, on_bulk)
            else:
                raise RemoteProtocolError(f"a {prefix.type.name} frame on a data link")

    async def _receive_tensor(self, prefix: Prefix, on_tensor: OnTensor) -> None:
        encoded = await self._receive(prefix.header_length)
        header = frames.parse_tensor_header(encoded, body_length=prefix.body_length)
        reader = BodyReader(self.link, prefix.body_length)
        await on_tensor(self.device, header, prefix.body_length, reader)
        if reader.remaining:
            raise InvariantBroken("a tensor handler left part of the body unread")

    async def _receive_bulk(self, prefix: Prefix, on_bulk: OnBulk) -> None:
        encoded = await self._receive(prefix.header_length)
        header = frames.parse_bulk_header(encoded, body_length=prefix.body_length)
        chunk = await self._receive(prefix.body_length)
        frames.check_chunk(header, chunk)
        await on_bulk(self.device, header, bytes(chunk))

    async def _receive_prefix(self) -> Prefix | None:
        buffer = memoryview(bytearray(frames.PREFIX_BYTES))
        if not await self.link.recv_frame_start(buffer):
            return None
        return frames.parse_prefix(buffer)

    async def _receive(self, length: int) -> memoryview:
        buffer = memoryview(bytearray(length))
        await self.link.recv_exactly(buffer)
        return buffer


@contextlib.contextmanager
def _in_time(reason: str) -> Iterator[None]:
    """Turn HELLO_TIMEOUT_S into LinkBroken with a reason."""
    try:
        with trio.fail_after(limits.HELLO_TIMEOUT_S):
            yield
    except trio.TooSlowError as error:
        raise LinkBroken(reason) from error
