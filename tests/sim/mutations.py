"""Production cores with one rule broken each: a simulator that misses one is worth nothing."""

from __future__ import annotations

from p2ptrain.agreement.events import PlanDecided
from p2ptrain.agreement.journal import AcceptedRecord, JournalRecord
from p2ptrain.agreement.machine import Agreement
from p2ptrain.ids import DeviceId
from p2ptrain.membership.machine import Membership
from tests.sim.world import Rules


class AcceptTwice(Agreement):
    """An acceptor forgets that it accepted another plan for the view."""

    def _conflict(self, key, digest):  # type: ignore[no-untyped-def]  # as in Agreement
        return None


class DecideByMajority(Agreement):
    """The proposer does not wait for everybody."""

    def _complete(self, round_):  # type: ignore[no-untyped-def]  # as in Agreement
        return 2 * len(round_.accepted) > len(round_.plan.members)


class ForgetAcceptance(Agreement):
    """The acceptance is sent without being durable."""

    def _remember(self, record: JournalRecord) -> None:
        if not isinstance(record, AcceptedRecord):
            super()._remember(record)


class ForgetOnRestart(Agreement):
    """A restarted acceptor starts from nothing."""

    def restore(self, records: object, now: float) -> None:
        pass


class DecideAgain(Agreement):
    """A repeated decision is told to the shell again."""

    def _take_decision(self, message, sender):  # type: ignore[no-untyped-def]  # as in Agreement
        super()._take_decision(message, sender)
        slot = self._slots[(message.run, message.lineage, message.view)]
        if not self._events:
            self._events.append(PlanDecided(plan=slot.plan, contract=slot.contract))


class NeverRepeat(Agreement):
    """Lost messages stay lost."""

    def tick(self, now: float) -> None:
        for round_ in self._rounds.values():
            round_.repeat.advance(now, self._rng)
        for slot in self._slots.values():
            slot.repeat = None
        super().tick(now)


class IgnoreRefusal(Membership):
    """A refused re-dial is taken for a broken link."""

    def link_down(self, device: DeviceId, refused: bool, now: float) -> None:
        super().link_down(device, False, now)


class IgnoreLag(Membership):
    """A peer that was stopped blames the others for the silence."""

    def lag(self, seconds: float, now: float) -> None:
        pass


class NeverAskTheDead(Membership):
    """A dead peer's link is not probed and its answers are not heard."""

    def heard(self, device: DeviceId, now: float) -> None:
        if self._peers[device].state.value != "dead":
            super().heard(device, now)


class TrustForever(Membership):
    """Silence is never death."""

    def _judge(self, device, peer, now):  # type: ignore[no-untyped-def]  # as in Membership
        peer.silent_since_s = now


MUTATIONS: dict[str, tuple[Rules, str]] = {
    "accept twice": (Rules(agreement=AcceptTwice), "accepted two plans"),
    "decide by majority": (Rules(agreement=DecideByMajority), "holds no acceptance"),
    "acceptance not durable": (Rules(agreement=ForgetAcceptance), "holds no acceptance"),
    "acceptance forgotten": (Rules(agreement=ForgetOnRestart), "accepted two plans"),
    "decision told again": (Rules(agreement=DecideAgain), "told twice"),
    "nothing repeated": (Rules(agreement=NeverRepeat), "is not decided"),
    "refusal ignored": (Rules(membership=IgnoreRefusal), "dead"),
    "lag ignored": (Rules(membership=IgnoreLag), "wrongly"),
    "the dead stay dead": (Rules(membership=NeverAskTheDead), "alive"),
    "silence trusted": (Rules(membership=TrustForever), "dead never"),
}
"""Name, broken rules, and what some seed's violation must say."""
