"""Content-addressed blobs between members: bundles, checkpoints. Hash in, hash out."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final

import trio

from p2ptrain import limits
from p2ptrain.errors import PeerLost, RemoteProtocolError
from p2ptrain.ids import DeviceId, Digest
from p2ptrain.training.messages import BlobMissing, BlobRequest
from p2ptrain.wire.flows import NO_RUN, Flow
from p2ptrain.wire.frames import BulkHeader


def blob_digest(content: bytes | memoryview) -> Digest:
    """The name of a blob: its sha256."""
    return Digest(hashlib.sha256(content).hexdigest())


Content = bytes | memoryview
Write = Callable[[bytes], object]
Source = Callable[[Digest], Awaitable[bytes | None]]
"""Reads a blob that is in no memory when it is asked for; None: it is not one of its own."""


@dataclass(slots=True)
class _Fetch:
    device: DeviceId
    digest: Digest
    size: int
    write: Write
    received: int = 0
    hash: hashlib._Hash = field(default_factory=hashlib.sha256)
    done: trio.Event = field(default_factory=trio.Event)
    failure: Exception | None = None

    def fail(self, failure: Exception) -> None:
        self.failure = failure
        self.done.set()


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobStatistics:
    """Blobs of this peer now."""

    published_count: int
    published_bytes: int
    fetch_count: int


SendBulk = Callable[[DeviceId, BulkHeader, memoryview, Flow], Awaitable[None]]
_MODEL: Final = Flow(NO_RUN, "bundle")


class BlobExchange:
    """Serves the blobs this peer has published and fetches those of others.

    A fetch takes exactly the size that the requester was told beforehand, checks each chunk's
    place and hash, and the whole hash at the end.
    """

    def __init__(self, *, send: Callable[[DeviceId, object], None], send_bulk: SendBulk) -> None:
        self._send = send
        self._send_bulk = send_bulk
        self._published: dict[Digest, tuple[Content, Flow]] = {}
        self._offers: Counter[Digest] = Counter()
        self._sources: dict[Source, Flow] = {}
        self._reads = trio.CapacityLimiter(limits.BLOBS_READ_AT_ONCE_MAX)
        self._fetches: dict[int, _Fetch] = {}
        self._requests = itertools.count(1)
        self._serving: Counter[DeviceId] = Counter()

    def publish(
        self, content: Content, *, digest: Digest | None = None, flow: Flow = _MODEL
    ) -> Digest:
        """Offer a blob to every member until it is withdrawn as often as it was published.

        Args:
            content: May be a view of a mapped file, which is read as it is sent.
            digest: Where it is known; nothing is read here then, and who fetches checks it.
            flow: What its bytes are counted as.
        """
        digest = blob_digest(content) if digest is None else digest
        self._published[digest] = content, flow
        self._offers[digest] += 1
        return digest

    def withdraw(self, digest: Digest) -> None:
        """Take back one `publish`; an unknown blob is no error."""
        self._offers[digest] -= 1
        if self._offers[digest] <= 0:
            del self._offers[digest]
            self._published.pop(digest, None)

    def add_source(self, source: Source, flow: Flow = _MODEL) -> None:
        """Offer blobs that are read when they are asked for, one at a time for each request."""
        self._sources[source] = flow

    def remove_source(self, source: Source) -> None:
        """Take back an `add_source`."""
        del self._sources[source]

    def published(self, digest: Digest) -> Content | None:
        """A blob of ours."""
        found = self._published.get(digest)
        return None if found is None else found[0]

    def statistics(self) -> BlobStatistics:
        """What is offered and under way now."""
        return BlobStatistics(
            published_count=len(self._published),
            published_bytes=sum(len(content) for content, _ in self._published.values()),
            fetch_count=len(self._fetches),
        )

    async def fetch(self, device: DeviceId, digest: Digest, *, size: int) -> bytes:
        """Get a blob of exactly `size` bytes from a member, or from ourselves.

        Raises:
            PeerLost: it does not have the blob, went away, or took longer than the limit.
            RemoteProtocolError: what came is not what the digest names, or no blob is that long.
        """
        own = self.published(digest)
        if own is not None:
            await trio.lowlevel.checkpoint()
            return bytes(own)
        content = bytearray()
        await self.fetch_into(device, digest, size=size, write=content.extend)
        return bytes(content)

    async def fetch_into(
        self, device: DeviceId, digest: Digest, *, size: int, write: Write
    ) -> None:
        """Get a blob that need not fit into memory: `write` takes it chunk by chunk, in order.

        What was written is the blob only when this returns.

        Raises:
            PeerLost, RemoteProtocolError: as `fetch`.
            OSError: what `write` raised.
        """
        if not 0 <= size <= limits.BLOB_BYTES_MAX:
            raise RemoteProtocolError(f"{device[:8]} announced a blob of {size} bytes")
        own = self.published(digest)
        if own is not None:  # no link leads to ourselves
            await trio.lowlevel.checkpoint()
            view, step = memoryview(own), limits.BULK_CHUNK_BYTES_MAX
            for offset in range(0, len(view), step):
                write(bytes(view[offset : offset + step]))
            return
        request = next(self._requests)
        fetch = _Fetch(device=device, digest=digest, size=size, write=write)
        self._fetches[request] = fetch
        try:
            self._send(device, BlobRequest(request=request, digest=digest))
            await _wait_progressing(fetch)
        finally:
            del self._fetches[request]
        if fetch.failure is not None:
            raise fetch.failure
        if fetch.hash.hexdigest() != digest:
            raise RemoteProtocolError(f"a blob from {device[:8]} does not match its digest")

    async def serve(self, device: DeviceId, request: BlobRequest) -> None:
        """Answer a request; the caller runs this in a task of its own.

        A member that takes nothing while it asks for more gets a refusal beyond BLOBS_SERVED_MAX.
        """
        await trio.lowlevel.checkpoint()
        if self._serving[device] >= limits.BLOBS_SERVED_MAX:
            self._send(device, BlobMissing(request=request.request))
            return
        self._serving[device] += 1
        try:
            found = self._published.get(request.digest)
            if found is not None:
                await self._serve_chunks(device, request, *found)
            else:
                await self._serve_read(device, request)
        finally:
            self._serving[device] -= 1

    async def _serve_chunks(
        self, device: DeviceId, request: BlobRequest, content: Content, flow: Flow
    ) -> None:
        view, step = memoryview(content), limits.BULK_CHUNK_BYTES_MAX
        for offset in range(0, max(len(view), 1), step):
            chunk = view[offset : offset + step]
            header = BulkHeader(
                request=request.request,
                kind="blob",
                digest=request.digest,
                offset=offset,
                total=len(view),
                chunk=blob_digest(chunk),
            )
            await self._send_bulk(device, header, chunk, flow)

    async def _serve_read(self, device: DeviceId, request: BlobRequest) -> None:
        """Serve what a source reads; few at a time, since it is in memory until it is sent."""
        async with self._reads:
            for source, flow in tuple(self._sources.items()):
                content = await source(request.digest)
                if content is not None:
                    await self._serve_chunks(device, request, content, flow)
                    return
        self._send(device, BlobMissing(request=request.request))

    def missing(self, device: DeviceId, message: BlobMissing) -> None:
        """A member says that it does not have what we asked for."""
        fetch = self._fetches.get(message.request)
        if fetch is not None and fetch.device == device:
            fetch.fail(PeerLost(f"{device[:8]} no longer has blob {fetch.digest[:12]}"))

    def chunk_received(self, device: DeviceId, header: BulkHeader, chunk: bytes) -> None:
        """A chunk came off a data link, already checked against its own hash.

        Raises:
            RemoteProtocolError: it does not continue what we asked for; the link is closed.
        """
        fetch = self._fetches.get(header.request)
        if fetch is None or fetch.device != device or fetch.failure is not None:
            return  # a fetch that we gave up
        fits = header.offset == fetch.received and header.offset + len(chunk) <= fetch.size
        if header.digest != fetch.digest or header.total != fetch.size or not fits:
            raise RemoteProtocolError("a blob chunk that does not continue the blob")
        try:
            fetch.write(chunk)
        except OSError as error:  # ours, not the sender's: its link stays
            fetch.fail(error)
            return
        fetch.hash.update(chunk)
        fetch.received += len(chunk)
        if fetch.received == fetch.size:
            fetch.done.set()

    def peer_down(self, device: DeviceId) -> None:
        """Fail every fetch from a member that is gone."""
        for fetch in self._fetches.values():
            if fetch.device == device:
                fetch.fail(PeerLost(f"{device[:8]} went away during a transfer"))


async def _wait_progressing(fetch: _Fetch) -> None:
    """Wait for the end of a fetch as long as something keeps arriving."""
    while not fetch.done.is_set():
        before = fetch.received
        with trio.move_on_after(limits.BLOB_TIMEOUT_S):
            await fetch.done.wait()
        if not fetch.done.is_set() and fetch.received == before:
            silence = f"{limits.BLOB_TIMEOUT_S:.0f} s"
            raise PeerLost(f"a transfer from {fetch.device[:8]} stood still for {silence}")


async def serve_blob(blobs: BlobExchange, device: DeviceId, request: BlobRequest) -> None:
    """Answer a request in a task of its own; a device that went away needs no answer."""
    with contextlib.suppress(PeerLost):
        await blobs.serve(device, request)
