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
    refutations: int = 0
    """Counts the accusations (silent, dead) that it has contradicted within one incarnation."""
    leaving: bool = False
    """It is about to go on purpose: its end is a leave, not a death."""
    away_count: int = 0
    """How often it was suspended within one incarnation."""
    away_s: float = 0.0
    """How long it was suspended the last time."""
    battery_percent: int | None = None
    """Of the battery it runs on; None: no battery, or the platform does not say."""

    def __post_init__(self) -> None:
        if len(self.name) > 64 or len(self.activity) > 200 or len(self.addresses) > 16:
            raise ValueError("a record field is too long")
        if self.refutations < 0 or self.away_count < 0 or not self.away_s >= 0.0:
            raise ValueError("a record counts below zero")
        if self.battery_percent is not None and not 0 <= self.battery_percent <= 100:
            raise ValueError("a battery holds 0 to 100 percent")

    @property
    def standing(self) -> tuple[int, int]:
        """(incarnation, refutations): an accusation below it is refuted."""
        return (self.incarnation, self.refutations)

    @property
    def rank(self) -> tuple[int, int]:
        """(incarnation, version): the higher one replaces the lower."""
        return (self.incarnation, self.version)
