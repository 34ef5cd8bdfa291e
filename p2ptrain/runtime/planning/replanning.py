"""Plan the next view of a run: who is left or new, who takes what, and where each state comes from.

Pure computation on what the promises of the present view's members say. Whoever proposes does it;
agreement sees to it that one proposal counts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from p2ptrain.agreement.run_events import PromisedInventory, ProposalWanted
from p2ptrain.agreement.view import View
from p2ptrain.bundle.manifest import Manifest
from p2ptrain.errors import PlanInfeasible
from p2ptrain.ids import DeviceId, Lineage, short
from p2ptrain.planner.choose import choose_plan
from p2ptrain.planner.input import PlanningInput
from p2ptrain.planner.kinds import kinds_later
from p2ptrain.planner.links import LinkTable, link_estimates
from p2ptrain.planner.moves import is_worth_moving, moving_ns
from p2ptrain.planner.objective import Objective
from p2ptrain.planner.pace import AS_PLANNED, at_pace
from p2ptrain.planner.plan import Plan, is_sharded
from p2ptrain.planner.profile import PeerProfile
from p2ptrain.recovery.advance import announced, stages_of, told_step
from p2ptrain.recovery.inventory import Inventory
from p2ptrain.recovery.placing import placing, replay_bytes
from p2ptrain.recovery.planning import Losses, Unrecoverable, last_whole_set, restoration
from p2ptrain.recovery.restoration import Restoration, SpanAt
from p2ptrain.recovery.successor import Place, Succession, following_plan, successor_plans
from p2ptrain.runtime.planning.placement import planning_profile, predicted_memory
from p2ptrain.training.ties import tie_groups
from p2ptrain.units import NS_PER_S, format_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class NextView:
    """Everything a proposal follows from."""

    wanted: ProposalWanted
    manifest: Manifest
    leaving: tuple[DeviceId, ...]
    """Give what they have, but get no part any more."""
    newcomers: tuple[PeerProfile, ...]
    """Measured and ready to be taken in."""
    reason: str
    """Why a new view is wanted, one phrase."""
    paces: Mapping[DeviceId, int] = field(default_factory=dict)
    """Per mille of the planned time that stages have taken; segments may move because of it."""
    outsiders: tuple[PromisedInventory, ...] = ()
    """Devices that are no members, and what they still keep and can give."""
    remakes_live: bool = False
    """Whether segments that are live may be replayed where a lost one cannot be without them."""
    change_s: float = 0.0
    """What the change of view itself takes, where it is still to be decided on."""


def forced_view(given: NextView) -> View | str:
    """A view of a new lineage with those whose promises are given, or why there can be none.

    It goes on where they can; where a stage is lost for good, at the newest step of which they
    have a replica of everything. What the others did since is given up.
    """
    found = next_view(given)
    if isinstance(found, str):
        found = next_view(replace(given, remakes_live=True))
    if isinstance(found, str):
        found = next_view(_fallen_back(given))
    if isinstance(found, str):
        return found
    lineage = Lineage(given.wanted.base.lineage + 1)
    return replace(found, plan=replace(found.plan, lineage=lineage))


def _fallen_back(given: NextView) -> NextView:
    """The same with replicas only, at the newest step that they cover."""
    wanted, count = given.wanted, len(given.manifest.segments)
    inventories = {promise.device: promise.inventory for promise in wanted.promises}
    step = last_whole_set(inventories, count)
    promises = tuple(
        replace(promise, inventory=replace(promise.inventory, live=None, shard=None, logs=()))
        for promise in wanted.promises
    )
    records = tuple(record for record in wanted.records if record.step <= step)
    if records and records[-1].step != step:
        records = ()
    wanted = replace(wanted, promises=promises, records=records, resume_step=step)
    return replace(given, wanted=wanted)


def next_view(given: NextView) -> View | str:
    """The view to propose, or why there can be none now, as `cannot_propose` takes it.

    Candidates are tried from the shortest predicted step on, until one whose states can be had.
    """
    planner = _Planner(given)
    sentence = planner.why_none()
    for candidate in planner.candidates():
        found = planner.view(candidate)
        if isinstance(found, View):
            return found
        sentence = found.sentence
    return sentence


@dataclass(frozen=True, slots=True)
class _Candidate:
    plan: Plan
    aim: tuple[SpanAt, ...] = ()


class _Planner:
    def __init__(self, given: NextView) -> None:
        self._given, self._wanted = given, given.wanted
        self._base = given.wanted.base
        self._promises: dict[DeviceId, Inventory] = {
            promise.device: promise.inventory
            for promise in (*given.outsiders, *given.wanted.promises)
        }
        staying = [d for d in self._linked_together() if d not in given.leaving]
        fresh = {p.device: p for p in given.newcomers if p.device not in self._promises}
        known = {profile.device: profile for profile in self._base.profiles}
        known = {d: at_pace(p, given.paces.get(d, AS_PLANNED)) for d, p in known.items()}
        self._profiles = {d: p for d, p in {**known, **fresh}.items() if d in {*staying, *fresh}}
        self._usable = tuple(sorted({*staying, *fresh}))
        self._may_move = bool(fresh or self._base.aim or given.paces)
        joining = bool(fresh or self._base.aim)
        self._may_wait = joining and self._base.contract.codec == "fp32"

    def _linked_together(self) -> list[DeviceId]:
        """Those that promised and can all exchange tensors with each other, the home peer first.

        Greedy by number of links, then by device: where one way is cut, one of its ends stays out.
        """
        home, told = self._base.plan.home, self._promises
        promised = [promise.device for promise in self._wanted.promises]
        order = sorted(promised, key=lambda d: (d != home, -len(told[d].linked), d))
        chosen: list[DeviceId] = []
        for device in order:
            if all(o in told[device].linked and device in told[o].linked for o in chosen):
                chosen.append(device)
        return chosen

    def why_none(self) -> str:
        """Why there is no candidate at all; the home peer certainly had the data."""
        if self._base.contract.owners:
            return self._lacks_owner() or "the devices that are left cannot go on"
        home, stays = self._base.plan.home, self._base.plan.keep_data_here
        holding = [d for d in self._usable if d in self._promises and self._promises[d].has_data]
        if [device for device in holding if device == home or not stays]:
            return "the devices that are left cannot hold the whole model"
        if home in self._given.leaving and home in self._promises:
            return f"{short(home)} leaves with the run's data: it takes {short(home)} back"
        back = "" if home in self._promises else f": it takes {short(home)} back"
        return f"nobody who is left has the run's data{back}"

    def candidates(self) -> Iterator[_Candidate]:
        """Plans, the best first: another cut where that is worth its moves, else least movement.

        Where members feed their own data, only the one that they have.
        """
        if self._base.contract.owners:
            if self._lacks_owner() is None:
                yield _Candidate(self._as_before())
            return
        succession = Succession(
            base=self._base.plan,
            usable=self._usable,
            holding=[d for d, held in self._promises.items() if held.has_data],
            reason=self._given.reason,
        )
        place = placing(self._planning(self._base.plan.home))
        nearest = successor_plans(succession, place)
        aimed, searched = self._aimed(succession, place), None
        if aimed is not None:
            yield _Candidate(aimed)
        elif self._may_move or not nearest or self._shards_parted():
            searched = self._searched(nearest)
        aim = self._aim(nearest, searched)
        if searched is not None and not aim:
            yield _Candidate(searched)
        for plan in nearest:
            yield _Candidate(
                replace(plan, reasons=(*plan.reasons, *announced(aim, plan))) if aim else plan, aim
            )
        if searched is not None and aim:
            yield _Candidate(searched)

    def _lacks_owner(self) -> str | None:
        """Whom a run whose members feed their own data takes back; None: all are here."""
        plan, leaving = self._base.plan, self._given.leaving
        for device in plan.devices:
            if device in leaving and device in self._promises:
                return f"{short(device)} leaves with its data: it takes {short(device)} back"
            if device not in self._usable:
                return f"the data of {short(device)} is gone: it takes {short(device)} back"
            if not self._promises[device].has_data:
                return (
                    f"the data of {short(device)} is not read yet, or not what the run began with: "
                    f"p2ptrain status on {short(device)} says which"
                )
        if plan.home not in self._usable:
            does = "leaves" if plan.home in leaving else "is gone"
            return f"the home peer {does}: it takes {short(plan.home)} back"
        return None

    def _as_before(self) -> Plan:
        return replace(
            self._base.plan,
            view=self._wanted.number,
            reasons=(self._given.reason, "members that feed their own data keep their parts"),
        )

    def _aimed(self, succession: Succession, place: Place) -> Plan | None:
        """The plan that the view before aimed at, where the states for it have come."""
        if told_step(self._base, self._promises) is None:
            return None
        if not {at.device for at in self._base.aim} <= set(self._usable):
            return None
        spans = [(at.device, at.span.segments) for at in self._base.aim]
        return following_plan(succession, spans, place)

    def _aim(self, nearest: Sequence[Plan], searched: Plan | None) -> tuple[SpanAt, ...]:
        """Stages to move to once the states that this takes have been sent, while everybody keeps
        their segments; empty: move at once, as where what crosses new cuts is rounded, so that it
        is not what the old stages had."""
        if searched is None or not nearest or not self._may_wait:
            return ()
        return stages_of(searched) if _one_by_one((*nearest, searched)) else ()

    def view(self, candidate: _Candidate) -> View | Unrecoverable:
        """The whole view of a plan, if every segment's state can be had for it."""
        wanted, plan = self._wanted, candidate.plan
        found = restoration(
            Losses(
                base=self._base,
                plan=plan,
                promises=self._promises,
                records=wanted.records,
                resume_step=wanted.resume_step,
                tie_segments=tuple(
                    {holder.segment for holder in group.holders}
                    for group in tie_groups(self._given.manifest)
                ),
                remakes_live=self._given.remakes_live,
            )
        )
        if isinstance(found, Unrecoverable):
            return found
        if (lacking := self._lacks_memory(plan, found)) is not None:
            return lacking
        return replace(
            self._base,
            plan=plan,
            profiles=tuple(self._profiles[d] for d in sorted(self._profiles)),
            previous=self._base.plan.digest,
            resume_step=wanted.resume_step,
            records=wanted.records,
            restoration=found,
            journals=(),  # the machine names those that have a vote
            aim=candidate.aim,
            exact_from=self._exact_from(plan),
        )

    def _lacks_memory(self, plan: Plan, found: Restoration) -> Unrecoverable | None:
        """Why a peer cannot replay shards: it has all of them in memory at once."""
        for replay in found.replays:
            device = replay.replayer
            if not replay.shares or device not in self._profiles:
                continue
            needs = replay_bytes(self._planning(plan.home), replay.shares)
            room = self._profiles[device].memory_bytes
            if needs > room:
                return Unrecoverable(
                    devices_needed=(),
                    sentence=f"to make the steps since {replay.step} again, all shards on "
                    f"{short(device)} need {format_bytes(needs)} of its {format_bytes(room)}: it "
                    "takes a larger --memory there, or --force-view to go back to step "
                    f"{last_whole_set(self._promises, replay.span.segments.stop)}",
                )
        return None

    def _exact_from(self, plan: Plan) -> int:
        """Where a stage that several peers shared goes to one, or shards are cut otherwise, replays
        begin afterwards."""
        shared = _shared_segments(self._base.plan)
        parted = shared - _shared_segments(plan)
        recut = is_sharded(plan) and _parts(plan) != _parts(self._base.plan)
        step = self._wanted.resume_step
        return step if parted or recut else min(step, self._base.exact_from)

    def _shards_parted(self) -> bool:
        """Whether somebody is missing of peers who computed the whole model together: those who
        are left may do so, too."""
        stages = self._base.plan.stages
        return is_sharded(self._base.plan) and not set(stages[0].devices) <= set(self._usable)

    def _searched(self, nearest: Sequence[Plan]) -> Plan | None:
        """The planner's own choice, where it is enough better than staying, or the only one."""
        like = nearest[0] if nearest else None
        home = self._base.plan.home if like is None else like.home
        if home not in self._usable:
            return None
        choice = self._chosen(self._planning(home))
        if choice is None:
            return None
        if like is not None and not self._is_worth_it(like, choice):
            return None
        return replace(choice, reasons=(self._given.reason, *choice.reasons))

    def _chosen(self, planning: PlanningInput) -> Plan | None:
        """The best plan within the batteries; rather one beyond them than none at all, since who
        reaches its reserve leaves."""
        tries = [planning]
        if any(profile.battery is not None for profile in planning.profiles):
            plugged_in = tuple(replace(profile, battery=None) for profile in planning.profiles)
            tries.append(replace(planning, profiles=plugged_in))
        for each in tries:
            with contextlib.suppress(PlanInfeasible):
                return choose_plan(each).plan
        return None

    def _is_worth_it(self, like: Plan, choice: Plan) -> bool:
        contract, links = self._base.contract, LinkTable(self._planning(choice.home).links)
        moves_ns = moving_ns(
            like.stages,
            choice.stages,
            manifest=self._given.manifest,
            optimizer=contract.optimizer.name,
            link=lambda a, b: links.between(self._profiles[a], self._profiles[b]),
        )
        return is_worth_moving(
            like,
            choice,
            steps_left=contract.steps - self._wanted.resume_step,
            moves_ns=moves_ns + round(self._given.change_s * NS_PER_S),
        )

    def _planning(self, home: DeviceId) -> PlanningInput:
        contract, plan, manifest = self._base.contract, self._base.plan, self._given.manifest
        holding = (d for d, held in self._promises.items() if held.has_data)
        able = [self._now(p) for p in self._profiles.values() if p.build in contract.builds]
        return PlanningInput(
            manifest=manifest,
            contract=contract,
            profiles=tuple(planning_profile(profile, contract) for profile in able),
            home=home,
            stage_memory=predicted_memory(manifest, contract),
            run=plan.run,
            lineage=plan.lineage,
            view=self._wanted.number,
            schedule=plan.schedule,
            kinds=kinds_later(contract.parallelism),
            objective=Objective(goal=plan.goal),
            keep_data_here=plan.keep_data_here,
            private=plan.private,
            holding=tuple(sorted(holding)),
            replica_every=plan.replica_every,
            steps_left=contract.steps - self._wanted.resume_step,
            links=link_estimates(
                {device: held.links for device, held in self._promises.items()},
                {p.device: p.host for p in able},
            ),
        )

    def _now(self, profile: PeerProfile) -> PeerProfile:
        """With the battery as its promise tells it; a newcomer has just told it."""
        told = self._promises.get(profile.device)
        return profile if told is None else replace(profile, battery=told.battery)


def _one_by_one(plans: Iterable[Plan]) -> bool:
    """Whether every stage of these plans has one peer: what is replayed from a log."""
    return all(stage.split == "none" for plan in plans for stage in plan.stages)


def _parts(plan: Plan) -> list[tuple[str, tuple[int, ...]]]:
    return [(stage.split, stage.weights) for stage in plan.stages]


def _shared_segments(plan: Plan) -> set[int]:
    return {segment for s in plan.stages if s.split != "none" for segment in s.segments}
