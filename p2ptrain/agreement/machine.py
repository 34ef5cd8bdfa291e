"""How a view gets its plan: decided when every member durably accepted exactly that plan.

First form. Only the home peer of a plan proposes it, and it is itself a member, so two plans for
one (run, lineage, view) would both need its acceptance, which it gives once. State is kept per
(run, lineage, view), and the decided plans of a run form a chain: one Paxos instance per view
takes this place when views must change without all of their members.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from p2ptrain import limits
from p2ptrain.agreement.events import (
    AgreementEvent,
    PlanDecided,
    ProposalFailed,
    ProposalReceived,
    ProposalWithdrawn,
)
from p2ptrain.agreement.journal import AcceptedRecord, DecidedRecord, JournalRecord
from p2ptrain.agreement.messages import Accept, Decided, Propose, Refuse, Withdraw
from p2ptrain.agreement.states import TRANSITIONS, Input, Stand
from p2ptrain.errors import CheckpointError, LocalProtocolError, RemoteProtocolError
from p2ptrain.ids import DeviceId, Digest, Lineage, RunId, ViewNumber, short
from p2ptrain.planner.plan import Plan
from p2ptrain.training.contract import Contract
from p2ptrain.wire.machine import Outgoing


class _Key(NamedTuple):
    run: RunId
    lineage: Lineage
    view: ViewNumber


def _key(of: Plan | Accept | Refuse | Decided | Withdraw | DecidedRecord) -> _Key:
    return _Key(of.run, of.lineage, of.view)


@dataclass(slots=True, kw_only=True)
class _Repeat:
    """When to say something again: back-off with jitter, until it is answered."""

    wait_s: float = limits.RETRANSMIT_FIRST_S
    at_s: float

    def advance(self, now: float, rng: random.Random) -> None:
        self.wait_s = min(limits.RETRANSMIT_MAX_S, self.wait_s * 2.0)
        self.at_s = now + self.wait_s * rng.uniform(0.8, 1.2)


@dataclass(slots=True, kw_only=True)
class _Slot:
    """A member's side of one view."""

    plan: Plan
    digest: Digest
    contract: Contract
    proposer: DeviceId
    stand: Stand = Stand.OFFERED
    accepted: bool = False
    reason: str = ""
    repeat: _Repeat | None = None


@dataclass(slots=True, kw_only=True)
class _Round:
    """The proposer's side of one open proposal."""

    plan: Plan
    digest: Digest
    contract: Contract
    due_at_s: float
    repeat: _Repeat
    accepted: set[DeviceId] = field(default_factory=set)

    @property
    def missing(self) -> tuple[DeviceId, ...]:
        return tuple(d for d in self.plan.members if d not in self.accepted)


@dataclass(frozen=True, slots=True, kw_only=True)
class AgreementStatistics:
    """What an agreement machine holds now."""

    proposing_count: int
    """Own proposals that are open."""
    offered_count: int
    accepted_count: int
    """Accepted here and not yet decided or withdrawn."""
    decided_count: int


