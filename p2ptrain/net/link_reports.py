"""What links tell their owner: peers that came and went, and the bytes that it cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from p2ptrain.ids import DeviceId
from p2ptrain.net.connection import Connection
from p2ptrain.wire.flows import FlowCounter
from p2ptrain.wire.hello import Agreement, Hello
from p2ptrain.wire.throughput import Throughput

Totals = dict[tuple[DeviceId, str], tuple[int, int]]
"""(device, kind) -> bytes sent and received at the socket."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkUp:
    """Both links with a peer are up."""

    device: DeviceId
    address: str
    """host:port where the peer listens, as far as we know; worth remembering."""
    hello: Hello
    agreement: Agreement
    """What both sides speak."""
    clock_ahead_s: float
    """How far the peer's wall clock is ahead of ours."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkDown:
    """The links with a peer are gone; follows every LinkUp once."""

    device: DeviceId
    reason: str
    closed_by_peer: bool
    refused: bool
    """A dial right after was refused: nothing listens there, the process is gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerLinkStatistics:
    """Bytes with one peer; sent and received at the socket, encrypted, since we started."""

    control_bytes_sent: int
    control_bytes_received: int
    data_bytes_sent: int
    data_bytes_received: int
    queued_bytes: int
    """Control messages that wait and ciphertext that the kernel has not taken, now; at most
    LINK_QUEUED_BYTES_MAX. Tensors and chunks that wait stay in their owner's memory."""
    bytes_per_s: int | None = None
    """What we send to it while more waits than the link carries; None: there was never that much,
    or long ago."""
    local_host: str = ""
    """Our own address on the link; empty: there is none now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinksStatistics:
    """What went over the links since this process started."""

    peers: dict[DeviceId, PeerLinkStatistics]
    refused_count: int
    """Connections that failed to authenticate here."""
    last_refusal: str | None
    renewed_count: int
    """Links that another took the place of because of their age or what they carried."""

    @property
    def bytes_sent(self) -> int:
        """Encrypted bytes sent to all peers."""
        return sum(p.control_bytes_sent + p.data_bytes_sent for p in self.peers.values())

    @property
    def bytes_received(self) -> int:
        """Encrypted bytes received from all peers."""
        return sum(p.control_bytes_received + p.data_bytes_received for p in self.peers.values())


class LinkTotals:
    """What connections have carried: bytes by device and kind of link, and what they were for."""

    def __init__(self, past: LinkTotals | None = None, present: Iterable[Connection] = ()) -> None:
        """Of connections that are gone, and of those that are up."""
        self._bytes: Totals = {} if past is None else dict(past._bytes)
        self._flows: dict[DeviceId, FlowCounter] = {}
        self._queued: Counter[DeviceId] = Counter()
        self._rates: dict[DeviceId, list[Throughput]] = {}
        self._hosts: dict[DeviceId, str] = {}
        if past is not None:
            self._rates = {device: list(rates) for device, rates in past._rates.items()}
        for device, flows in () if past is None else past._flows.items():
            self._flow(device).merge(flows)
        for connection in present:
            self.add(connection)
            self._queued[connection.device] += connection.queued_bytes
            self._hosts[connection.device] = connection.link.local_host

    def add(self, connection: Connection) -> None:
        """Add what went over one connection."""
        counts = connection.statistics()
        sent, received = self._bytes.get((connection.device, connection.kind), (0, 0))
        self._bytes[connection.device, connection.kind] = (
            sent + counts.socket_bytes_sent,
            received + counts.socket_bytes_received,
        )
        self._flow(connection.device).merge(connection.flows)
        if connection.kind == "data":
            known = self._rates.get(connection.device, [])
            self._rates[connection.device] = [*known[-1:], connection.link.throughput]

    def peers(self, now: float) -> dict[DeviceId, PeerLinkStatistics]:
        """Bytes by device, sorted, and what their links carry."""
        return {device: self._peer(device, now) for device in sorted({d for d, _ in self._bytes})}

    def sent(self, run: str) -> dict[DeviceId, dict[str, int]]:
        """Encrypted bytes sent for a run, by device and kind of traffic."""
        return {device: flows.of(run) for device, flows in self._flows.items()}

    def _rate(self, device: DeviceId, now: float) -> int | None:
        """Of the present link, else of the one before."""
        rates = [each.bytes_per_s(now) for each in reversed(self._rates.get(device, []))]
        return next((rate for rate in rates if rate is not None), None)

    def _peer(self, device: DeviceId, now: float) -> PeerLinkStatistics:
        control = self._bytes.get((device, "control"), (0, 0))
        data = self._bytes.get((device, "data"), (0, 0))
        return PeerLinkStatistics(
            control_bytes_sent=control[0],
            control_bytes_received=control[1],
            data_bytes_sent=data[0],
            data_bytes_received=data[1],
            queued_bytes=self._queued[device],
            bytes_per_s=self._rate(device, now),
            local_host=self._hosts.get(device, ""),
        )

    def _flow(self, device: DeviceId) -> FlowCounter:
        return self._flows.setdefault(device, FlowCounter())
