"""What must hold in every simulated run, whatever happens; it sees all devices at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from p2ptrain.agreement.run_events import Stance
from p2ptrain.agreement.view import View, is_quorum
from p2ptrain.ids import DeviceId, Digest
from p2ptrain.recovery.planning import Losses, last_whole_set, restoration
from p2ptrain.recovery.restoration import Replay, Restoration
from p2ptrain.recovery.successor import Succession, successor_plans
from p2ptrain.training.step_record import StepRecord
from tests.sim.checkers import Violation
from tests.sim.run_model import Reference, ReplayInputs, Value, drawn, fed, replayed
from tests.sim.run_shell import place

if TYPE_CHECKING:
    from tests.sim.run_node import RunNode
    from tests.sim.run_world import RunWorld

__all__ = ["RunChecker", "Violation"]

CLAIMS_CHECKED_SHARE = 0.2


class RunChecker:
    """One plan per view, no committed step lost or made twice, states exact, claims true."""

    def __init__(self, world: RunWorld) -> None:
        self._world = world
        self.reference = Reference(model=world.model)
        self.views: dict[tuple[int, int], Digest] = {}
        self.resumes: dict[tuple[int, int], int] = {}
        self._committed_in: dict[int, tuple[int, int]] = {}
        self._lineage = 0
        self.check_every_claim = False
        self._claimed = 0
        self._lost: set[DeviceId] = set()
        self._members: set[DeviceId] = set()
        self.commit_count = self.claim_count = self.checked_count = 0
        self.told: set[tuple[DeviceId, int, int, int]] = set()
        self.applied: set[tuple[DeviceId, int, int, int]] = set()
        """(device, life, lineage, step) of every update that a stage made, replays apart."""

    # Views.

    def on_view(self, node: RunNode, view: View) -> None:
        key = (view.lineage, view.number)
        first = self.views.setdefault(key, view.digest)
        if first != view.digest:
            raise Violation(f"two views are decided as view {key}")
        if key in self.resumes or view.lineage < self._lineage:
            return
        self.resumes[key] = view.resume_step
        # Who is left out takes its logs along, gone or not.
        self._lost |= self._members - set(view.members)
        self._members = set(view.members)
        if view.lineage > self._lineage:
            self._go_back(view)
            return
        for step, place_ in self._committed_in.items():
            if place_ < key and step > view.resume_step:
                raise Violation(f"view {key} lost step {step}, committed in view {place_}")
        for record in view.records:
            self._commit(record, key)
        if self.reference.newest < view.resume_step:
            raise Violation(f"view {key} resumes at step {view.resume_step}, which nobody made")

    def _go_back(self, view: View) -> None:
        """Somebody forced a lineage, knowing that later steps are redone."""
        known = self.reference.records
        parted = [r.step for r in view.records if known.get(r.step, r) != r]
        kept = min([view.resume_step, *(step - 1 for step in parted)])
        if kept < self._claimed and len(self._lost) <= 1:
            raise Violation(f"step {self._claimed} was protected, and one loss has undone it")
        self._claimed = 0
        self._lineage = view.lineage
        self.reference.go_back(kept)
        self._committed_in = {s: key for s, key in self._committed_in.items() if s <= kept}
        for record in view.records:
            self._commit(record, (view.lineage, view.number))

    # Steps.

    def on_committed(self, node: RunNode, view: View, record: StepRecord) -> None:
        key, step = (view.lineage, view.number), record.step
        told = (node.device, node.life, view.lineage, step)
        if told in self.told:
            raise Violation(f"{node.device[0]} was told twice that step {step} is committed")
        self.told.add(told)
        if view.lineage < self._lineage:
            return  # the losing side of a forced lineage does not know yet
        for later, resume_step in self.resumes.items():
            if later > key and resume_step < step:
                raise Violation(f"step {step} is committed in view {key}, fenced by {later}")
        self._commit(record, key)
        self.commit_count += 1

    def _commit(self, record: StepRecord, key: tuple[int, int]) -> None:
        known = self.reference.records.get(record.step)
        if known is None:
            if record.step != self.reference.newest + 1:
                raise Violation(f"step {record.step} is committed before the step before it")
            self.reference.commit(record)
        elif known != record:
            raise Violation(f"step {record.step} is committed twice, with different records")
        self._committed_in.setdefault(record.step, key)

    def on_applied(self, node: RunNode, lineage: int, step: int) -> None:
        """A stage made the update of a step; nobody rolls back."""
        key = (node.device, node.life, lineage, step)
        if key in self.applied:
            raise Violation(f"{node.device[0]} made the update of step {step} twice")
        self.applied.add(key)

    def on_states(self, node: RunNode, step: int, states: dict[int, Value]) -> None:
        """A device trains on from these states after `step` updates."""
        view = node.machine.view
        if view is None or view.lineage < self._lineage:
            return
        expected = self.reference.states.get(step)
        if expected is None:
            raise Violation(f"{node.device[0]} applied step {step}, which is not committed")
        wrong = [segment for segment, state in states.items() if state != expected[segment]]
        if wrong:
            raise Violation(f"{node.device[0]} has wrong states of segments {wrong} at step {step}")

    # Claims.

    def on_protected(self, node: RunNode, step: int) -> None:
        """A device says that any one may vanish; now and then that is tried on paper."""
        self.claim_count += 1
        view = node.machine.view
        if view is None or not self._undisturbed(view):
            return
        if not view.plan.keep_data_here:
            self._claimed = step
            self._lost.clear()
        share = 1.0 if self.check_every_claim else CLAIMS_CHECKED_SHARE
        if self._world.rng.random() >= share:
            return
        self.checked_count += 1
        for gone in view.members:
            if view.plan.keep_data_here and gone == view.plan.home:
                continue  # that the run waits for it is what was asked for
            self._try_without(view, gone, step)

    def on_loss(self, device: DeviceId) -> None:
        """A process ended: what it had in memory is gone, perhaps its disk, too."""
        self._lost.add(device)

    def _undisturbed(self, view: View) -> bool:
        """Nobody has vanished yet: a loss that is not noticed would be the second."""
        nodes = [self._world.nodes[device] for device in view.members]
        same = all(n.up and not n.frozen and n.stage.position == (view.lineage, view.number)
                   for n in nodes)  # fmt: skip
        linked = all(self._world.linked(a.device, b.device) for a in nodes for b in nodes)
        seen = all(a.seen.get(b.device) == b.life for a in nodes for b in nodes if a is not b)
        remembers = all(n.machine.standing.stance is not Stance.ABSTAINING for n in nodes)
        return (
            same
            and linked
            and seen
            and remembers
            and all(n.stage.ready or n.stage.own is None for n in nodes)
        )

    def _try_without(self, view: View, gone: DeviceId, step: int) -> None:
        nodes = self._world.nodes
        left = [device for device in view.members if device != gone]
        promises = {device: nodes[device].stage.inventory() for device in left}
        forcible = last_whole_set(promises, self._world.model.count) >= step
        if forcible and not is_quorum(view.plan, left):
            return  # they pause, and a person may go back to a set that has the step
        held = [nodes[device].machine.records for device in left]
        records = max(held, key=lambda each: each[-1].step if each else 0)
        newest = records[-1].step if records else view.resume_step
        if newest < step:
            raise Violation(f"step {step} was protected, but only {gone[0]} has its record")
        holding = [d for d in left if nodes[d].disk.has_data]
        succession = Succession(base=view.plan, usable=left, holding=holding, reason="")
        for plan in successor_plans(succession, place):
            found = restoration(
                Losses(
                    base=view, plan=plan, promises=promises, records=records, resume_step=newest,
                    tie_segments=self._world.model.ties,
                )
            )  # fmt: skip
            if isinstance(found, Restoration):
                for replay in found.replays:
                    self._try_replay(replay, [r for r in records if r.step > replay.step], gone)
                return
        raise Violation(f"step {step} was protected, but cannot be restored without {gone[0]}")

    def _try_replay(self, replay: Replay, records: list[StepRecord], gone: DeviceId) -> None:
        nodes, model, span = self._world.nodes, self._world.model, replay.span.segments
        states = {s: drawn(s) for s in span} if replay.step == 0 else {
            s: nodes[each.device].disk.replicas[s, replay.step]
            for each in replay.replicas for s in each.span.segments
        }  # fmt: skip

        def logged(kind: str, segment: int, step: int, giver: DeviceId | None) -> Value | None:
            found = nodes[giver].stage.log.read(kind, segment, step) if giver else None  # type: ignore[arg-type]
            return found[0] if found else None

        tied = {each.segment: each.device for each in replay.tied_from}
        inputs = ReplayInputs(
            activation=lambda step: fed("inputs", step) if span[0] == 0 else logged(
                "activation", span[0] - 1, step, replay.activations_from),
            cotangent=lambda step: fed("labels", step) if span[-1] == model.count - 1 else logged(
                "cotangent", span[-1], step, replay.cotangents_from),
            tied=lambda segment, step: logged("tied", segment, step, tied.get(segment)),
        )  # fmt: skip
        made = replayed(model, states, records, inputs)
        step = records[-1].step if records else replay.step
        expected = self.reference.states.get(step)
        if made is None or (expected and any(v != expected[s] for s, v in made[0].items())):
            raise Violation(f"step {step} was protected, but replays wrong without {gone[0]}")