class Agreement:
    """The agreement machine of one peer; see `p2ptrain.wire.machine` for the verbs."""

    def __init__(self, *, device: DeviceId, rng: random.Random) -> None:
        self._device = device
        self._rng = rng
        self._slots: dict[_Key, _Slot] = {}
        self._rounds: dict[_Key, _Round] = {}
        self._view_seen: dict[tuple[RunId, Lineage], ViewNumber] = {}
        self._writes: list[JournalRecord] = []
        self._outgoing: list[Outgoing] = []
        self._events: list[AgreementEvent] = []

    # What the shell reads.

    def chain(self, run: RunId, lineage: Lineage) -> tuple[Plan, ...]:
        """The decided plans of a run's lineage known here, by rising view."""
        plans = (slot.plan for slot in self._slots.values() if slot.stand is Stand.DECIDED)
        ours = (plan for plan in plans if (plan.run, plan.lineage) == (run, lineage))
        return tuple(sorted(ours, key=lambda plan: plan.view))

    def statistics(self) -> AgreementStatistics:
        """Counts of what is held now."""
        stands = [slot.stand for slot in self._slots.values()]
        return AgreementStatistics(
            proposing_count=len(self._rounds),
            offered_count=stands.count(Stand.OFFERED),
            accepted_count=stands.count(Stand.ACCEPTED),
            decided_count=stands.count(Stand.DECIDED),
        )

    def next_view(self, run: RunId, lineage: Lineage) -> ViewNumber:
        """The lowest view that nobody is known to have been asked about; the first is 1."""
        return ViewNumber(self._view_seen.get((run, lineage), 0) + 1)

    # Inputs.

    def restore(self, records: Iterable[JournalRecord], now: float) -> None:
        """Take back what was durable before a restart, oldest first, before any other input.

        Raises:
            CheckpointError: the records contradict each other; the peer must not take part.
        """
        for record in records:
            if isinstance(record, AcceptedRecord):
                self._restore_accepted(record, now)
            else:
                slot = self._slots.get(_key(record))
                if slot is None or slot.digest != record.plan:
                    raise CheckpointError("the journal decides a plan it never accepted")
                slot.stand, slot.repeat = Stand.DECIDED, None

    def propose(self, plan: Plan, contract: Contract, now: float) -> None:
        """Ask all members of `plan`, this peer included; ends in PlanDecided or ProposalFailed.

        This peer's own part comes as a ProposalReceived like everybody's.

        Raises:
            LocalProtocolError: not ours to propose, or the view is taken: use `next_view`.
        """
        key, digest = _key(plan), plan.digest
        if plan.home != self._device:
            raise LocalProtocolError("only the home peer of a plan proposes it")
        if contract.digest != plan.contract:
            raise LocalProtocolError("the contract is not the one the plan names")
        if key in self._rounds or self._conflict(key, digest) is not None:
            raise LocalProtocolError(f"view {plan.view} is taken, propose a later one")
        self._rounds[key] = _Round(
            plan=plan,
            digest=digest,
            contract=contract,
            due_at_s=now + limits.PROPOSAL_TIMEOUT_S,
            repeat=_Repeat(at_s=now + limits.RETRANSMIT_FIRST_S),
        )
        self._ask(self._rounds[key], now)

    def accept(self, plan: Digest, now: float) -> None:
        """The shell takes part in a plan it was offered; durable before anybody hears of it.

        An answer that comes after the proposal was withdrawn does nothing.
        """
        slot = self._slot_of(plan)
        if slot is None:
            return
        before = slot.stand
        self._step(slot, Input.ACCEPT)
        if before is Stand.OFFERED:
            slot.accepted = True
            self._remember(
                AcceptedRecord(plan=slot.plan, contract=slot.contract, proposer=slot.proposer)
            )
            slot.repeat = _Repeat(at_s=now + limits.RETRANSMIT_FIRST_S)
            self._answer(slot, now)

    def refuse(self, plan: Digest, reason: str, now: float) -> None:
        """The shell does not take part (memory, power, policy); `reason` reaches the proposer."""
        slot = self._slot_of(plan)
        if slot is not None and self._step(slot, Input.REFUSE) is Stand.REFUSED:
            slot.reason = reason[: limits.REASON_CHARACTERS_MAX]
            self._answer(slot, now)

    def withdraw(self, plan: Digest, reason: str, now: float) -> None:
        """The proposer gives up an open proposal; nothing happens when it is closed already."""
        for key, round_ in list(self._rounds.items()):
            if round_.digest == plan:
                self._fail(key, reason, (), now)

    def member_down(self, device: DeviceId, now: float) -> None:
        """A peer is gone: open proposals that need it fail at once and name it."""
        for key, round_ in list(self._rounds.items()):
            if device in round_.plan.members:
                self._fail(key, f"{short(device)} is gone", (device,), now)

    def receive(self, message: object, sender: DeviceId, now: float) -> None:
        """Take one agreement message.

        Raises:
            RemoteProtocolError: an impossible message; the caller drops the link.
            LocalProtocolError: not an agreement message; the caller's dispatch is wrong.
        """
        match message:
            case Propose():
                self._take_proposal(message, sender, now)
            case Accept():
                self._take_accept(message, sender, now)
            case Refuse():
                self._take_refusal(message, sender, now)
            case Decided():
                self._take_decision(message, sender)
            case Withdraw():
                self._take_withdrawal(message, sender)
            case _:
                raise LocalProtocolError(f"{type(message).__name__} is no agreement message")

    def tick(self, now: float) -> None:
        """Repeat what is unanswered, and fail proposals whose time is up."""
        for key, round_ in list(self._rounds.items()):
            if now >= round_.due_at_s:
                self._fail(key, "no answer in time", round_.missing, now)
            elif now >= round_.repeat.at_s:
                round_.repeat.advance(now, self._rng)
                self._ask(round_, now)
        for slot in list(self._slots.values()):
            if slot.repeat is not None and now >= slot.repeat.at_s:
                slot.repeat.advance(now, self._rng)
                self._answer(slot, now)

    # Outputs.

    def deadline(self) -> float | None:
        """The next repetition or time-out."""
        times = [min(r.due_at_s, r.repeat.at_s) for r in self._rounds.values()]
        times += [s.repeat.at_s for s in self._slots.values() if s.repeat is not None]
        return min(times, default=None)

    def writes(self) -> list[JournalRecord]:
        """Drain the records that must be durable before `outgoing` is sent."""
        drained, self._writes = self._writes, []
        return drained

    def outgoing(self) -> list[Outgoing]:
        """Drain the messages to send."""
        drained, self._outgoing = self._outgoing, []
        return drained

    def events(self) -> list[AgreementEvent]:
        """Drain the events, in order."""
        drained, self._events = self._events, []
        return drained

    # The member's side.

    def _take_proposal(self, message: Propose, sender: DeviceId, now: float) -> None:
        plan, key, digest = message.plan, _key(message.plan), message.plan.digest
        slot = self._slots.get(key)
        if slot is not None and slot.digest == digest:
            self._step(slot, Input.PROPOSED)
            self._answer(slot, now)
            return
        problem = self._objection(message, sender) or self._conflict(key, digest)
        if problem is not None:
            self._refuse_unheld(plan, digest, sender, problem, now)
            return
        self._forget_closed()
        self._slots[key] = _Slot(
            plan=plan, digest=digest, contract=message.contract, proposer=sender
        )
        self._note_view(key)
        self._events.append(ProposalReceived(plan=plan, contract=message.contract))

    def _objection(self, message: Propose, sender: DeviceId) -> str | None:
        """What is wrong with the proposal itself."""
        plan = message.plan
        if sender != plan.home:
            return "only the home peer of a plan proposes it"
        if self._device not in plan.members:
            return "this peer is not a member of the plan"
        if message.contract.digest != plan.contract:
            return "the contract is not the one the plan names"
        if not 1 <= plan.view < limits.VIEW_MAX or plan.lineage < 0:
            return "views count from 1 and lineages from 0"
        offered = sum(slot.stand is Stand.OFFERED for slot in self._slots.values())
        if offered >= limits.PROPOSALS_OPEN_MAX:
            return "too many proposals wait for an answer"
        return None

    def _conflict(self, key: _Key, digest: Digest) -> str | None:
        """Why another plan cannot be accepted for this view: the heart of the safety rule."""
        slot = self._slots.get(key)
        if slot is not None and slot.digest != digest:
            if slot.accepted:
                return "another plan was accepted for this view"
            if slot.stand is Stand.OFFERED:
                return "another plan is proposed for this view"
        chain = self.chain(key.run, key.lineage)
        if chain and chain[-1].view > key.view:
            return f"view {chain[-1].view} is already decided"
        return None

    def _forget_closed(self) -> None:
        """Bound what refused and withdrawn offers may occupy; acceptances are never dropped."""
        closed = [
            key
            for key, slot in self._slots.items()
            if not slot.accepted and slot.stand is not Stand.OFFERED
        ]
        for key in closed[: -limits.PROPOSALS_OPEN_MAX]:
            del self._slots[key]

    def _refuse_unheld(
        self, plan: Plan, digest: Digest, sender: DeviceId, reason: str, now: float
    ) -> None:
        refusal = Refuse(
            run=plan.run, lineage=plan.lineage, view=plan.view, plan=digest, reason=reason,
            view_seen=self._view_seen.get((plan.run, plan.lineage), ViewNumber(0)),
        )  # fmt: skip
        self._send(sender, refusal, now)

    def _answer(self, slot: _Slot, now: float) -> None:
        """Tell the proposer where this member stands, if it has been decided here."""
        if slot.stand in (Stand.ACCEPTED, Stand.DECIDED):
            plan = slot.plan
            accept = Accept(run=plan.run, lineage=plan.lineage, view=plan.view, plan=slot.digest)
            self._send(slot.proposer, accept, now)
        elif slot.stand is Stand.REFUSED:
            self._refuse_unheld(slot.plan, slot.digest, slot.proposer, slot.reason, now)

    def _take_decision(self, message: Decided, sender: DeviceId) -> None:
        slot = self._slots.get(_key(message))
        if slot is None or slot.digest != message.plan or sender != slot.proposer:
            raise RemoteProtocolError("a plan was decided that this member never accepted")
        self._decide(slot)

    def _decide(self, slot: _Slot) -> None:
        before = slot.stand
        if self._step(slot, Input.DECIDE) is before:
            return
        slot.repeat = None
        key = _key(slot.plan)
        self._remember(
            DecidedRecord(run=key.run, lineage=key.lineage, view=key.view, plan=slot.digest)
        )
        self._events.append(PlanDecided(plan=slot.plan, contract=slot.contract))

    def _take_withdrawal(self, message: Withdraw, sender: DeviceId) -> None:
        slot = self._slots.get(_key(message))
        if slot is None or slot.digest != message.plan or sender != slot.proposer:
            return
        before = slot.stand
        slot.repeat = None
        if self._step(slot, Input.WITHDRAW) is not before:
            self._events.append(ProposalWithdrawn(plan=slot.plan, reason=message.reason))

    def _step(self, slot: _Slot, what: Input) -> Stand:
        after = TRANSITIONS.get((slot.stand, what))
        if after is None:
            sentence = f"{what.value}, but the plan is {slot.stand.value}"
            if what in (Input.ACCEPT, Input.REFUSE):
                raise LocalProtocolError(sentence)
            raise RemoteProtocolError(sentence)
        slot.stand = after
        return after

    def _slot_of(self, plan: Digest) -> _Slot | None:
        """The slot that holds this plan; None when it was withdrawn and another came since."""
        return next((slot for slot in self._slots.values() if slot.digest == plan), None)

    # The proposer's side.

    def _ask(self, round_: _Round, now: float) -> None:
        proposal = Propose(plan=round_.plan, contract=round_.contract)
        for device in round_.missing:
            self._send(device, proposal, now)

    def _take_accept(self, message: Accept, sender: DeviceId, now: float) -> None:
        key = _key(message)
        slot, round_ = self._slots.get(key), self._rounds.get(key)
        if slot is not None and slot.stand is Stand.DECIDED and slot.digest == message.plan:
            self._send(sender, self._decision(slot.plan, slot.digest), now)
        elif round_ is None or round_.digest != message.plan:
            reason = "the proposal is no longer open"
            self._send(sender, self._withdrawal(key, message.plan, reason), now)
        elif sender not in round_.plan.members:
            raise RemoteProtocolError("a plan was accepted by a peer that is not its member")
        else:
            round_.accepted.add(sender)
            if self._complete(round_):
                self._close_decided(key, round_, now)

    def _complete(self, round_: _Round) -> bool:
        """Unanimity: a view's plan is decided when nobody is missing."""
        return not round_.missing

    def _close_decided(self, key: _Key, round_: _Round, now: float) -> None:
        del self._rounds[key]
        self._decide(self._slots[key])
        for device in round_.plan.members:
            if device != self._device:
                self._send(device, self._decision(round_.plan, round_.digest), now)

    def _take_refusal(self, message: Refuse, sender: DeviceId, now: float) -> None:
        key = _key(message)
        self._note_view(_Key(key.run, key.lineage, max(message.view_seen, message.view)))
        round_ = self._rounds.get(key)
        if round_ is None or round_.digest != message.plan or sender in round_.accepted:
            return
        self._fail(key, f"{short(sender)} refused: {message.reason}", (sender,), now)

    def _fail(self, key: _Key, reason: str, devices: tuple[DeviceId, ...], now: float) -> None:
        round_ = self._rounds.pop(key)
        self._note_view(key)
        if devices and reason == "no answer in time":
            reason = f"no answer in time from {', '.join(short(d) for d in devices)}"
        self._events.append(ProposalFailed(plan=round_.plan, reason=reason, devices=devices))
        for device in round_.plan.members:
            self._send(device, self._withdrawal(key, round_.digest, reason), now)

    # Both sides.

    def _restore_accepted(self, record: AcceptedRecord, now: float) -> None:
        key = _key(record.plan)
        held = self._slots.get(key)
        if held is not None and held.digest != record.plan.digest:
            raise CheckpointError("the journal accepts two plans for one view")
        self._slots[key] = _Slot(
            plan=record.plan,
            digest=record.plan.digest,
            contract=record.contract,
            proposer=record.proposer,
            stand=Stand.ACCEPTED,
            accepted=True,
            repeat=_Repeat(at_s=now + limits.RETRANSMIT_FIRST_S),
        )
        self._note_view(key)

    def _remember(self, record: JournalRecord) -> None:
        self._writes.append(record)

    def _note_view(self, key: _Key) -> None:
        seen = self._view_seen.get((key.run, key.lineage), ViewNumber(0))
        self._view_seen[key.run, key.lineage] = max(seen, key.view)

    def _decision(self, plan: Plan, digest: Digest) -> Decided:
        return Decided(run=plan.run, lineage=plan.lineage, view=plan.view, plan=digest)

    def _withdrawal(self, key: _Key, plan: Digest, reason: str) -> Withdraw:
        return Withdraw(
            run=key.run, lineage=key.lineage, view=key.view, plan=plan,
            reason=reason[: limits.REASON_CHARACTERS_MAX],
        )  # fmt: skip

    def _send(self, to: DeviceId, message: object, now: float) -> None:
        """To others over the wire; to ourselves at once."""
        if to == self._device:
            self.receive(message, self._device, now)
        else:
            self._outgoing.append(Outgoing(to=to, message=message))
