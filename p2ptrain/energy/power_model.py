"""Joules of a peer from its seconds: the model for peers without a meter, and fair splitting.

Everything is integer microjoules and nanoseconds, so that parts add up to wholes exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from p2ptrain.units import NS_PER_S, UJ_PER_J


@dataclass(frozen=True, slots=True, kw_only=True)
class PowerModel:
    """E = idle watts x time + watts per busy core x CPU seconds + joules per byte x bytes."""

    idle_watts: float
    core_watts: float
    """Marginal watts of one fully busy core."""
    joules_per_byte: float
    """Marginal cost of a byte sent or received."""
    cores: int
    source: str
    """Where the figures come from, or that they are assumptions."""
    error_band: float | None = None
    """Relative half width; None when unknown."""

    def __post_init__(self) -> None:
        if min(self.idle_watts, self.core_watts, self.joules_per_byte) < 0 or self.cores < 1:
            raise ValueError("watts and joules are not negative and a machine has a core")

    def idle_uj(self, wall_ns: int) -> int:
        """What the whole machine spends by being on."""
        return round(self.idle_watts * wall_ns * UJ_PER_J / NS_PER_S)

    def compute_uj(self, cpu_ns: int) -> int:
        """Above idle: what this much CPU time costs."""
        return round(self.core_watts * cpu_ns * UJ_PER_J / NS_PER_S)

    def bytes_uj(self, byte_count: int) -> int:
        """Above idle: what this many bytes on the link cost."""
        return round(self.joules_per_byte * byte_count * UJ_PER_J)


def split(total: int, weights: Sequence[int]) -> tuple[int, ...]:
    """Divide an integer by weights so that the parts add up to it exactly.

    The rest goes to the largest remainders, first index first. All weights zero: equal parts.
    """
    weights = list(weights) if any(weights) else [1] * len(weights)
    whole = sum(weights)
    parts = [total * weight // whole for weight in weights]
    remainders = [(-(total * weight % whole), i) for i, weight in enumerate(weights)]
    for _, index in sorted(remainders)[: total - sum(parts)]:
        parts[index] += 1
    return tuple(parts)


def process_share_uj(
    *, package_uj: int, idle_uj: int, process_cpu_ns: int, machine_cpu_ns: int
) -> int:
    """One process's part of a package counter above idle, by its share of the CPU time.

    Args:
        package_uj: What the counter rose by.
        idle_uj: What the package would have used doing nothing in that time.
        process_cpu_ns: CPU time of this process.
        machine_cpu_ns: CPU time of all processes; taken as at least the process's own.

    Returns:
        Microjoules between 0 and the counter's rise.
    """
    above_uj = max(0, package_uj - idle_uj)
    return above_uj * process_cpu_ns // max(machine_cpu_ns, process_cpu_ns, 1)
