"""What an owner decides about a peer."""

from __future__ import annotations

from dataclasses import dataclass

from p2ptrain import limits


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerConfig:
    """Settings of one peer; the defaults suit a device on a home network."""

    name: str | None = None
    """What others call this device; None: the name it enrolled under."""
    listen_host: str = "0.0.0.0"
    port: int = limits.PEER_PORT_DEFAULT
    """0: any free port."""
    peers: tuple[str, ...] = ()
    """host:port of members to dial, beside those that are discovered or remembered."""
    discovery: bool = True
    interfaces: tuple[str, ...] | None = None
    """Addresses to discover on; None: all."""
    memory_bytes: int | None = None
    """What runs may use; None: half of the memory that is available."""
    threads: int | None = None
    """The most compute threads to use; None: as many as the machine has cores."""
