"""One connection of one kind with one peer: HELLO, then frames until it breaks."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Final

import trio

from p2ptrain import limits
from p2ptrain.errors import InvariantBroken, RemoteProtocolError
from p2ptrain.ids import DeviceId
from p2ptrain.net.tls_link import LinkBroken, LinkStatistics, TlsLink
from p2ptrain.wire import frames
from p2ptrain.wire.codec import decode
from p2ptrain.wire.flows import NO_RUN, Flow, FlowCounter, tensor_flow_kind
from p2ptrain.wire.frames import BulkHeader, FrameType, Prefix, TensorHeader
from p2ptrain.wire.hello import RENEW, Agreement, Hello, encode_hello, parse_hello
from p2ptrain.wire.renewal import Wear, wear

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

_DISCARD_BYTES: Final = 64 * 1024
_NOTHING: Final = LinkStatistics(
    plaintext_bytes_sent=0,
    plaintext_bytes_received=0,
    socket_bytes_sent=0,
    socket_bytes_received=0,
    unsent_bytes=0,
)


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
Work = Callable[[], Awaitable[None]]


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
        self._reading = link
        self._successor: TlsLink | None = None
        self._past = _NOTHING
        self.flows = FlowCounter()
        """Encrypted bytes sent, by what they are for; HELLO and TLS's own belong to none."""
        self._send_lock = trio.Lock()
        self._stirred = trio.Event()
        self.scope = trio.CancelScope()
        """Of the task that reads; cancelling it closes the link."""
        self._queue_in, self._queue_out = trio.open_memory_channel[tuple[Flow, bytes]](
            limits.CONTROL_QUEUE_MAX
        )
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

    def queue_control(self, body: bytes, run: str = NO_RUN) -> bool:
        """Queue an encoded message, which may be of a run; False when the queue is full."""
        if self._queued_bytes + len(body) > limits.CONTROL_QUEUE_BYTES_MAX:
            return False
        try:
            self._queue_in.send_nowait((Flow(run, "control"), body))
        except trio.WouldBlock:
            return False
        self._queued_bytes += len(body)
        return True

    @property
    def queued_bytes(self) -> int:
        """Bytes held here for a peer that has not taken them."""
        return self._queued_bytes + self.statistics().unsent_bytes

    def statistics(self) -> LinkStatistics:
        """Bytes over all links that this connection has had."""
        return _sum([self._past, *(link.statistics() for link in self._alive())])

    def close(self) -> None:
        """Close every link at once."""
        for link in self._alive():
            link.close()

    async def aclose(self) -> None:
        """Close every link with a goodbye."""
        for link in self._alive():
            await link.aclose()

    async def write_control(self) -> None:
        """Send queued messages until the link breaks (LinkBroken)."""
        async for flow, body in self._queue_out:
            self._queued_bytes -= len(body)
            head = frames.encode_frame_head(FrameType.CONTROL, b"", len(body))
            await self._send_frame(flow, head, body)

    async def send_tensor(self, header: TensorHeader, buffers: tuple[ReadableBuffer, ...]) -> None:
        """Send one tensor, before any bulk chunk that waits; cancelling breaks the link."""
        length = sum(memoryview(buffer).nbytes for buffer in buffers)
        head = frames.encode_frame_head(FrameType.TENSOR, frames.encode_header(header), length)
        self._tensors_waiting += 1
        if self._no_tensor_waits.is_set():
            self._no_tensor_waits = trio.Event()
        try:
            await self._send_frame(tensor_flow(header), head, *buffers)
        finally:
            self._tensors_waiting -= 1
            if self._tensors_waiting == 0:
                self._no_tensor_waits.set()

    async def send_bulk(self, header: BulkHeader, chunk: ReadableBuffer, flow: Flow) -> None:
        """Send one chunk once no tensor waits; at most one chunk is ahead of a tensor."""
        length = memoryview(chunk).nbytes
        head = frames.encode_frame_head(FrameType.BULK, frames.encode_header(header), length)
        async with self._bulk_lock:
            while not self._no_tensor_waits.is_set():
                await self._no_tensor_waits.wait()
            await self._send_frame(flow, head, chunk)

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
        reader = BodyReader(self._reading, prefix.body_length)
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
        while await self._reading.recv_frame_start(buffer):
            self._stir_if_worn()
            prefix = frames.parse_prefix(buffer)
            if prefix.type is not FrameType.MOVED:
                return prefix
            await self._follow()
        return None

    async def _receive(self, length: int) -> memoryview:
        buffer = memoryview(bytearray(length))
        await self._reading.recv_exactly(buffer)
        return buffer

    async def _send_frame(self, flow: Flow, *buffers: ReadableBuffer) -> None:
        async with self._send_lock:
            link = self.link
            before = link.encrypted_bytes
            try:
                await link.send_all(*buffers)
            finally:
                self.flows.add(flow, link.encrypted_bytes - before)
        self._stir_if_worn()

    # Renewal, PROTOCOL.md section 3.3: each direction moves to the successor between two frames.

    @property
    def can_renew(self) -> bool:
        """Whether both sides know how."""
        return self.agreement is not None and RENEW in self.agreement.features

    @property
    def settled(self) -> bool:
        """Whether one link carries both directions and no other waits."""
        return self._successor is None

    @property
    def must_follow(self) -> bool:
        """Whether the peer has moved and we have not."""
        return self._reading is self._successor and self.link is not self._successor

    def age_s(self, now: float) -> float:
        """Of the link that is sent on."""
        return now - self.link.made_at_s

    def wear(self, now: float) -> Wear:
        """How used up the link is that is sent on."""
        counts = self.link.statistics()
        carried = max(counts.socket_bytes_sent, counts.socket_bytes_received)
        return wear(age_s=self.age_s(now), carried_bytes=carried)

    def offer_successor(self, link: TlsLink) -> None:
        """Hold ready the link that both sides move to; HELLO was agreed on it."""
        if self._successor is not None:
            raise InvariantBroken("a link is renewed twice at once")
        self._successor = link

    def withdraw_successor(self) -> None:
        """The peer never heard that we took its link."""
        self._successor = None

    async def move(self) -> None:
        """Send everything from here on over the successor, in order; LinkBroken as any send."""
        successor = self._successor
        if successor is None:
            raise InvariantBroken("a link moves to nowhere")
        async with self._send_lock:
            before = self.link
            await before.send_all(frames.encode_frame_head(FrameType.MOVED, b"", 0))
            successor.throughput = before.throughput
            self.link = successor
        await self._retire(before)

    async def wait_stirred(self, longest_s: float) -> None:
        """Wait until the link may be more worn, or the peer has moved."""
        self._stirred = trio.Event()
        with trio.move_on_after(longest_s):
            await self._stirred.wait()

    async def _follow(self) -> None:
        """The peer has moved: read on in the successor."""
        if self._successor is None or self._reading is self._successor:
            raise RemoteProtocolError("a link that moved to nowhere")
        before, self._reading = self._reading, self._successor
        self._stirred.set()
        await self._retire(before)

    async def _retire(self, before: TlsLink) -> None:
        """Close the old link once neither direction uses it."""
        if self.link is self._reading is self._successor:
            self._successor = None
            self._past = _sum([self._past, before.statistics()])
            self._stirred.set()
            await before.aclose()

    def _stir_if_worn(self) -> None:
        if self.wear(trio.current_time()) is not Wear.FRESH:
            self._stirred.set()

    def _alive(self) -> list[TlsLink]:
        links = (self.link, self._reading, self._successor)
        return list({id(link): link for link in links if link is not None}.values())


