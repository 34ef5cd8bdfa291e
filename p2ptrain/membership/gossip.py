"""What is still to be told, and how often: news spreads like an epidemic and then dies out.

Source: SWIM section 4.1 and its dissemination count, a multiple of the logarithm of the group.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from p2ptrain import limits
from p2ptrain.ids import DeviceId
from p2ptrain.membership.accusation import DEAD, Accusation
from p2ptrain.membership.messages import News
from p2ptrain.membership.record import MemberRecord


@dataclass(slots=True, kw_only=True)
class _Rumour:
    item: MemberRecord | Accusation
    told_count: int = 0


class Rumours:
    """News that others told us and that we pass on; the least told goes first."""

    def __init__(self) -> None:
        self._about: dict[DeviceId, dict[str, _Rumour]] = {}

    def __bool__(self) -> bool:
        return bool(self._about)

    def add_record(self, record: MemberRecord) -> None:
        """Pass on a record; it takes the place of older ones and of what it refutes."""
        about = self._about.setdefault(record.device, {})
        for name, rumour in list(about.items()):
            item = rumour.item
            if isinstance(item, Accusation) and item.standing < record.standing:
                del about[name]
        about["record"] = _Rumour(item=record)

    def add_accusation(self, accusation: Accusation) -> None:
        """Pass on one accuser's suspicion, or a death, which says more than any suspicion."""
        about = self._about.setdefault(accusation.device, {})
        if accusation.verdict == DEAD:
            for name in [name for name in about if name != "record"]:
                del about[name]
            about[DEAD] = _Rumour(item=accusation)
        else:
            about[accusation.accuser] = _Rumour(item=accusation)

    def take(self, *, listeners: int, members: int) -> News:
        """The next message for `listeners` peers; what was told often enough is forgotten."""
        told_max = limits.GOSSIP_REPEATS * math.ceil(math.log10(members + 1))
        records: list[MemberRecord] = []
        accusations: list[Accusation] = []
        waiting = [(d, n, r) for d, about in self._about.items() for n, r in about.items()]
        for device, name, rumour in sorted(waiting, key=lambda each: each[2].told_count):
            if isinstance(rumour.item, MemberRecord):
                if len(records) >= limits.RECORDS_PER_MESSAGE_MAX:
                    continue
                records.append(rumour.item)
            else:
                if len(accusations) >= limits.ACCUSATIONS_PER_MESSAGE_MAX:
                    continue
                accusations.append(rumour.item)
            rumour.told_count += listeners
            if rumour.told_count >= told_max:
                self._forget(device, name)
        return News(records=tuple(records), accusations=tuple(accusations))

    def _forget(self, device: DeviceId, name: str) -> None:
        about = self._about[device]
        del about[name]
        if not about:
            del self._about[device]
