"""How the members of one run decide its views and steps: Paxos for the next view, fenced records.

The chain of views begins with one that all of its members accepted (`agreement.machine`), or that
somebody forced as a new lineage. Each later one is decided by a single-decree Paxos instance among
the members of the view before. A step is committed when a quorum of the view's members holds its
record durably and none of them had promised the next view before; so the promises for the next
view tell every committed step, and none is committed later (DESIGN section 7, rule 1).

Source: Lamport, "The Part-Time Parliament"; one instance per configuration after Lamport, Malkhi
and Zhou, "Vertical Paxos".
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterable

from p2ptrain import limits
from p2ptrain.agreement.ballot import Ballot
from p2ptrain.agreement.run_acceptor import Acceptor
from p2ptrain.agreement.run_commits import Commits
from p2ptrain.agreement.run_events import (
    Fenced,
    Paused,
    RunEvent,
    RunStatistics,
    Stance,
    Standing,
    Unpaused,
    ViewDecided,
)
from p2ptrain.agreement.run_journal import (
    AcceptanceRecord,
    PromiseRecord,
    RunJournalRecord,
    StepsRecord,
    ViewRecord,
)
from p2ptrain.agreement.run_messages import (
    DecidedView,
    StepRecorded,
    ViewAccept,
    ViewAccepted,
    ViewHead,
    ViewPrepare,
    ViewPromise,
    ViewRefusal,
)
from p2ptrain.agreement.run_outbox import Outbox
from p2ptrain.agreement.run_proposer import Proposer
from p2ptrain.agreement.run_recall import Recall
from p2ptrain.agreement.run_rules import Rules
from p2ptrain.agreement.view import View
from p2ptrain.errors import LocalProtocolError, RemoteProtocolError
from p2ptrain.ids import DeviceId, Digest, Lineage, RunId, ViewNumber, short
from p2ptrain.recovery.inventory import Inventory
from p2ptrain.training.step_record import StepRecord
from p2ptrain.wire.machine import Outgoing


class RunMachine:
    """The machine of one run at one peer; see `p2ptrain.wire.machine` for the verbs.

    Args:
        device: This peer.
        rng: For back-off, and to name a new journal: seeded anew in every process.
        inventory: What this peer holds of the run, asked at the moment of each promise.
        rules: What safety hangs on; only tests give another than the default.
        volatile: The shell keeps records of steps in memory alone, since its disk is slow: after
            this process the device begins another journal, as if it had lost this one.
    """

    def __init__(
        self,
        *,
        device: DeviceId,
        rng: random.Random,
        inventory: Callable[[], Inventory],
        rules: Rules | None = None,
        volatile: bool = False,
    ) -> None:
        self._device = device
        self._rng = rng
        self._inventory = inventory
        self._abstains = False
        self._acceptor = Acceptor()
        self._out = Outbox(device, loopback=self.receive)
        self._rules = Rules() if rules is None else rules
        self._recall = Recall(self._out, rng, self._rules, volatile=volatile)
        self._commits = Commits(
            self._out, rng, self._rules, may_record=self._may_record, memory=self._recall.memory
        )
        self._steps = self._commits.ledger
        self._proposer = Proposer(
            self._out, rng, self._rules, self._recall.heard,
            present=self._present, decided=self._install,
        )  # fmt: skip
        self._wishes = self._proposer.wishes
        self._reachable: frozenset[DeviceId] | None = None
        self._paused = ""
        self._heads_at_s: float | None = None
        self._decided_count = 0

    # What the shell reads.

    @property
    def view(self) -> View | None:
        """The newest decided view of the newest lineage known here."""
        return self._out.view

    @property
    def records(self) -> tuple[StepRecord, ...]:
        """Retained records, consecutive, newest last; also of steps before this view."""
        return self._steps.records

    @property
    def promised(self) -> bool:
        """Whether the next view is promised: no records and no updates under `view` any more."""
        return self._acceptor.promised is not None

    @property
    def replicated_step(self) -> int:
        """The newest step whose record another member of this view holds, too; 0: not known."""
        return self._steps.replicated

    @property
    def wanted(self) -> tuple[str, ...]:
        """Why a next view is wanted here; empty: it is not."""
        return self._wishes.reasons

    @property
    def standing(self) -> Standing:
        """How this peer stands to the run, for `status`."""
        if self._out.view is None:
            return Standing(stance=Stance.UNKNOWN)
        if self._device not in self._out.view.members:
            return Standing(stance=Stance.OUTSIDER)
        present = self._present(self._out.view)
        if not self._rules.is_quorum(self._out.view, present):
            missing = tuple(d for d in self._out.view.members if d not in present)
            counted = f"{len(present)} of {len(self._out.view.members)}"
            reason = f"no quorum ({counted}: {', '.join(map(short, missing))} missing)"
            return Standing(stance=Stance.PAUSED, reason=reason, missing=missing)
        if self._proposer.hindrance:
            return Standing(stance=Stance.PAUSED, reason=self._proposer.hindrance)
        return Standing(stance=Stance.ABSTAINING if self._abstains else Stance.MEMBER)

    def statistics(self) -> RunStatistics:
        """Counts since the process started, and what is held now."""
        return RunStatistics(
            view=0 if self._out.view is None else self._out.view.number,
            newest_step=self._steps.newest,
            committed_step=self._steps.committed,
            record_count=len(self._steps.records),
            ballot_count=self._proposer.ballot_count,
            decided_count=self._decided_count,
        )

    def snapshot(self) -> tuple[RunJournalRecord, ...]:
        """A whole journal that says what this machine remembers, to replace a long one."""
        if self._out.view is None:
            return ()
        view, promised = self._out.view, self._acceptor.promised
        found: list[RunJournalRecord] = [ViewRecord(view=view, abstains=self._abstains)]
        if self._steps.records:
            found.append(self._commits.journal_record(self._steps.records))
        if promised is not None:
            found.append(PromiseRecord(lineage=view.lineage, view=view.number, ballot=promised))
        if (held := self._acceptor.accepted) is not None:
            found.append(AcceptanceRecord(ballot=held.ballot, value=held.value))
        return (*found, self._recall.identity())  # last: it says how many records there were

    # Inputs.

    def restore(self, records: Iterable[RunJournalRecord], now: float) -> None:
        """Take back what was durable before a restart, oldest first, before any other input.

        A machine whose journal is gone names a new one. It has no vote in a view that names the
        old one, so losing the disk costs its vote until the next view, not safety. One that has
        its journal votes as soon as the others have said what they heard from it.
        """
        for record in records:
            self._recall.read(record)
            self._restore(record)
        if not self._recall.restarted(now):
            self._forget(now)
        if self._acceptor.promised is not None:
            self._wishes.promised(now)
        if self._out.view is not None:
            self._plan_heads(now)

    def found(self, view: View, now: float) -> None:
        """A lineage begins: all members accepted this view, or somebody forced it.

        Raises:
            LocalProtocolError: the lineage has begun already, with another view.
        """
        known = self._out.view
        if known is not None and known.lineage >= view.lineage:
            first = known.digest == view.digest
            if not first and known.lineage == view.lineage and known.number <= view.number:
                raise LocalProtocolError(f"lineage {view.lineage} was founded already")
            if first and self._abstains:
                self._abstains = False
                self._out.writes.append(ViewRecord(view=view, abstains=False))
            return
        self._install(view, now, founds=True)

    def force(self, view: View, now: float) -> None:
        """A person begins a new lineage here (`--force-view`), and everybody is told.

        Members vote in it with the journals they have named to this peer. With a restoration
        (and `previous` as the newest plan known here) the view keeps every step that these
        members can restore; without one its members get their states of `resume_step`. Who is
        not in it, or hears of it only by a later view, must drop what it holds of the run.

        Raises:
            LocalProtocolError: the lineage has begun already.
        """
        if self._out.view is not None and self._out.view.lineage >= view.lineage:
            raise LocalProtocolError(f"lineage {view.lineage} was founded already")
        self._install(self._proposer.with_journals(view), now)
        for device in sorted({*view.members, *(self._reachable or ())} - {self._device}):
            self._out.send(device, DecidedView(value=self._out.present), now)

    def complete(self, record: StepRecord, now: float, *, plan: Digest) -> None:
        """Every stage's `done` of the step is here: make it durable, then tell all members.

        Without effect where this peer has no say: it promised the next view, or is no member; and
        where the view has changed since: its members have dropped that step's gradients.

        Args:
            record: Of the step.
            now: The present moment.
            plan: The digest of the view's plan under which the step was made.
        """
        if self._out.view is not None and self._out.place()["plan"] == plan:
            self._commits.complete(record, now)

    def told(self, step: int, *, plan: Digest) -> None:
        """This device's own stage gives its result of a step, or has given all up to it.

        Before the first one, of the step that the view resumed from: from then on a member that
        says it recorded a later step is known to be wrong. Without effect where the view has
        changed since.
        """
        if self._out.view is not None and self._out.place()["plan"] == plan:
            self._commits.told(step)

    def reachable(self, devices: Collection[DeviceId], now: float) -> None:
        """Devices this peer can talk to now, members and others; the whole set each time."""
        before, self._reachable = self._reachable, frozenset(devices) - {self._device}
        if self._reachable == before:
            return
        self._recall.judge(self._reachable or (), now)
        self._wishes.reachable_changed(now)
        self._proposer.reachable_changed(now)
        if before is not None and not self._reachable <= before:
            self._wishes.somebody_returned(now)
        for device in sorted(self._reachable - (before or frozenset())):
            if self._out.view is not None:
                self._tell_head(device, now)
        self._judge()

    def want(self, reason: str, now: float, *, after_s: float) -> None:
        """A new view is wanted once `after_s` has passed without a later wish.

        A decided view ends all wishes: say it again if the reason is still there.
        """
        self._wishes.want(reason, now, after_s)

    def unwant(self, now: float) -> None:
        """The reasons for a new view vanished; a ballot that is under way goes on."""
        self._wishes.unwant()

    def propose(self, view: View, now: float, *, ballot: Ballot) -> None:
        """The shell's answer to `ProposalWanted`; a late one, to a closed ballot, does nothing.

        Raises:
            LocalProtocolError: the view does not follow from what was wanted, or is too large.
        """
        self._proposer.propose(view, ballot, now)
        self._judge()

    def cannot_propose(self, reason: str, now: float, *, ballot: Ballot) -> None:
        """The shell's other answer: no plan is possible now. The run pauses; it is tried again."""
        self._proposer.cannot_propose(reason, ballot, now)
        self._judge()

    def forget_before(self, step: int) -> None:
        """A whole replica set exists at `step`: records of earlier steps may go."""
        self._steps.forget_before(step)

    def receive(self, message: object, sender: DeviceId, now: float) -> None:
        """Take one message of this run.

        Raises:
            RemoteProtocolError: an impossible message; the caller drops the link.
            LocalProtocolError: not a message of a run's machine; the caller's dispatch is wrong.
        """
        if isinstance(message, ViewHead | ViewPromise | ViewAccepted | StepRecorded):
            restarted = self._recall.heard.note(sender, message.memory)
            if restarted and self._out.view is not None:
                self._tell_head(sender, now)  # it has no vote before: do not let it wait
        match message:
            case DecidedView():
                self._take_decided(message, sender, now)
            case ViewHead():
                self._take_head(message, sender, now)
            case StepRecorded():
                if self._is_about_present(message, sender, now):
                    self._commits.receive(message, sender, now)
            case ViewPrepare() | ViewAccept():
                if not self._is_about_present(message, sender, now):
                    return
                if self._has_vote and self._recall.may_answer(sender):
                    self._take_ballot(message, sender, now)
                elif self._abstains and isinstance(message, ViewPrepare):
                    self._out.send(sender, self._promise(message.ballot), now)
            case ViewPromise() | ViewRefusal() | ViewAccepted():
                if self._is_about_present(message, sender, now):
                    self._proposer.receive(message, sender, now)
            case _:
                raise LocalProtocolError(f"{type(message).__name__} is no message of a run")

    def tick(self, now: float) -> None:
        """Repeat what is unanswered, end phases, open a ballot when it is time."""
        self._recall.judge(self._reachable or (), now)
        self._proposer.tick(now)
        propose_at_s = self._propose_at_s()
        if propose_at_s is not None and now >= propose_at_s:
            self._proposer.open_ballot(now)
        if self._heads_at_s is not None and now >= self._heads_at_s:
            self._plan_heads(now)
            others = {*self._out.present.members, *(self._reachable or ())} - {self._device}
            for device in sorted(others):
                self._tell_head(device, now)
        self._commits.tick(now)

    # Outputs.

    def deadline(self) -> float | None:
        """The next repetition, end of a phase, or moment to propose."""
        times = (
            self._proposer.deadline_s(), self._propose_at_s(), self._heads_at_s,
            self._commits.deadline_s, self._recall.deadline_s,
        )  # fmt: skip
        return min((at_s for at_s in times if at_s is not None), default=None)

    def writes(self) -> list[RunJournalRecord]:
        """Drain the records that must be durable before `outgoing` is sent."""
        drained, self._out.writes = self._out.writes, []
        return self._recall.drained(drained)

    def outgoing(self) -> list[Outgoing]:
        """Drain the messages to send."""
        drained, self._out.outgoing = self._out.outgoing, []
        return drained

    def events(self) -> list[RunEvent]:
        """Drain the events, in order."""
        drained, self._out.events = self._out.events, []
        return drained

    # Views.

    def _take_decided(self, message: DecidedView, sender: DeviceId, now: float) -> None:
        value, known = message.value, self._out.view
        theirs, ours = (value.lineage, value.number), self._out.position
        if theirs < ours:
            self._out.send(sender, DecidedView(value=self._out.present), now)
        elif known is None:
            self._install(value, now)
        elif theirs == ours:
            if value.digest != known.digest:
                raise RemoteProtocolError(f"two views are decided as view {value.number}")
        elif theirs == (known.lineage, known.number + 1) and value.previous != known.plan.digest:
            raise RemoteProtocolError(f"view {value.number} follows a view nobody knows")
        else:
            self._install(value, now)

    def _install(self, view: View, now: float, *, founds: bool = False) -> None:
        """Go by a decided view from now on; with a vote if it names this journal."""
        is_member = self._device in view.members
        named = view.journal_of(self._device)
        abstains = is_member and not founds and named != self._recall.journal
        self._out.writes.append(ViewRecord(view=view, abstains=abstains))
        self._adopt(view, abstains)
        self._wishes.settle()
        self._decided_count += 1
        self._plan_heads(now)
        self._out.events.append(ViewDecided(view=view))
        self._judge()

    def _adopt(self, view: View, abstains: bool) -> None:
        self._out.view, self._abstains = view, abstains
        self._acceptor = Acceptor()
        self._proposer.begin()
        self._commits.begin(view)

    def _take_head(self, message: ViewHead, sender: DeviceId, now: float) -> None:
        self._take_reminders(message, sender, now)
        theirs, ours = (message.lineage, message.view), self._out.position
        if theirs > ours:
            self._ask_head(message.run, sender, now)
        elif theirs < ours:
            self._out.send(sender, DecidedView(value=self._out.present), now)
        elif self._out.view is not None and message.plan != self._out.place()["plan"]:
            raise RemoteProtocolError(f"two views are decided as view {message.view}")
        elif self._is_member(sender) and self._is_member(self._device):
            if not message.votes:
                reason = f"{short(sender)} lost its memory of the run"
                self.want(reason, now, after_s=limits.MEMORY_LOST_WAIT_S)
            if message.newest_step > self._steps.committed:
                self._commits.ask(sender, now)

    def _is_about_present(
        self,
        message: ViewPrepare | ViewPromise | ViewRefusal | ViewAccept | ViewAccepted | StepRecorded,
        sender: DeviceId,
        now: float,
    ) -> bool:
        """Whether it goes by the view known here; whoever is behind is told or asks first."""
        theirs, ours = (message.lineage, message.view), self._out.position
        if theirs > ours:
            self._ask_head(message.run, sender, now)
        elif theirs < ours:
            self._out.send(sender, DecidedView(value=self._out.present), now)
        if theirs != ours or self._out.view is None:
            return False
        if message.plan != self._out.place()["plan"]:
            raise RemoteProtocolError(f"two views are decided as view {message.view}")
        if not self._is_member(sender):
            raise RemoteProtocolError("the sender is not a member of the view it talks about")
        return self._is_member(self._device)

    # What the journal remembers.

    def _take_reminders(self, message: ViewHead, sender: DeviceId, now: float) -> None:
        """The sender tells what it heard from this device, in this start or an earlier one."""
        if not self._recall.take(message.reminders, sender):
            self._forget(now)
        self._recall.judge(self._reachable or (), now)

    def _forget(self, now: float) -> None:
        """The journal lacks what it may have promised: begin another, without a vote as yet."""
        self._recall.renew()
        view = self._out.view
        if view is not None:
            abstains = self._is_member(self._device)
            self._out.writes.append(ViewRecord(view=view, abstains=abstains))
            self._adopt(view, abstains)
            self._heads_at_s = now
            self._judge()

    # The acceptor's side.

    def _take_ballot(self, message: ViewPrepare | ViewAccept, sender: DeviceId, now: float) -> None:
        if message.ballot.device != sender:
            raise RemoteProtocolError("a ballot is opened by the device it names")
        before, accepted = self._acceptor.promised, self._acceptor.accepted
        if isinstance(message, ViewAccept):
            problem = self._rules.follows(self._out.present, message.value)
            if problem is not None:
                raise RemoteProtocolError(f"a view was proposed, but {problem}")
            taken = self._acceptor.accept(message.ballot, message.value)
        else:
            taken = self._acceptor.prepare(message.ballot)
        if not taken and before is not None:
            refusal = ViewRefusal(**self._out.place(), ballot=message.ballot, promised=before)
            self._out.send(sender, refusal, now)
            return
        self._note_promise(message.ballot, before, now)
        if isinstance(message, ViewAccept):
            if accepted is None or accepted.ballot != message.ballot:
                record = AcceptanceRecord(ballot=message.ballot, value=message.value)
                self._out.writes.append(record)
            accepted_now = ViewAccepted(
                **self._out.place(), ballot=message.ballot, memory=self._recall.memory()
            )
            self._out.send(sender, accepted_now, now)
        else:
            self._proposer.hindrance = message.hindrance
            self._out.send(sender, self._promise(message.ballot), now)
            self._judge()

    def _note_promise(self, ballot: Ballot, before: Ballot | None, now: float) -> None:
        """The ballot is promised: make it durable, give way to it, stop recording steps."""
        self._proposer.give_way(ballot)
        self._wishes.promised(now)
        if before == ballot:
            return
        view = self._out.present
        record = PromiseRecord(lineage=view.lineage, view=view.number, ballot=ballot)
        self._out.writes.append(record)
        if before is None:
            self._commits.fence()
            self._out.events.append(Fenced())

    def _may_record(self) -> bool:
        """Whether this peer may record and commit steps of the present view."""
        return self._has_vote and self._rules.may_record(promised=self.promised)

    @property
    def _has_vote(self) -> bool:
        """Whether this peer's word counts in the present view now."""
        is_member = self._is_member(self._device)
        return is_member and not self._abstains and not self._recall.waits

    def _is_member(self, device: DeviceId) -> bool:
        return self._out.view is not None and device in self._out.view.members

    def _propose_at_s(self) -> float | None:
        """When to open a ballot; only who has a vote opens one."""
        if not self._has_vote:
            return None
        return self._proposer.propose_at_s(promised=self.promised)

    # What is said and known.

    def _plan_heads(self, now: float) -> None:
        self._heads_at_s = now + limits.HEAD_INTERVAL_S * self._rng.uniform(0.8, 1.2)

    def _tell_head(self, to: DeviceId, now: float) -> None:
        """Where this peer stands, and what it has heard from the other one."""
        head = ViewHead(
            **self._out.place(), newest_step=self._steps.newest, memory=self._recall.memory(),
            votes=self._is_member(self._device) and not self._abstains,
            reminders=self._recall.heard.from_device(to),
        )  # fmt: skip
        self._out.send(to, head, now)

    def _ask_head(self, run: RunId, of: DeviceId, now: float) -> None:
        """Ask a device that is ahead for the newest view, also where none is known here."""
        if self._out.view is not None:
            self._tell_head(of, now)
            return
        head = ViewHead(
            run=run, lineage=Lineage(0), view=ViewNumber(0), plan=Digest(""), newest_step=0,
            memory=self._recall.memory(), votes=False, reminders=self._recall.heard.from_device(of),
        )  # fmt: skip
        self._out.send(of, head, now)

    def _promise(self, ballot: Ballot) -> ViewPromise:
        return ViewPromise(
            **self._out.place(), ballot=ballot, accepted=self._acceptor.accepted,
            memory=self._recall.memory(), votes=not self._abstains,
            records=() if self._abstains else self._steps.records[-limits.STEP_RECORDS_MAX :],
            inventory=self._inventory(),
        )  # fmt: skip

    def _present(self, view: View) -> frozenset[DeviceId]:
        """Members that can take part now; all of them until the shell has said who can."""
        if self._reachable is None:
            return frozenset(view.members)
        return frozenset(view.members) & (self._reachable | {self._device})

    def _judge(self) -> None:
        """Tell the shell when a pause begins, changes its reason, or ends."""
        standing = self.standing
        reason = standing.reason if standing.stance is Stance.PAUSED else ""
        if reason == self._paused:
            return
        self._paused = reason
        event = Paused(reason=reason, missing=standing.missing) if reason else Unpaused()
        self._out.events.append(event)

    def _restore(self, record: RunJournalRecord) -> None:
        match record:
            case ViewRecord():
                if (record.view.lineage, record.view.number) > self._out.position:
                    self._adopt(record.view, record.abstains)
                self._abstains = record.abstains
            case StepsRecord():
                if (record.lineage, record.view) == self._out.position:
                    self._steps.restore(record.records)
            case PromiseRecord():
                if (record.lineage, record.view) == self._out.position:
                    self._acceptor.prepare(record.ballot)
                    self._proposer.give_way(record.ballot)
            case AcceptanceRecord():
                view = self._out.view
                if view is not None and self._rules.follows(view, record.value) is None:
                    self._acceptor.accept(record.ballot, record.value)
