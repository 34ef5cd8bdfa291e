"""What a peer can do: measured on the peer itself, sent to whoever plans."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from p2ptrain import limits
from p2ptrain.ids import DeviceId
from p2ptrain.training.contract import RuntimeBuild
from p2ptrain.units import NS_PER_S


@dataclass(frozen=True, slots=True, kw_only=True)
class KindCost:
    """Measured time of one microbatch through one distinct segment, and of what ends a step there,
    in nanoseconds."""

    forward_ns: int
    backward_ns: int
    """In one piece."""
    cotangents_ns: int | None = None
    """Of a backward in parts, what the segment before waits for; None: not measured, as if it were
    all of it."""
    gradients_ns: int = 0
    """The rest of a backward in parts."""
    norm_ns: int = 0
    """Square sums of its gradients, once a step; 0: not measured, and not counted."""
    update_ns: int = 0
    """The update of its parameters under the run's optimizer, once a step; 0: as above."""

    def __post_init__(self) -> None:
        if min(self.times_ns) < 0:
            raise ValueError("a time is not negative")

    @property
    def times_ns(self) -> tuple[int, ...]:
        """All of them."""
        passes = (self.forward_ns, self.backward_ns, self.first_ns, self.gradients_ns)
        return (*passes, self.norm_ns, self.update_ns)

    @property
    def first_ns(self) -> int:
        """What a backward takes until its cotangents may leave, when its gradients are delayed."""
        return self.backward_ns if self.cotangents_ns is None else self.cotangents_ns


@dataclass(frozen=True, slots=True, kw_only=True)
class Power:
    """What a device draws."""

    idle_uw: int
    """Microwatts while it waits."""
    busy_uw: int
    """While it computes with the threads of the run, idle included."""
    pj_per_byte: int
    """Picojoules of a byte sent or received, above idle."""
    measured: bool = False
    """What it draws above idle was measured while it computed; else it is modelled or described."""
    error_permille: int | None = None
    """How far modelled watts may be off, of what they are; None: not told."""

    def __post_init__(self) -> None:
        if self.error_permille is not None and self.error_permille < 0:
            raise ValueError("an error band is not negative")
        if self.idle_uw < 0 or self.pj_per_byte < 0 or self.busy_uw < self.idle_uw:
            raise ValueError("watts are not negative, and a busy device draws no less than idle")

    def idle_uj(self, time_ns: int) -> int:
        return self.idle_uw * time_ns // NS_PER_S

    def active_uj(self, compute_ns: int, moved_bytes: int) -> int:
        """Above idle: computing, and bytes sent and received."""
        above_uw = self.busy_uw - self.idle_uw
        return above_uw * compute_ns // NS_PER_S + self.pj_per_byte * moved_bytes // 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Battery:
    """The battery that a device runs on now."""

    charge_uj: int
    """Microjoules that are left in it."""
    capacity_uj: int
    """When it is full."""
    reserve_percent: int
    """Of the capacity: what its owner does not give to runs."""

    def __post_init__(self) -> None:
        if not 0 <= self.charge_uj <= self.capacity_uj or not 0 <= self.reserve_percent <= 100:
            raise ValueError("a battery holds 0 to 100 percent of its capacity")

    @property
    def spendable_uj(self) -> int:
        """What runs may spend until the device leaves them."""
        return max(0, self.charge_uj - self.capacity_uj * self.reserve_percent // 100)


@dataclass(frozen=True, slots=True, kw_only=True)
class SizedCosts:
    """Times of all distinct segments for a microbatch size."""

    microbatch_size: int
    kinds: dict[str, KindCost]

    def __post_init__(self) -> None:
        if self.microbatch_size < 1:
            raise ValueError("a microbatch has a sample")


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerProfile:
    """One peer's measured abilities for one bundle, microbatch size and thread count."""

    device: DeviceId
    kinds: dict[str, KindCost]
    """By segment kind name."""
    memory_bytes: int
    """What the run may use on this peer."""
    host: str
    """Identity of the machine: peers on one host share its idle watts and reach each other within
    it."""
    cores: int
    """Cores of the machine."""
    build: RuntimeBuild
    power: Power | None = None
    """What the machine draws; None: it did not say."""
    other_sizes: tuple[SizedCosts, ...] = ()
    """What follows for other microbatch sizes, where the size is to be chosen."""
    battery: Battery | None = None
    """None: it is plugged in, has none, or does not say."""
    own_cores: str = ""
    """Identity of the CPU quota that it is below, whose time is nobody else's; empty: there is
    none, so it shares the cores with whoever else on its host has none."""
    record_ns: int = 0
    """Until the record of a step is durable; 0: it stays in memory, or was not measured."""

    def __post_init__(self) -> None:
        if self.record_ns < 0:
            raise ValueError("a time is not negative")

    @property
    def cores_identity(self) -> str:
        """Equal for peers that take time of the cores from each other."""
        return self.own_cores or self.host

    def at_size(self, microbatch_size: int) -> PeerProfile | None:
        """The profile for one of its other sizes, alone; None: it is not known."""
        found = (each for each in self.other_sizes if each.microbatch_size == microbatch_size)
        sized = next(found, None)
        return None if sized is None else replace(self, kinds=sized.kinds, other_sizes=())


def is_plausible(profile: PeerProfile, kinds: Collection[str]) -> bool:
    """Whether a plan can be made with what a peer tells of itself: of just these distinct segments,
    with times and watts that add up to integers on the wire."""
    tables = [profile.kinds, *(sized.kinds for sized in profile.other_sizes)]
    if any(table.keys() != set(kinds) for table in tables) or profile.cores < 1:
        return False
    times = [time for table in tables for cost in table.values() for time in cost.times_ns]
    if max([*times, profile.record_ns]) > limits.PART_NS_MAX:
        return False
    power = profile.power
    return power is None or (
        power.busy_uw <= limits.POWER_UW_MAX and power.pj_per_byte <= limits.PJ_PER_BYTE_MAX
    )
