"""Production cores with one rule broken each: a simulator that misses one is worth nothing."""

from __future__ import annotations

import dataclasses

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


class TrustForever(Membership):
    """Silence is never death."""

    def _accuse(self, device, peer, now):  # type: ignore[no-untyped-def]  # as in Detector
        peer.answered()


class NeverAskOthers(Membership):
    """What does not answer us directly is judged at once."""

    def _ask_through(self, target: DeviceId, count: int, now: float) -> None:
        pass


class IgnoreConfirmations(Membership):
    """However many others confirm a suspicion, it takes its longest time."""

    def _next_step(self, peer):  # type: ignore[no-untyped-def]  # as in Detector
        if peer.suspicion is not None:
            peer.suspicion.accusers.intersection_update({self._own.device})
        return super()._next_step(peer)

    def _believe_dead(self, accusation, peer, now):  # type: ignore[no-untyped-def]  # as above
        pass


class NeverContradict(Membership):
    """Who is held dead does not raise its standing."""

    def _contradict(self, accusation, sender):  # type: ignore[no-untyped-def]  # as in Exchange
        pass


class NeverHearTheDead(NeverContradict):
    """A dead peer's answers are not heard, and it does not contradict."""

    def heard(self, device: DeviceId, now: float) -> None:
        if self._peers[device].state.value != "dead":
            super().heard(device, now)


class BelieveHearsay(Membership):
    """What others say counts for more than what is heard over the own link."""

    def _take_accusation(self, accusation, sender, now):  # type: ignore[no-untyped-def]  # as above
        peer = self._peers.get(accusation.device)
        if peer is None or peer.record is None:
            super()._take_accusation(accusation, sender, now)
        else:
            self._believe_dead(accusation, peer, now)


class BelieveOldWords(Membership):
    """Any newer record brings the dead back, whatever its standing."""

    def _outranks(self, record, peer):  # type: ignore[no-untyped-def]  # as in Exchange
        return True


class NeverPassOn(Membership):
    """Nobody tells what others said."""

    def _start_gossip(self, now: float) -> None:
        pass


class ForgetTheLeave(Membership):
    """That a peer had said that it goes makes no difference."""

    def _condemn(self, device, peer, sign, kind, now):  # type: ignore[no-untyped-def]  # as above
        record = peer.record
        peer.record = None if record is None else dataclasses.replace(record, leaving=False)
        super()._condemn(device, peer, sign, kind, now)
        peer.record = record


MUTATIONS: dict[str, tuple[Rules, str]] = {
    "accept twice": (Rules(agreement=AcceptTwice), "accepted two plans"),
    "decide by majority": (Rules(agreement=DecideByMajority), "holds no acceptance"),
    "acceptance not durable": (Rules(agreement=ForgetAcceptance), "holds no acceptance"),
    "acceptance forgotten": (Rules(agreement=ForgetOnRestart), "accepted two plans"),
    "decision told again": (Rules(agreement=DecideAgain), "told twice"),
    "nothing repeated": (Rules(agreement=NeverRepeat), "is not decided"),
    "refusal ignored": (Rules(membership=IgnoreRefusal), "dead"),
    "lag ignored": (Rules(membership=IgnoreLag), "wrongly"),
    "the dead stay dead": (Rules(membership=NeverHearTheDead), "alive"),
    "silence trusted": (Rules(membership=TrustForever), "dead never"),
    "nobody asked for us": (Rules(membership=NeverAskOthers), "wrongly"),
    "confirmations ignored": (Rules(membership=IgnoreConfirmations), "dead after"),
    "hearsay believed": (Rules(membership=BelieveHearsay), "wrongly"),
}
"""Name, broken rules, and what some seed's violation must say."""

MESH_MUTATIONS: dict[str, tuple[Rules, str]] = {
    "accusations not contradicted": (Rules(membership=NeverContradict), "holds .* alive"),
    "old words believed": (Rules(membership=BelieveOldWords), "old words"),
    "news not passed on": (Rules(membership=NeverPassOn), "knows everybody|holds"),
    "nobody asked for the far ones": (Rules(membership=NeverAskOthers), "wrongly|holds|knows"),
    "leave forgotten": (Rules(membership=ForgetTheLeave), "left"),
}
"""The same for groups in which links are few."""
