"""What links tell their owner: peers that came and went, and the bytes that it cost."""

from __future__ import annotations

from dataclasses import dataclass

from p2ptrain.ids import DeviceId
from p2ptrain.net.connection import Connection
from p2ptrain.wire.hello import Agreement, Hello

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


def add_bytes(totals: Totals, connection: Connection) -> None:
    """Add what went over a connection to the totals per device and kind."""
    counts = connection.statistics()
    sent, received = totals.get((connection.device, connection.kind), (0, 0))
    totals[connection.device, connection.kind] = (
        sent + counts.socket_bytes_sent,
        received + counts.socket_bytes_received,
    )


def peer_statistics(device: DeviceId, totals: Totals, queued_bytes: int) -> PeerLinkStatistics:
    """One peer's share of the totals."""
    control = totals.get((device, "control"), (0, 0))
    data = totals.get((device, "data"), (0, 0))
    return PeerLinkStatistics(
        control_bytes_sent=control[0],
        control_bytes_received=control[1],
        data_bytes_sent=data[0],
        data_bytes_received=data[1],
        queued_bytes=queued_bytes,
    )
