"""What must hold in every simulated group, whatever happens; separate from what makes it hold."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from p2ptrain.agreement.journal import AcceptedRecord, DecidedRecord, decode_record
from p2ptrain.ids import DeviceId, Digest
from p2ptrain.membership.events import MemberDown, MemberSuspected, MemberUp
from p2ptrain.planner.plan import Plan

Key = tuple[str, int, int]


_read = functools.lru_cache(maxsize=4096)(decode_record)


class Violation(AssertionError):
    """A rule was broken; the message says which and when."""


def key_of(of: Plan | DecidedRecord) -> Key:
    return (of.run, of.lineage, of.view)


@dataclass
class AgreementChecker:
    """One plan per view, acknowledged by all its members, told once per life of a member."""

    read_disk: Callable[[DeviceId], Sequence[bytes]]
    decided: dict[Key, Digest] = field(default_factory=dict)
    told: set[tuple[DeviceId, Key]] = field(default_factory=set)

    def on_decided(self, device: DeviceId, plan: Plan) -> None:
        key = key_of(plan)
        first = self.decided.setdefault(key, plan.digest)
        if first != plan.digest:
            raise Violation(f"two plans decided for view {key}")
        if (device, key) in self.told:
            raise Violation(f"{device[:4]} was told twice that view {key} is decided")
        self.told.add((device, key))
        for member in plan.members:
            if plan.digest not in self._accepted(member, key):
                raise Violation(f"view {key} decided, but {member[:4]} holds no acceptance")

    def on_write(self, device: DeviceId) -> None:
        record = _read(self.read_disk(device)[-1])
        plan = record.plan if isinstance(record, AcceptedRecord) else None
        if plan is not None and len(self._accepted(device, key_of(plan))) > 1:
            raise Violation(f"{device[:4]} accepted two plans for view {key_of(plan)}")

    def _accepted(self, device: DeviceId, key: Key) -> set[Digest]:
        records = map(_read, self.read_disk(device))
        plans = [record.plan for record in records if isinstance(record, AcceptedRecord)]
        return {plan.digest for plan in plans if key_of(plan) == key}


@dataclass
class MembershipChecker:
    """Who saw whom up or down, and when; asked about bounds afterwards."""

    downs: list[tuple[float, DeviceId, DeviceId]] = field(default_factory=list)
    ups: list[tuple[float, DeviceId, DeviceId]] = field(default_factory=list)
    kinds: list[tuple[float, DeviceId, DeviceId, str]] = field(default_factory=list)
    suspected: list[tuple[float, DeviceId, DeviceId]] = field(default_factory=list)

    def on_event(self, now: float, observer: DeviceId, event: object) -> None:
        if isinstance(event, MemberDown):
            self.downs.append((now, observer, event.device))
            self.kinds.append((now, observer, event.device, event.kind))
        elif isinstance(event, MemberSuspected):
            self.suspected.append((now, observer, event.device))
        elif isinstance(event, MemberUp):
            self.ups.append((now, observer, event.record.device))

    def require_down(
        self, subject: DeviceId, observers: set[DeviceId], *, since: float, within_s: float
    ) -> float:
        """Every observer saw `subject` go down in time; gives the slowest delay."""
        return self._require(self.downs, subject, observers, since, within_s, "dead")

    def require_up(
        self, subject: DeviceId, observers: set[DeviceId], *, since: float, within_s: float
    ) -> float:
        return self._require(self.ups, subject, observers, since, within_s, "back")

    def require_no_down(
        self, *, since: float, but: DeviceId | None = None, deaf: DeviceId | None = None
    ) -> None:
        """Nobody was declared dead since, except `but`, and except by `deaf`."""
        false = [d for d in self.downs if d[0] >= since and d[2] != but and d[1] != deaf]
        if false:
            at, observer, subject = false[0]
            raise Violation(f"{observer[:4]} declared {subject[:4]} dead at {at:.2f} s, wrongly")

    def require_no_suspicion(self, *, since: float, by: DeviceId | None = None) -> None:
        """Nobody was suspected since; `by`: only what that observer thinks counts."""
        for at, observer, subject in self.suspected:
            if at >= since and by in (None, observer):
                raise Violation(f"{observer[:4]} suspected {subject[:4]} at {at:.2f} s, wrongly")

    def _require(
        self, seen: list[tuple[float, DeviceId, DeviceId]], subject: DeviceId,
        observers: set[DeviceId], since: float, within_s: float, what: str,
    ) -> float:  # fmt: skip
        first: dict[DeviceId, float] = {}
        for at, observer, who in seen:
            if who == subject and at >= since:
                first.setdefault(observer, at - since)
        for observer in sorted(observers):
            if first.get(observer, within_s + 1.0) > within_s:
                told = f"after {first[observer]:.2f} s" if observer in first else "never"
                raise Violation(f"{observer[:4]} saw {subject[:4]} {what} {told}")
        return max((first[o] for o in observers), default=0.0)
