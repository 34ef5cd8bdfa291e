"""Links of several peers over loopback, as tests need them: willing, slow or hostile."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio

from p2ptrain.errors import RemoteProtocolError
from p2ptrain.ids import DeviceId, Digest, Lineage, RunId, ViewNumber
from p2ptrain.net.connection import BodyReader, Connection
from p2ptrain.net.links import LinkDown, Links, LinkUp
from p2ptrain.net.listener import connect, join_address
from p2ptrain.net.tls_link import TlsLink, client_context
from p2ptrain.store.groups import Group
from p2ptrain.training.contract import RuntimeBuild
from p2ptrain.wire.codec import message
from p2ptrain.wire.frames import BulkHeader, TensorHeader
from p2ptrain.wire.hello import Hello, Spoken

MintGroup = Callable[..., list[Group]]
BUILD = RuntimeBuild(
    runtime="onnxruntime", version="1.20", numpy="2.1", machine="x86_64", isa="avx2"
)


@message("test-links.note")
@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    number: int
    filling: bytes = b""


@dataclass
class Peer:
    """Links with what they received; `gate` holds the tensor handler back."""

    group: Group
    port: int = 0
    spoken: Spoken | None = None
    gate: trio.Event = field(default_factory=trio.Event)
    tensors: list[tuple[TensorHeader, bytes]] = field(default_factory=list)
    chunks: list[tuple[BulkHeader, bytes]] = field(default_factory=list)
    arrived: trio.Event = field(default_factory=trio.Event)

    def __post_init__(self) -> None:
        self.scope = trio.CancelScope()
        self.gate.set()
        self.links = Links(
            credentials=self.group.credentials,
            build=BUILD,
            listen_host="127.0.0.1",
            listen_port=self.port,
            on_tensor=self.on_tensor,
            on_bulk=self.on_bulk,
            spoken=self.spoken,
        )

    @property
    def device(self) -> DeviceId:
        return self.group.device

    @property
    def address(self) -> str:
        return join_address(*self.links.address)

    async def on_tensor(
        self, device: DeviceId, header: TensorHeader, length: int, reader: BodyReader
    ) -> None:
        await self.gate.wait()
        if header.kind == "labels":
            raise RemoteProtocolError("labels were not expected")
        if header.kind == "input":
            await reader.discard()
            return
        body = bytearray(length)
        half = memoryview(body)[: length // 2], memoryview(body)[length // 2 :]
        await reader.read_into(*half)
        self.tensors.append((header, bytes(body)))
        self._tell()

    async def on_bulk(self, device: DeviceId, header: BulkHeader, chunk: bytes) -> None:
        self.chunks.append((header, chunk))
        self._tell()

    def _tell(self) -> None:
        self.arrived.set()
        self.arrived = trio.Event()

    async def wait_arrived(self, count: int) -> None:
        while len(self.tensors) + len(self.chunks) < count:
            await self.arrived.wait()

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        with self.scope:
            await self.links.run(task_status=task_status)

    async def up(self) -> LinkUp:
        event = await self.links.events.receive()
        assert isinstance(event, LinkUp), event
        return event

    async def down(self) -> LinkDown:
        event = await self.links.events.receive()
        assert isinstance(event, LinkDown), event
        return event


@asynccontextmanager
async def running(*members: Group | Peer) -> AsyncIterator[list[Peer]]:
    """Peers of these groups, listening; not linked."""
    peers = [each if isinstance(each, Peer) else Peer(each) for each in members]
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            for peer in peers:
                await nursery.start(peer.run)
            yield peers
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def linked(mint_group: MintGroup) -> AsyncIterator[tuple[Peer, Peer]]:
    """Two peers whose links are up."""
    async with running(*mint_group(2)) as (low, high):
        low.links.dial(high.address)
        await low.up()
        await high.up()
        yield low, high


def tensor(step: int, kind: str = "activation") -> TensorHeader:
    return TensorHeader(
        run=RunId("a" * 26),
        lineage=Lineage(0),
        view=ViewNumber(1),
        plan=Digest("0" * 64),
        kind=kind,
        phase="train",
        step=step,
        microbatch=0,
        segment=0,
        index=0,
    )


def bulk(chunk: bytes) -> BulkHeader:
    digest = Digest(hashlib.sha256(chunk).hexdigest())
    return BulkHeader(
        request=1, kind="blob", digest=digest, offset=0, total=len(chunk), chunk=digest
    )


def flood(sender: Peer, receiver: Peer, count: int, filling: bytes) -> None:
    for number in range(count):
        sender.links.send_control(receiver.device, Note(number=number, filling=filling))


async def raw_connection(peer: Peer, member: Group, kind: str) -> Connection:
    """A member that does what it likes: authenticated, HELLO not yet said."""
    link = TlsLink(
        await connect(peer.address), client_context(member.credentials), server_side=False
    )
    await link.handshake()
    return Connection(link, device=peer.device, kind=kind, dialled_here=True)


def hello_of(member: Group, kind: str, **changes: object) -> Hello:
    fields: dict[str, object] = {
        "protocol_min": 4,
        "protocol_max": 4,
        "features": (),
        "group": member.id,
        "device": member.device,
        "instance": 1,
        "kind": kind,
        "build": BUILD,
        "clock_s": 0.0,
        "listen_port": 1,
    }
    return Hello(**{**fields, **changes})  # type: ignore[arg-type]  # a table of overrides


async def hostile_pair(peer: Peer, member: Group) -> dict[str, Connection]:
    """Both links of a member that does what it likes, up."""
    made = {}
    for kind in ("control", "data"):
        made[kind] = await raw_connection(peer, member, kind)
        await made[kind].send_hello(hello_of(member, kind))
        assert (await made[kind].receive_hello()).refusal is None
    return made
