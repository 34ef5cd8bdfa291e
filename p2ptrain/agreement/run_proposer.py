"""The proposer of a run's next view: one ballot at a time, from promises to a decision."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection
from dataclasses import replace

from p2ptrain import limits
from p2ptrain.agreement.ballot import Ballot
from p2ptrain.agreement.run_events import PromisedInventory, ProposalWanted
from p2ptrain.agreement.run_memory import Heard
from p2ptrain.agreement.run_messages import (
    DecidedView,
    RunMessage,
    ViewAccept,
    ViewAccepted,
    ViewPrepare,
    ViewPromise,
    ViewRefusal,
)
from p2ptrain.agreement.run_outbox import Outbox
from p2ptrain.agreement.run_round import Phase, Round
from p2ptrain.agreement.run_rules import Rules
from p2ptrain.agreement.run_steps import merged_records
from p2ptrain.agreement.run_wishes import Wishes
from p2ptrain.agreement.view import View
from p2ptrain.errors import LocalProtocolError
from p2ptrain.ids import DeviceId, ViewNumber
from p2ptrain.wire.codec import encode


class Proposer:
    """Opens ballots when wishes say so; `decided` is told what a quorum accepted.

    Args:
        present: Members of a view that are believed to be reachable, this peer included.
    """

    def __init__(
        self,
        out: Outbox,
        rng: random.Random,
        rules: Rules,
        heard: Heard,
        *,
        present: Callable[[View], frozenset[DeviceId]],
        decided: Callable[[View, float], None],
    ) -> None:
        self.wishes = Wishes(rng)
        self.hindrance = ""
        """Why the shell, here or at another proposer, could not plan; empty: it could."""
        self.round_seen = 0
        """The highest round of any ballot of this instance."""
        self.ballot_count = 0
        self._out = out
        self._rules, self._heard = rules, heard
        self._present = present
        self._decided = decided
        self._round: Round | None = None
        self._gather_s = limits.GATHER_S

    def begin(self) -> None:
        """A view counts from now: its instance is new."""
        self._round, self.round_seen, self.hindrance = None, 0, ""
        self._gather_s = limits.GATHER_S

    def propose_at_s(self, *, promised: bool) -> float | None:
        """When to open a ballot by itself; None while one is open or no quorum is reachable."""
        view = self._out.present
        present = self._present(view)
        if self._round is not None or not self._rules.is_quorum(view, present):
            return None
        first = sorted(present, key=lambda device: (device != view.plan.home, device))
        return self.wishes.propose_at_s(first.index(self._out.device), promised=promised)

    def deadline_s(self) -> float | None:
        """The open ballot's next repetition or end of phase."""
        return None if self._round is None else self._round.deadline_s

    def open_ballot(self, now: float) -> None:
        """Ask all members of the present view, this one too, for their promises."""
        self.round_seen += 1
        self.ballot_count += 1
        ballot = Ballot(round=self.round_seen, device=self._out.device)
        self._round = Round(
            ballot=ballot, base=self._out.present, phase_due_s=now + limits.BALLOT_TIMEOUT_S,
            repeat_at_s=now + limits.RETRANSMIT_FIRST_S,
        )  # fmt: skip
        self._say(self._round, now)

    def give_way(self, ballot: Ballot) -> None:
        """A ballot was promised; an own, other one that is open has lost."""
        self.round_seen = max(self.round_seen, ballot.round)
        if self._round is not None and self._round.ballot != ballot:
            self._round = None

    def reachable_changed(self, now: float) -> None:
        """Whoever is gone is not waited for."""
        if self._round is not None and self._round.phase is Phase.GATHERING:
            self._weigh(self._round, now)

    def tick(self, now: float) -> None:
        """Repeat what is unanswered, or end a phase whose time is up."""
        round_ = self._round
        if round_ is None or now < round_.deadline_s:
            return
        if now < round_.phase_due_s:
            round_.repeated(now)
            self._say(round_, now)
        elif round_.phase is Phase.GATHERING:
            self._ask_plan(round_, now)
        else:
            self._give_up(now, limits.DUEL_BACKOFF_S)

    def receive(
        self, message: ViewPromise | ViewRefusal | ViewAccepted, sender: DeviceId, now: float
    ) -> None:
        """An answer to a ballot of this peer; answers to closed ones do nothing."""
        round_ = self._round
        if round_ is None or message.ballot != round_.ballot:
            return
        match message:
            case ViewRefusal():
                self.round_seen = max(self.round_seen, message.promised.round)
                if message.promised > round_.ballot:
                    self._give_up(now, limits.DUEL_BACKOFF_S)
            case ViewPromise():
                if round_.phase in (Phase.PREPARING, Phase.GATHERING):
                    round_.add_promise(message, sender)
                    self._weigh(round_, now)
            case ViewAccepted():
                if round_.phase is Phase.ACCEPTING and round_.value is not None:
                    round_.accepted.add(sender)
                    if self._rules.is_quorum(round_.base, round_.accepted):
                        self._decide(round_.base, round_.value, now)

    def propose(self, view: View, ballot: Ballot, now: float) -> None:
        """The shell's plan for an open ballot; LocalProtocolError when it does not follow."""
        round_ = self._planning(ballot)
        if round_ is None:
            return
        view = self.with_journals(view)
        problem = self._rules.follows(round_.base, view)
        if problem is None and view.resume_step != self._resume_step(round_):
            problem = "it does not resume where the promises say"
        if problem is None and len(encode(DecidedView(value=view))) > limits.VIEW_BYTES_MAX:
            problem = "it is too large to be sent"
        if problem is not None:
            raise LocalProtocolError(f"view {view.number} cannot be proposed: {problem}")
        self.hindrance = ""
        self._ask_acceptance(round_, view, now)

    def with_journals(self, view: View) -> View:
        """The view with the memories that have a vote in it, as far as they are known here."""
        journals = tuple(map(self._heard.journal_of, view.members))
        return replace(view, journals=journals)

    def cannot_propose(self, reason: str, ballot: Ballot, now: float) -> None:
        """The shell cannot plan for an open ballot, which is given up and tried again."""
        round_ = self._planning(ballot)
        if round_ is not None:
            self.hindrance = reason[: limits.REASON_CHARACTERS_MAX]
            self._say(round_, now)  # so that everybody's status shows it now, not at the next try
            # What is missing may be with a member that is only slow to promise.
            self._gather_s = min(limits.GATHER_MAX_S, 2.0 * self._gather_s)
            self._give_up(now, limits.HINDERED_RETRY_S)

    def _planning(self, ballot: Ballot) -> Round | None:
        """The open round, if it is this ballot's and waits for the shell."""
        round_ = self._round
        waits = round_ is not None and round_.phase is Phase.PLANNING and round_.ballot == ballot
        return round_ if waits else None

    def _say(self, round_: Round, now: float) -> None:
        """Ask whoever has not answered; while planning, show everybody that it goes on."""
        if round_.phase is Phase.ACCEPTING and round_.value is not None:
            message: RunMessage = ViewAccept(
                **self._out.place(), ballot=round_.ballot, value=round_.value
            )
            answered: Collection[DeviceId] = round_.accepted
        else:
            message = ViewPrepare(
                **self._out.place(), ballot=round_.ballot, hindrance=self.hindrance
            )
            answered = round_.answers
            if round_.phase is Phase.PLANNING:
                answered = (self._out.device,)
        for member in sorted(set(round_.base.members) - set(answered)):
            if self._round is round_:
                self._out.send(member, message, now)

    def _give_up(self, now: float, wait_s: float) -> None:
        self._round = None
        self.wishes.back_off(now, wait_s)

    def _weigh(self, round_: Round, now: float) -> None:
        """With a quorum, adopt what may be decided already, or plan once all have promised.

        Whoever is believed reachable gets a moment more: inventories say what can be restored.
        """
        if not self._rules.is_quorum(round_.base, round_.promises):
            return
        adopted = self._rules.adopted(round_.promises)
        if adopted is not None:
            self._ask_acceptance(round_, adopted, now)
            return
        if round_.phase is Phase.PREPARING:
            round_.enter(Phase.GATHERING, now, now)
            round_.gathers_since_s = now
        round_.phase_due_s = round_.gathers_since_s + self._patience_s(round_)
        if now >= round_.phase_due_s:
            self._ask_plan(round_, now)

    def _patience_s(self, round_: Round) -> float:
        """How long those that seem to be reachable are waited for once there is a quorum.

        A stage whose device is left out is replayed, which takes longer than a slow link.
        """
        missing = self._present(round_.base) - round_.answers.keys()
        if any(round_.base.plan.stage_of(device) is not None for device in missing):
            return max(self._gather_s, limits.GATHER_STAGE_S)
        return self._gather_s if missing else 0.0

    def _resume_step(self, round_: Round) -> int:
        return self._rules.resume_step(round_.promises, round_.base)

    def _ask_plan(self, round_: Round, now: float) -> None:
        round_.enter(Phase.PLANNING, now + limits.PLANNING_TIMEOUT_S, now)
        promises = sorted(round_.answers.items())
        resume_step = self._resume_step(round_)
        told = [round_.base.records, *(promise.records for _, promise in promises)]
        self._out.events.append(
            ProposalWanted(
                ballot=round_.ballot,
                number=ViewNumber(round_.base.number + 1),
                base=round_.base,
                promises=tuple(
                    PromisedInventory(device=device, inventory=promise.inventory)
                    for device, promise in promises
                ),
                records=merged_records(told, resume_step),
                resume_step=resume_step,
            )
        )

    def _ask_acceptance(self, round_: Round, value: View, now: float) -> None:
        round_.value = value
        round_.enter(Phase.ACCEPTING, now + limits.BALLOT_TIMEOUT_S, now)
        self._say(round_, now)

    def _decide(self, base: View, value: View, now: float) -> None:
        self._decided(value, now)
        for device in sorted({*base.members, *value.members} - {self._out.device}):
            self._out.send(device, DecidedView(value=value), now)
