"""Blobs between members: whole and as named, or an error that says why."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
from functools import partial

import numpy as np
import pytest
import trio
import trio.testing
from trio.testing import MockClock

from p2ptrain import limits
from p2ptrain.errors import PeerLost, RemoteProtocolError
from p2ptrain.ids import DeviceId, Digest
from p2ptrain.runtime.exchange.blobs import BlobExchange, blob_digest
from p2ptrain.training.messages import BlobMissing, BlobRequest
from p2ptrain.wire.flows import Flow
from p2ptrain.wire.frames import BulkHeader
from tests.sim.plans import device

ME, OTHER, THIRD = device(0), device(1), device(2)


class Wire:
    """What a blob exchange sends, kept; `fail` breaks the link."""

    def __init__(self) -> None:
        self.sent: list[tuple[DeviceId, object]] = []
        self.chunks: list[tuple[BulkHeader, bytes]] = []
        self.fail = False
        self.blobs = BlobExchange(send=self.send, send_bulk=self.send_bulk)

    def send(self, to: DeviceId, message: object) -> None:
        if self.fail:
            raise PeerLost("no link")
        self.sent.append((to, message))

    async def send_bulk(
        self, to: DeviceId, header: BulkHeader, chunk: memoryview, flow: Flow
    ) -> None:
        await trio.lowlevel.checkpoint()
        self.chunks.append((header, bytes(chunk)))


async def served(content: bytes, request: BlobRequest) -> list[tuple[BulkHeader, bytes]]:
    wire = Wire()
    wire.blobs.publish(content)
    await wire.blobs.serve(ME, request)
    return wire.chunks


class Fetch:
    """A fetch that runs beside the test, and how it ended."""

    def __init__(self, wire: Wire, digest: Digest, size: int) -> None:
        self.wire, self.digest, self.size = wire, digest, size
        self.content: bytes | None = None
        self.error: Exception | None = None

    async def run(self) -> None:
        try:
            self.content = await self.wire.blobs.fetch(OTHER, self.digest, size=self.size)
        except (PeerLost, RemoteProtocolError) as error:
            self.error = error

    async def asked(self) -> BlobRequest:
        await trio.testing.wait_all_tasks_blocked()
        to, request = self.wire.sent[-1]
        assert to == OTHER
        assert isinstance(request, BlobRequest)
        return request


@pytest.mark.parametrize("size", [0, 1, 1000, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 3 << 20])
async def test_blob_travels_in_chunks(mock_clock: MockClock, size: int) -> None:
    content = bytes(i * 7 % 256 for i in range(256)) * (size // 256 + 1)
    content = content[:size]
    wire = Wire()
    fetch = Fetch(wire, blob_digest(content), size)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(fetch.run)
        request = await fetch.asked()
        chunks = await served(content, request)
        assert all(len(chunk) <= limits.BULK_CHUNK_BYTES_MAX for _, chunk in chunks)
        for header, chunk in chunks:
            wire.blobs.chunk_received(OTHER, header, chunk)
    assert fetch.content == content
    assert wire.blobs.statistics().fetch_count == 0


async def test_own_blob_needs_no_link() -> None:
    wire = Wire()
    digest = wire.blobs.publish(b"mine")
    assert await wire.blobs.fetch(OTHER, digest, size=4) == b"mine"
    assert wire.sent == []


async def test_blob_goes_when_it_is_withdrawn_as_often_as_published() -> None:
    blobs = Wire().blobs
    digest = blobs.publish(b"twice")
    assert blobs.publish(b"twice") == digest
    blobs.withdraw(digest)
    assert blobs.published(digest) == b"twice"
    assert blobs.statistics().published_bytes == 5
    blobs.withdraw(digest)
    assert blobs.published(digest) is None
    blobs.withdraw(digest)
    assert blobs.publish(b"twice") == digest
    assert blobs.published(digest) == b"twice"
    blobs.withdraw(digest)
    assert blobs.statistics().published_count == 0


async def test_view_is_served_under_the_digest_it_was_published_with() -> None:
    content = np.arange(400_000, dtype=np.float32)
    wire = Wire()
    digest = blob_digest(content.data.cast("B"))
    assert wire.blobs.publish(content.data.cast("B"), digest=digest) == digest
    await wire.blobs.serve(ME, BlobRequest(request=1, digest=digest))
    assert [len(chunk) for _, chunk in wire.chunks] == [1 << 20, 1_600_000 - (1 << 20)]
    assert b"".join(chunk for _, chunk in wire.chunks) == content.tobytes()
    assert await wire.blobs.fetch(ME, digest, size=1_600_000) == content.tobytes()


async def test_source_is_read_when_nothing_published_has_that_name() -> None:
    content, wire, asked = b"from a file", Wire(), []

    async def source(digest: Digest) -> bytes | None:
        await trio.lowlevel.checkpoint()
        asked.append(digest)
        return content if digest == blob_digest(content) else None

    wire.blobs.add_source(source)
    wire.blobs.publish(b"in memory")
    for name in (b"in memory", content, b"nowhere"):
        await wire.blobs.serve(OTHER, BlobRequest(request=1, digest=blob_digest(name)))
    assert [chunk for _, chunk in wire.chunks] == [b"in memory", content]
    assert wire.sent == [(OTHER, BlobMissing(request=1))]
    assert asked == [blob_digest(content), blob_digest(b"nowhere")]
    wire.blobs.remove_source(source)
    await wire.blobs.serve(OTHER, BlobRequest(request=2, digest=blob_digest(content)))
    assert wire.sent[-1] == (OTHER, BlobMissing(request=2))


async def test_chunks_are_written_as_they_come(mock_clock: MockClock) -> None:
    content = bytes(range(256)) * (3 << 12)
    wire, written, ended = Wire(), bytearray(), []

    async def fetch() -> None:
        digest = blob_digest(content)
        await wire.blobs.fetch_into(OTHER, digest, size=len(content), write=written.extend)
        ended.append(True)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(fetch)
        await trio.testing.wait_all_tasks_blocked()
        request = wire.sent[-1][1]
        assert isinstance(request, BlobRequest)
        for number, (header, chunk) in enumerate(await served(content, request), start=1):
            assert not ended
            wire.blobs.chunk_received(OTHER, header, chunk)
            assert len(written) == number << 20
    assert ended
    assert written == content


async def test_disk_that_refuses_a_chunk_ends_the_fetch_and_not_the_link(
    mock_clock: MockClock,
) -> None:
    def full(chunk: bytes) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    wire, content = Wire(), bytes(2 << 20)
    fetch = partial(
        wire.blobs.fetch_into, OTHER, blob_digest(content), size=len(content), write=full
    )
    with pytest.RaisesGroup(pytest.RaisesExc(OSError, match="no space left")):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fetch)
            await trio.testing.wait_all_tasks_blocked()
            request = wire.sent[-1][1]
            assert isinstance(request, BlobRequest)
            for header, chunk in await served(content, request):
                wire.blobs.chunk_received(OTHER, header, chunk)
    assert wire.blobs.statistics().fetch_count == 0


async def test_unknown_blob_is_answered_with_missing() -> None:
    wire = Wire()
    await wire.blobs.serve(OTHER, BlobRequest(request=7, digest=Digest("0" * 64)))
    assert wire.sent == [(OTHER, BlobMissing(request=7))]
    assert wire.chunks == []


async def test_fetch_ends_when_the_other_side_lacks_the_blob(mock_clock: MockClock) -> None:
    wire = Wire()
    fetch = Fetch(wire, blob_digest(b"x"), 1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(fetch.run)
        request = await fetch.asked()
        wire.blobs.missing(THIRD, BlobMissing(request=request.request))
        wire.blobs.missing(OTHER, BlobMissing(request=999))
        await trio.testing.wait_all_tasks_blocked()
        assert fetch.error is None
        wire.blobs.missing(OTHER, BlobMissing(request=request.request))
    assert isinstance(fetch.error, PeerLost)
    assert "no longer has blob" in fetch.error.message


async def test_fetch_ends_with_its_peer(mock_clock: MockClock) -> None:
    wire = Wire()
    fetch = Fetch(wire, blob_digest(b"x"), 1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(fetch.run)
        await fetch.asked()
        wire.blobs.peer_down(THIRD)
        await trio.testing.wait_all_tasks_blocked()
        assert fetch.error is None
        wire.blobs.peer_down(OTHER)
    assert isinstance(fetch.error, PeerLost)
    assert "went away" in fetch.error.message


async def test_fetch_without_a_link_fails_at_once() -> None:
    wire = Wire()
    wire.fail = True
    with pytest.raises(PeerLost):
        await wire.blobs.fetch(OTHER, blob_digest(b"x"), size=1)
    assert wire.blobs.statistics().fetch_count == 0


async def test_fetch_that_stands_still_is_given_up_and_one_that_moves_is_not(
    mock_clock: MockClock,
) -> None:
    content = bytes(3 << 20)
    wire = Wire()
    fetch = Fetch(wire, blob_digest(content), len(content))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(fetch.run)
        request = await fetch.asked()
        for header, chunk in (await served(content, request))[:2]:
            mock_clock.jump(limits.BLOB_TIMEOUT_S - 1)
            wire.blobs.chunk_received(OTHER, header, chunk)
            mock_clock.jump(1)
            await trio.testing.wait_all_tasks_blocked()
            assert fetch.error is None
        mock_clock.jump(limits.BLOB_TIMEOUT_S)
    assert isinstance(fetch.error, PeerLost)
    assert "stood still for 60 s" in fetch.error.message


CONTENT = b"abcdef"


@pytest.mark.parametrize(
    "changes",
    [{"offset": 1}, {"total": 7}, {"total": 5}, {"digest": Digest("1" * 64)}, {"offset": 6}],
)
async def test_chunk_that_does_not_continue_the_blob_is_refused(
    mock_clock: MockClock, changes: dict[str, object]
) -> None:
    wire = Wire()
    fetch = Fetch(wire, blob_digest(CONTENT), len(CONTENT))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(fetch.run)
        ((header, chunk),) = await served(CONTENT, await fetch.asked())
        wrong = BulkHeader(**{**_fields(header), **changes})  # type: ignore[arg-type]  # by name
        with pytest.raises(RemoteProtocolError, match="does not continue"):
            wire.blobs.chunk_received(OTHER, wrong, chunk)
        wire.blobs.chunk_received(THIRD, header, chunk)  # not whom we asked: nothing
        await trio.testing.wait_all_tasks_blocked()
        assert fetch.content is None
        wire.blobs.chunk_received(OTHER, header, chunk)
    assert fetch.content == CONTENT
    wire.blobs.chunk_received(OTHER, header, chunk)  # of a fetch that is over: nothing


def _fields(header: BulkHeader) -> dict[str, object]:
    return {f.name: getattr(header, f.name) for f in dataclasses.fields(header)}


async def test_whole_that_does_not_match_its_digest_is_refused(mock_clock: MockClock) -> None:
    wire = Wire()
    fetch = Fetch(wire, blob_digest(CONTENT), len(CONTENT))
    other = b"ABCDEF"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(fetch.run)
        request = await fetch.asked()
        chunk = Digest(hashlib.sha256(other).hexdigest())
        header = BulkHeader(
            request=request.request, kind="blob", digest=fetch.digest, offset=0, total=6,
            chunk=chunk,
        )  # fmt: skip
        wire.blobs.chunk_received(OTHER, header, other)
    assert isinstance(fetch.error, RemoteProtocolError)
    assert "does not match its digest" in fetch.error.message


@pytest.mark.parametrize("size", [-1, limits.BLOB_BYTES_MAX + 1])
async def test_wild_size_is_refused_before_anything_is_allocated(size: int) -> None:
    wire = Wire()
    with pytest.raises(RemoteProtocolError, match="announced a blob"):
        await wire.blobs.fetch(OTHER, blob_digest(b""), size=size)
    assert wire.sent == []


async def test_member_that_asks_without_taking_is_refused_beyond_a_bound(
    mock_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "BLOBS_SERVED_MAX", 2)
    wire, held = Wire(), trio.Event()

    async def send_bulk(to: DeviceId, header: BulkHeader, chunk: memoryview, flow: Flow) -> None:
        await held.wait()
        wire.chunks.append((header, bytes(chunk)))

    wire.blobs = BlobExchange(send=wire.send, send_bulk=send_bulk)
    digest = wire.blobs.publish(b"content")
    async with trio.open_nursery() as nursery:
        for request in (1, 2, 3):
            asked = BlobRequest(request=request, digest=digest)
            nursery.start_soon(wire.blobs.serve, OTHER, asked)
            await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(wire.blobs.serve, THIRD, BlobRequest(request=4, digest=digest))
        await trio.testing.wait_all_tasks_blocked()
        assert wire.sent == [(OTHER, BlobMissing(request=3))]
        held.set()
    assert sorted(header.request for header, _ in wire.chunks) == [1, 2, 4]
    await wire.blobs.serve(OTHER, BlobRequest(request=5, digest=digest))
    assert wire.chunks[-1][0].request == 5
