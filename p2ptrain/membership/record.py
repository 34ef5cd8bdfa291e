"""What each peer says about itself, and only itself; spread by gossip."""

from __future__ import annotations

from dataclasses import dataclass

from p2ptrain.ids import DeviceId
from p2ptrain.training.contract import RuntimeBuild


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberRecord:
    """A peer's self-authored record; the highest (incarnation, version) wins."""

    device: DeviceId
    name: str
    """What people call the device; for display only."""
    incarnation: int
    """Seconds since 1970 at the peer's start: a restarted peer is a newer one."""
    version: int
    """Counts changes within one incarnation."""
    addresses: tuple[str, ...]
    """host:port, most useful first."""
    host: str
    """Identity of the machine, so that peers on one host are recognised."""
    cores: int
    """Of the machine."""
    threads_max: int
    """The most compute threads its owner allows."""
    memory_bytes: int
    power_source: str
    """mains, battery or unknown."""
    build: RuntimeBuild
    activity: str
    """idle, or what the peer is doing, one phrase."""

    def __post_init__(self) -> None:
        if len(self.name) > 64 or len(self.activity) > 200 or len(self.addresses) > 16:
            raise ValueError("a record field is too long")
