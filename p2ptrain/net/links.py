"""Authenticated links with every reachable peer of the group: one for control, one for data.

A peer is up when both of its links are; it is down when either breaks, and both are dialled
again. Which of two simultaneous connections stays is decided in wire/arbitration.py.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Final

import trio

from p2ptrain import limits
from p2ptrain.errors import InvariantBroken, PeerLost, RemoteProtocolError
from p2ptrain.ids import DeviceId, short
from p2ptrain.net.connection import BodyReader, Connection, OnBulk, OnTensor, read_beside
from p2ptrain.net.dial_outcomes import failed, is_refused, refused_by_hello
from p2ptrain.net.dialler import Attempt, Dialler, no_matter
from p2ptrain.net.link_reports import (
    LinkDown,
    LinksStatistics,
    LinkUp,
    PeerLinkStatistics,
)
from p2ptrain.net.listener import Handler, Listener, connect, join_address, listen
from p2ptrain.net.renewal import keep_fresh
from p2ptrain.net.session import Session, SessionTable
from p2ptrain.net.tls_link import (
    LinkBroken,
    LinkRefused,
    TlsLink,
    client_context,
    server_context,
)
from p2ptrain.training.contract import RuntimeBuild
from p2ptrain.training.messages import run_of
from p2ptrain.trust.credentials import Credentials, FindObjection, no_objection
from p2ptrain.wire import codec
from p2ptrain.wire import hello as wire_hello
from p2ptrain.wire.arbitration import may_accept, may_offer
from p2ptrain.wire.flows import Flow
from p2ptrain.wire.frames import BulkHeader, TensorHeader
from p2ptrain.wire.hello import LINK_KINDS, Hello, Spoken, negotiate

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

__all__ = ["BodyReader", "LinkDown", "LinkUp", "Links", "LinksStatistics", "PeerLinkStatistics"]

_INSTANCE_BITS: Final = 62


class Links:
    """All links of this peer in one group.

    Read `events` and `inbox` all the time: they are bounded, and a full one holds back reading
    from peers. Messages of a peer arrive after its LinkUp was queued.
    """

    def __init__(
        self,
        *,
        credentials: Credentials,
        build: RuntimeBuild,
        listen_host: str,
        listen_port: int,
        on_tensor: OnTensor,
        on_bulk: OnBulk,
        enrolment: Handler | None = None,
        objection: FindObjection = no_objection,
        on_refused: Callable[[], None] = no_matter,
        spoken: Spoken | None = None,
    ) -> None:
        """Raises TrustError when our own key and certificates do not fit together.

        Args:
            objection: Asked about every chain that TLS has verified; what it says against one
                keeps that peer out.
            on_refused: Called when an address was added to `refusals`.
            spoken: Protocol versions and features; None: those of this version.
        """
        self._objection = objection
        self._spoken = Spoken() if spoken is None else spoken
        self._build = build
        self._listen_at = (listen_host, listen_port)
        self._on_tensor = on_tensor
        self._on_bulk = on_bulk
        self._enrolment = enrolment
        self.use(credentials)
        self._instance = random.SystemRandom().getrandbits(_INSTANCE_BITS)
        self._listener: Listener | None = None
        self._nursery: trio.Nursery | None = None
        self._sessions = SessionTable(on_end=self._ended)
        self._undecided = 0
        self._refused_count = self._renewed_count = 0
        self._last_refusal: str | None = None
        self._dialler = Dialler(
            attempt=self._attempt, wait_missing=self._sessions.wait_missing, on_refused=on_refused
        )
        self._events_in, self.events = trio.open_memory_channel[LinkUp | LinkDown](
            limits.LINK_EVENTS_MAX
        )
        self._inbox_in, self.inbox = trio.open_memory_channel[tuple[DeviceId, object]](
            limits.INBOX_MESSAGES_MAX
        )

    @property
    def address(self) -> tuple[str, int]:
        """Host as given and the port that is bound; InvariantBroken before `run` started."""
        if self._listener is None:
            raise InvariantBroken("links have no address before they run")
        return self._listener.address

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own the listener, the dialler and all readers; ends when it is cancelled.

        Raises:
            PortInUse: another program has the port; nothing was started.
        """
        self._listener = await listen(*self._listen_at)
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                self._dialler.start(nursery)
                task_status.started()
                await self._listener.serve(
                    nursery, on_link=self._accept, on_enrolment=self._enrolment
                )
        finally:
            self._listener.close()
            self._sessions.stop(LinkBroken("this peer stops"))
            self._events_in.close()
            self._inbox_in.close()

    def use(self, credentials: Credentials) -> None:
        """Show these credentials from the next handshake on; links that are up stay.

        Raises:
            TrustError: key and certificates do not fit together; the former ones stay.
        """
        server, client = server_context(credentials), client_context(credentials)
        self._credentials, self._server, self._client = credentials, server, client

    def dial(self, address: str, *, device: DeviceId | None = None) -> None:
        """Hint that a peer may be at host:port; ConfigError when that is no address."""
        self._dialler.add(address, device)

    def forgive(self) -> None:
        """Dial again what was refused: what was wrong with us may be right now."""
        self._dialler.forgive()

    def refusals(self) -> dict[str, str]:
        """Addresses that are not dialled any more, and why: ourselves, or another group."""
        return self._dialler.refusals()

    def failures(self) -> dict[str, str]:
        """Addresses whose last dial failed, and why; they are dialled again."""
        return self._dialler.failures()

    def devices(self) -> tuple[DeviceId, ...]:
        """Peers that are up now, sorted."""
        return self._sessions.announced()

    def send_control(self, device: DeviceId, message: object) -> None:
        """Queue a message; never waits. A full queue closes the links with that peer.

        Raises:
            PeerLost: no link, or it was just closed; membership hears of it by LinkDown.
        """
        session = self._sessions.live(device)
        queue = session.slots["control"].queue_control
        if not queue(codec.encode(message), run_of(message)):
            self._sessions.end(session, LinkBroken("the peer takes no control messages"))
            raise PeerLost(f"peer {short(device)} takes no control messages")

    async def send_tensor(
        self, device: DeviceId, header: TensorHeader, *buffers: ReadableBuffer
    ) -> None:
        """Send one tensor from contiguous memory, unchanged until this returns.

        Cancelling in the middle breaks the links with that peer.

        Raises:
            PeerLost: no link, or it broke.
        """
        connection = self._sessions.live(device).slots["data"]
        with _as_peer_lost(device):
            await connection.send_tensor(header, buffers)

    async def send_bulk(
        self, device: DeviceId, header: BulkHeader, chunk: ReadableBuffer, flow: Flow
    ) -> None:
        """Send one chunk while no tensor waits; otherwise as `send_tensor`."""
        connection = self._sessions.live(device).slots["data"]
        with _as_peer_lost(device):
            await connection.send_bulk(header, chunk, flow)

    def close(self, device: DeviceId, reason: str) -> None:
        """Close the links with a peer; LinkDown follows, and whoever dials may come back."""
        session = self._sessions.get(device)
        if session is not None:
            self._sessions.end(session, LinkBroken(reason))

    def statistics(self) -> LinksStatistics:
        """Bytes per peer and refused connections so far."""
        return LinksStatistics(
            peers=self._sessions.totals().peers(trio.current_time()),
            refused_count=self._refused_count,
            last_refusal=self._last_refusal,
            renewed_count=self._renewed_count,
        )

    def sent(self, run: str) -> dict[DeviceId, dict[str, int]]:
        """Encrypted bytes sent for a run, by device and kind, since this process started."""
        return self._sessions.totals().sent(run)

    # Connections that others dialled.

    async def _accept(self, sock: trio.socket.SocketType) -> None:
        """Authenticate an incoming connection and take it if it is wanted; never raises."""
        if self._undecided >= limits.PENDING_CONNECTIONS_MAX:
            sock.close()
            return
        self._undecided += 1
        link = TlsLink(sock, self._server, server_side=True)
        try:
            await link.handshake()
            await self._answer_hello(link, sock)
        except (LinkBroken, RemoteProtocolError, OSError) as error:
            if isinstance(error, LinkRefused | RemoteProtocolError):
                self._refused_count += 1
                self._last_refusal = str(error)
            await link.aclose()
        except BaseException:
            link.close()
            raise
        finally:
            self._undecided -= 1

    async def _answer_hello(self, link: TlsLink, sock: trio.socket.SocketType) -> None:
        host = str(sock.getpeername()[0])
        device = link.peer_device(self._credentials)
        connection = Connection(link, device=device, kind="control", dialled_here=False)
        theirs = await connection.receive_hello()
        connection.kind = theirs.kind
        connection.address = join_address(host, theirs.listen_port)
        objection = self._objection(link.peer_chain())
        if objection is not None:
            self._refused_count += 1
            self._last_refusal = objection.reason
        refusal = self._judge(connection, theirs) if objection is None else objection.refusal
        if refusal is not None:
            await connection.send_hello(self._hello(theirs.kind, refusal=refusal))
            await link.aclose()
            return
        if theirs.renews:
            await self._answer_renewal(connection, theirs)
            return
        session = self._sessions.reserve(connection, theirs)
        try:
            await connection.send_hello(self._hello(theirs.kind))
        except LinkBroken as error:
            self._sessions.end(session, error)
            raise
        if not self._dialler.knows(device):
            self.dial(connection.address, device=device)
        self._admit(connection, session)

    async def _answer_renewal(self, fresh: Connection, theirs: Hello) -> None:
        """Hold a link ready in whose favour the peer will move; `_judge` found what it renews."""
        session = self._sessions.get(fresh.device)
        renewed = None if session is None else session.renewable(theirs)
        if renewed is None:
            raise InvariantBroken("a renewal was judged good without a connection to renew")
        renewed.offer_successor(fresh.link)  # before the answer: the peer may move at once
        try:
            await fresh.send_hello(self._hello(theirs.kind, renews=True))
        except BaseException:
            renewed.withdraw_successor()
            raise
        self._renewed_count += 1

    def _judge(self, connection: Connection, theirs: Hello) -> str | None:
        """Why an incoming connection is not taken; None when it is."""
        device = connection.device
        if device == self._credentials.device:
            return wire_hello.REFUSE_DUPLICATE
        ours = self._hello(theirs.kind)
        if theirs.is_question:
            return wire_hello.REFUSE_VERSION
        if (gap := wire_hello.version_gap(ours, theirs)) is not None:
            self._refused_count += 1
            self._last_refusal = f"{short(device)}: {gap}"
            return wire_hello.REFUSE_VERSION
        connection.agreement = negotiate(ours, theirs, device=device)
        if theirs.renews:
            session = self._sessions.get(device)
            renewed = None if session is None else session.renewable(theirs)
            return wire_hello.REFUSE_DUPLICATE if renewed is None else None
        if device not in self._sessions and len(self._sessions) >= limits.LINK_PEERS_MAX:
            return wire_hello.REFUSE_FULL
        standing = self._sessions.standing(device, theirs.kind, theirs.instance)
        if not may_accept(self._credentials.device, device, standing):
            return wire_hello.REFUSE_DUPLICATE
        return None

    # Connections that we dial.

    async def _attempt(self, address: str) -> Attempt:
        """Dial what is missing at an address; used by the dialler, never raises for the peer."""
        if len(self._sessions) >= limits.LINK_PEERS_WANTED:
            await trio.lowlevel.checkpoint()
            return Attempt(failure="there are links enough; the rest is for those that dial us")
        device: DeviceId | None = None
        for kind in LINK_KINDS:
            if device is not None and self._sessions.has(device, kind):
                continue
            attempt = await self._dial_one(address, kind)
            device = attempt.device
            if attempt.failure is not None or attempt.refusal is not None:
                return attempt
        return Attempt(device=device)

    async def _dial_one(self, address: str, kind: str) -> Attempt:
        try:
            sock = await connect(address)
        except OSError as error:
            return Attempt(failure=error.strerror or "cannot be reached")
        link = TlsLink(sock, self._client, server_side=False)
        connection: Connection | None = None
        try:
            connection = await self._authenticated(link, kind)
            connection.address = address
            return await self._offer(connection)
        except (LinkBroken, RemoteProtocolError) as error:
            await link.aclose()
            return failed(error, None if connection is None else connection.device)
        except BaseException:
            link.close()
            raise

    async def _authenticated(self, link: TlsLink, kind: str) -> Connection:
        """Shake hands on a link that we dialled; LinkBroken when we do not want who answers."""
        await link.handshake()
        device = link.peer_device(self._credentials)
        objection = self._objection(link.peer_chain())
        if objection is not None:
            raise LinkRefused(objection.reason)
        return Connection(link, device=device, kind=kind, dialled_here=True)

    async def _renew(self, worn: Connection, session: Session) -> TlsLink:
        """Dial the link that takes the place of `worn`; used by `keep_fresh`."""
        link = TlsLink(await connect(worn.address), self._client, server_side=False)
        try:
            fresh = await self._authenticated(link, worn.kind)
            ours = self._hello(worn.kind, renews=True)
            await fresh.send_hello(ours)
            theirs = await fresh.receive_hello()
            if theirs.refusal is not None or theirs.instance != session.instance:
                raise LinkBroken("the peer does not renew this link")
            negotiate(ours, theirs, device=worn.device)
        except (LinkBroken, RemoteProtocolError):
            await link.aclose()
            raise
        except BaseException:
            link.close()
            raise
        self._renewed_count += 1
        return link

    async def _offer(self, connection: Connection) -> Attempt:
        device, kind = connection.device, connection.kind
        if device == self._credentials.device:
            await connection.link.aclose()
            return Attempt(device=device, refusal="this device itself", is_self=True)
        full = device not in self._sessions and len(self._sessions) >= limits.LINK_PEERS_MAX
        if full or not may_offer(self._sessions.standing(device, kind, None)):
            await connection.link.aclose()
            return Attempt(device=device, failure="too many links" if full else None)
        we_decide = self._credentials.device < device
        session = self._sessions.reserve(connection, None) if we_decide else None
        try:
            theirs = await self._exchange_hello(connection)
        except BaseException as error:
            if session is not None:
                self._sessions.drop(session, connection, error)
            raise
        if theirs.refusal is not None:
            if session is not None:
                self._sessions.drop(session, connection, LinkBroken("refused"))
            await connection.link.aclose()
            return refused_by_hello(self._hello(kind), theirs)
        self._admit(connection, session or self._sessions.reserve(connection, theirs))
        return Attempt(device=device)

    async def _exchange_hello(self, connection: Connection) -> Hello:
        ours = self._hello(connection.kind)
        await connection.send_hello(ours)
        theirs = await connection.receive_hello()
        if theirs.refusal is None:
            connection.agreement = negotiate(ours, theirs, device=connection.device)
        return theirs

    # Sessions.

    def _admit(self, connection: Connection, session: Session) -> None:
        """HELLO was agreed: start the connection's task; announce the peer if it is complete."""
        hello = connection.hello
        if hello is None or self._nursery is None:
            raise InvariantBroken("a connection is admitted after HELLO, while links run")
        if session.over is None and session.instance not in (None, hello.instance):
            self._sessions.end(session, LinkBroken("the peer was restarted", closed_by_peer=True))
        if session.over is not None:
            connection.close()
            return
        session.instance = hello.instance
        connection.ready = True
        self._nursery.start_soon(self._serve, connection, session)
        if session.complete:
            self._nursery.start_soon(self._announce, session)

    async def _announce(self, session: Session) -> None:
        if session.after is not None:
            await session.after.wait()
        if session.over is not None:
            return
        session.was_announced = True
        control = session.slots["control"]
        hello, agreement = control.hello, control.agreement
        if hello is None or agreement is None:
            raise InvariantBroken("a ready connection has a HELLO that was agreed")
        await self._events_in.send(
            LinkUp(
                device=session.device,
                address=control.address,
                hello=hello,
                agreement=agreement,
                clock_ahead_s=control.clock_ahead_s,
            )
        )
        session.up.set()

    async def _serve(self, connection: Connection, session: Session) -> None:
        """Read one connection until it ends, then end its session; never raises for the peer."""
        try:
            with connection.scope:
                with trio.move_on_after(limits.LINK_PAIR_TIMEOUT_S):
                    await session.up.wait()
                if not session.up.is_set():
                    raise LinkBroken("the peer's other link did not come")
                await self._read(connection, session)
                raise LinkBroken("the peer closed the link", closed_by_peer=True)
        except LinkBroken as error:
            self._sessions.end(session, error)
        except RemoteProtocolError as error:
            self._sessions.end(session, LinkBroken(f"the peer broke the protocol: {error.message}"))
        finally:
            await connection.aclose()

    async def _read(self, connection: Connection, session: Session) -> None:
        """Read, write what is queued and renew the link in time, until one of them breaks."""
        renews = connection.dialled_here and connection.can_renew
        renew = partial(self._renew, connection, session) if renews else None
        fresh = partial(keep_fresh, connection, renew)
        if connection.kind == "control":
            read = partial(connection.read_control, self._deliver)
            await read_beside(read, fresh, connection.write_control)
        else:
            await read_beside(partial(connection.read_data, self._on_tensor, self._on_bulk), fresh)

    async def _deliver(self, device: DeviceId, message: object) -> None:
        await self._inbox_in.send((device, message))

    def _ended(self, session: Session, why: LinkBroken) -> None:
        if self._nursery is None:
            raise InvariantBroken("a session ends while links run")
        self._nursery.start_soon(self._report_down, session, why)

    async def _report_down(self, session: Session, why: LinkBroken) -> None:
        try:
            if session.was_announced:
                await session.up.wait()
                address = session.slots["control"].address
                refused = why.closed_by_peer and await is_refused(address)
                await self._events_in.send(
                    LinkDown(
                        device=session.device,
                        reason=why.reason,
                        closed_by_peer=why.closed_by_peer,
                        refused=refused,
                    )
                )
        finally:
            self._sessions.reported(session)

    def _hello(self, kind: str, *, refusal: str | None = None, renews: bool = False) -> Hello:
        return Hello(
            protocol_min=self._spoken.protocol_min,
            protocol_max=self._spoken.protocol_max,
            features=self._spoken.features,
            group=self._credentials.group,
            device=self._credentials.device,
            instance=self._instance,
            kind=kind,
            build=self._build,
            clock_s=time.time(),
            listen_port=self.address[1],
            refusal=refusal,
            renews=renews,
        )


@contextlib.contextmanager
def _as_peer_lost(device: DeviceId) -> Iterator[None]:
    try:
        yield
    except LinkBroken as error:
        raise PeerLost(f"the link with peer {short(device)} broke: {error.reason}") from error
