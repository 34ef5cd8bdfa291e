"""What a peer can do: measured on the peer itself, sent to whoever plans."""

from __future__ import annotations

from dataclasses import dataclass

from p2ptrain.ids import DeviceId
from p2ptrain.training.contract import RuntimeBuild


@dataclass(frozen=True, slots=True, kw_only=True)
class KindCost:
    """Measured time of one microbatch through one distinct segment, in nanoseconds."""

    forward_ns: int
    backward_ns: int

    def __post_init__(self) -> None:
        if self.forward_ns < 0 or self.backward_ns < 0:
            raise ValueError("a time is not negative")


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerProfile:
    """One peer's measured abilities for one bundle, microbatch size and thread count."""

    device: DeviceId
    kinds: dict[str, KindCost]
    """By segment kind name."""
    memory_bytes: int
    """What the run may use on this peer."""
    host: str
    """Identity of the machine: peers on one host share cores and energy meter."""
    cores: int
    """Cores of the machine."""
    build: RuntimeBuild