def tensor_flow(header: TensorHeader) -> Flow:
    """What a tensor's bytes are for."""
    return Flow(header.run, tensor_flow_kind(header.kind, header.phase))


async def read_beside(read: Work, *others: Work) -> None:
    """Read until the peer closes the link, and work beside it; whatever breaks first ends all.

    Raises:
        LinkBroken: the link broke, was not renewed in time, or the peer broke the protocol.
    """
    broken: list[LinkBroken] = []
    async with trio.open_nursery() as nursery:
        for work in others:
            nursery.start_soon(_until_broken, work, nursery.cancel_scope, broken)
        await _until_broken(read, nursery.cancel_scope, broken)
        nursery.cancel_scope.cancel()
    if broken:
        raise broken[0]


async def _until_broken(work: Work, scope: trio.CancelScope, broken: list[LinkBroken]) -> None:
    try:
        await work()
    except LinkBroken as error:
        broken.append(error)
        scope.cancel()
    except RemoteProtocolError as error:
        broken.append(LinkBroken(f"the peer broke the protocol: {error.message}"))
        scope.cancel()


def _sum(counts: Sequence[LinkStatistics]) -> LinkStatistics:
    return LinkStatistics(
        plaintext_bytes_sent=sum(each.plaintext_bytes_sent for each in counts),
        plaintext_bytes_received=sum(each.plaintext_bytes_received for each in counts),
        socket_bytes_sent=sum(each.socket_bytes_sent for each in counts),
        socket_bytes_received=sum(each.socket_bytes_received for each in counts),
        unsent_bytes=sum(each.unsent_bytes for each in counts),
    )


@contextlib.contextmanager
def _in_time(reason: str) -> Iterator[None]:
    """Turn HELLO_TIMEOUT_S into LinkBroken with a reason."""
    try:
        with trio.fail_after(limits.HELLO_TIMEOUT_S):
            yield
    except trio.TooSlowError as error:
        raise LinkBroken(reason) from error
