"""A view of a run: who takes part, what each does, and where it goes on. What agreement decides."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from p2ptrain import limits
from p2ptrain.ids import DeviceId, Digest, Lineage, RunId, ViewNumber, is_digest
from p2ptrain.planner.plan import Plan
from p2ptrain.planner.profile import PeerProfile
from p2ptrain.recovery.restoration import Restoration, SpanAt
from p2ptrain.schedule.quorum import is_enough
from p2ptrain.training.contract import Contract
from p2ptrain.training.step_record import StepRecord, check_consecutive
from p2ptrain.wire.codec import to_plain

JOURNALS_MAX: Final = 1 << 62


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """One decided, or proposed, view of a run; valid by construction."""

    plan: Plan
    """Carries run, lineage, number of the view, members, data holders."""
    contract: Contract
    """The same in every view of a run."""
    profiles: tuple[PeerProfile, ...]
    """Of every member, so that any of them can plan the next view; sorted by device."""
    previous: Digest | None
    """Plan digest of the view before; None: this one begins a lineage."""
    resume_step: int
    """The newest recorded step: whoever has not applied it does so, then step + 1 begins."""
    records: tuple[StepRecord, ...]
    """Steps that replays need, up to and with `resume_step`."""
    restoration: Restoration | None
    """None: this view begins a lineage and its members get their state from `begin`."""
    journals: tuple[int, ...] = ()
    """By member, which journal of it has a vote: a device that lost its disk begins another, and
    must not vote where it may have voted. 0: not known, no vote. Empty: this view begins a
    lineage, and whoever accepted it has one. Filled by `RunMachine`."""
    first_step: int = 0
    """Where the lineage began: 0, or the step of the checkpoint that it resumed."""
    checkpoint_every: int = 0
    """Steps between checkpoints at the home peer; 0: after the last step only."""
    aim: tuple[SpanAt, ...] = ()
    """The stages that are to follow, once those who get segments have their states; empty: none."""
    exact_from: int = 0
    """A replay by one peer makes steps after this one with the same bits: before it, several peers
    may have shared a stage that one has now, or shards may have been cut otherwise."""

    def __post_init__(self) -> None:
        problem = _problem(self)
        if problem is not None:
            raise ValueError(problem)

    @property
    def run(self) -> RunId:
        """The run it is a view of."""
        return self.plan.run

    @property
    def lineage(self) -> Lineage:
        """Counts forced restarts of the run."""
        return self.plan.lineage

    @property
    def number(self) -> ViewNumber:
        """Counts from 1 in each lineage."""
        return self.plan.view

    @property
    def members(self) -> tuple[DeviceId, ...]:
        """Sorted; they decide the next view."""
        return self.plan.members

    def journal_of(self, device: DeviceId) -> int:
        """The journal of a member that has a vote; 0: none, or it is not known."""
        named = dict(zip(self.members, self.journals, strict=False))
        return named.get(device, 0)

    @property
    def digest(self) -> Digest:
        """Of everything in the view; two proposals with equal digests are one."""
        document = json.dumps(to_plain(self), sort_keys=True, separators=(",", ":"))
        return Digest(hashlib.sha256(document.encode()).hexdigest())


def is_quorum(plan: Plan, devices: Iterable[DeviceId]) -> bool:
    """Whether these devices may decide for the view; the tie-breaker is the plan's home peer."""
    present = set(plan.members) & set(devices)
    return is_enough(len(present), len(plan.members), with_tie_breaker=plan.home in present)


def _problem(view: View) -> str | None:
    if view.contract.digest != view.plan.contract:
        return "the contract is not the one the plan names"
    if not 0 <= view.exact_from <= view.resume_step <= limits.STEPS_MAX:
        return "a view goes on from a step"
    if view.previous is not None and not is_digest(view.previous):
        return "the view before is named by a plan's digest"
    if (view.previous is None) != (view.restoration is None):
        return "a view that follows another says how its state is restored, and no other does"
    if len(view.journals) not in (0, len(view.members)):
        return "every member has a journal, or none is named"
    if not all(0 <= journal < JOURNALS_MAX for journal in view.journals):
        return "journals are named by numbers"
    if view.records and view.records[-1].step != view.resume_step:
        return "records lead up to the step where the view goes on"
    check_consecutive(view.records)
    return _aim_problem(view) if view.aim else None


def _aim_problem(view: View) -> str | None:
    devices = {at.device for at in view.aim}
    folded = view.plan.private and len(view.aim) > 1
    if len(devices) != len(view.aim) - folded or not devices <= set(view.members):
        return "stages to come are on different members"
    segments = [segment for at in view.aim for segment in at.span.segments]
    if segments != list(range(view.plan.stages[-1].segments.stop)):
        return "stages to come cover the segments in order"
    return None
