"""A simulated device's stage: steps, logs, replicas, replays, with production bookkeeping."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

from p2ptrain.agreement.view import View
from p2ptrain.ids import DeviceId
from p2ptrain.planner.plan import StagePlan
from p2ptrain.recovery.inventory import HeldState, Inventory, LiveStage, LogKind, SegmentSpan
from p2ptrain.recovery.replica_sets import ReplicaSets
from p2ptrain.recovery.restoration import Replay
from p2ptrain.recovery.step_log import LogKey, StepLog
from p2ptrain.training.messages import ReplicaStored, stamp_of
from p2ptrain.training.step_record import StepRecord
from tests.sim.run_model import (
    Pass,
    ReplayInputs,
    Value,
    drawn,
    fed,
    replayed,
    summed,
    updated,
)
from tests.sim.run_shell import Complaint, Position, Replica, StageDone, Tensor, digest

if TYPE_CHECKING:
    from tests.sim.run_node import RunNode

RESTORE_PATIENCE_S = 12.0
RESTORE_RETRY_S = 0.2
_stamp = functools.lru_cache(maxsize=64)(stamp_of)


class SimStage:
    """Everything of a device that dies with its process, but the machine."""

    def __init__(self, node: RunNode) -> None:
        self.node, self.world, self.disk = node, node.world, node.disk
        self.model = node.world.model
        self.log = StepLog(bytes_max=node.world.shape.log_bytes_max)
        self.sets = ReplicaSets()
        self.states: dict[int, tuple[int, Value]] = {}
        """segment -> (updates applied, state); also segments that were given away."""
        self.gradients: dict[int, Value] = {}
        """Complete gradients of step `gradient_step`, empty while they are not."""
        self.gradient_step = 0
        self.ready = False
        self.view: View | None = None
        self._pass: Pass | None = None
        self._tensors: dict[tuple[str, int, int], Value] = {}
        self._early: list[tuple[object, DeviceId]] = []

    # What is asked.

    @property
    def position(self) -> Position:
        return (0, 0) if self.view is None else (self.view.lineage, self.view.number)

    @property
    def own(self) -> StagePlan | None:
        """This device's stage in the view it goes by."""
        index = None if self.view is None else self.view.plan.stage_of(self.node.device)
        return None if self.view is None or index is None else self.view.plan.stages[index]

    def inventory(self) -> Inventory:
        spans = [
            HeldState(span=SegmentSpan(first=segment, count=1), step=step)
            for segment, step in sorted(self.disk.replicas)
        ]
        return Inventory(
            live=self._live(), states=tuple(spans), logs=self.log.inventory(),
            has_data=self.disk.has_data, linked=self.node.linked,
        )  # fmt: skip

    def _live(self) -> LiveStage | None:
        if not self.states:
            return None
        inside = sorted(self.gradients)
        if not inside:
            # Segments that were given away count as long as no step was made since.
            newest = max(step for step, _ in self.states.values())
            inside = sorted(s for s, (step, _) in self.states.items() if step == newest)
        step = self.states[inside[0]][0]
        count = 1
        while inside[count : count + 1] == [inside[0] + count]:
            count += 1
        return LiveStage(
            span=SegmentSpan(first=inside[0], count=count), step=step,
            gradients_complete=bool(self.gradients) and self.gradient_step == step + 1,
        )  # fmt: skip

    # A view begins.

    def begin(self, view: View) -> None:
        """Go by a decided view: apply its step, forget later ones, get the stage's state."""
        if self.view is not None and view.lineage > self.view.lineage:
            self._change_lineage(view)
        self.view, self.ready, self._pass = view, False, None
        if view.records and self._apply(view.records[-1]):
            self.world.checker.on_applied(self.node, view.lineage, view.resume_step)
        self.gradients.clear()
        self._tensors.clear()
        self.log.truncate(view.resume_step)
        self.sets.begin(view)
        for segment, step in sorted(self.disk.replicas):
            if step > view.resume_step:
                del self.disk.replicas[segment, step]
            else:
                self._announce(segment, step)
        self._fetch_data()
        if self.own is not None:
            pending = (
                []
                if view.restoration is None
                else [
                    replay
                    for replay in view.restoration.replays
                    if replay.replayer == self.node.device
                ]
            )
            delay_s = self.world.rng.uniform(0.02, 0.4)
            since = self.world.now
            self._later(delay_s, lambda: self._restore(pending, since))
        early, self._early = self._early, []
        for message, sender in early:
            self.take(message, sender)

    def _change_lineage(self, view: View) -> None:
        """Somebody forced a lineage: what was made after its beginning is another history."""
        inside = view.number == 1 and self.node.device in view.members
        if inside and view.restoration is not None:
            return  # it counts on what is held here
        self.states.clear()
        self.log.truncate(0)
        for key in list(self.disk.replicas):
            if not inside or key[1] != view.resume_step:
                del self.disk.replicas[key]

    def _later(self, delay_s: float, action: Callable[[], None]) -> None:
        """Do something later, unless the process or the view is another one by then."""
        life, position = self.node.life, self.position

        def act() -> None:
            if self.node.life == life and self.node.up and self.position == position:
                if self.node.frozen:
                    self.world.at(0.5, act)
                else:
                    action()

        self.world.at(delay_s, act)

    def _fetch_data(self) -> None:
        view = self.view
        if view is None or self.node.device not in view.plan.holders or self.disk.has_data:
            return
        nodes = self.world.nodes
        givers = [d for d in nodes if nodes[d].disk.has_data and self._linked(d)]
        if givers:
            self._later(1.0, self._store_data)
        else:
            self._later(1.0, self._fetch_data)

    def _store_data(self) -> None:
        self.disk.has_data = True

    def _linked(self, device: DeviceId) -> bool:
        return device == self.node.device or self.world.linked(self.node.device, device)

    # Restoration.

    def _restore(self, pending: list[Replay], since: float) -> None:
        """Replay and fetch until the whole stage is at the view's step; complain in the end."""
        assert self.view is not None
        own, step = self.own, self.view.resume_step
        if own is None:
            return
        for replay in list(pending):
            if self._replay(replay):
                pending.remove(replay)
        for segment in own.segments if not pending else ():
            if self.states.get(segment, (-1, b""))[0] != step:
                self._fetch(segment, step)
        if all(self.states.get(segment, (-1, b""))[0] == step for segment in own.segments):
            self.world.checker.on_states(self.node, step, self._own_states(own))
            self.ready = True
            self.node.told(step)
            self.begin_step()
        elif self.world.now - since < RESTORE_PATIENCE_S:
            self._later(RESTORE_RETRY_S, lambda: self._restore(pending, since))
        else:
            self.complain()

    def complain(self) -> None:
        """Tell all members, this one too, that this device cannot go on in the view."""
        if self.view is not None:
            self._tell_members(Complaint(position=self.position))

    def _own_states(self, own: StagePlan) -> dict[int, Value]:
        return {segment: self.states[segment][1] for segment in own.segments}

    def _fetch(self, segment: int, step: int) -> None:
        """One segment's state from its source, or at a lineage's beginning from a replica."""
        assert self.view is not None
        if self.view.restoration is None:
            found = self._first_state(segment, step)
        else:
            source = next(
                each.device for each in self.view.restoration.sources
                if segment in each.span.segments
            )  # fmt: skip
            giver = self.world.nodes[source]
            there = source != self.node.device and self._linked(source) and not giver.frozen
            held = giver.stage.states.get(segment) if there else None
            same = there and giver.stage.position == self.position
            found = held[1] if held is not None and same and held[0] == step else None
        if found is not None:
            self.states[segment] = (step, found)

    def _first_state(self, segment: int, step: int) -> Value | None:
        if step == 0:
            return drawn(segment)
        for device, other in self.world.nodes.items():
            if other.up and self._linked(device) and (segment, step) in other.disk.replicas:
                return other.disk.replicas[segment, step]
        return None

    def _replay(self, replay: Replay) -> bool:
        """Run a lost range again from its replicas; False while something cannot be read."""
        assert self.view is not None
        span = replay.span.segments
        states = {s: drawn(s) for s in span} if replay.step == 0 else {
            segment: value
            for each in replay.replicas
            if self._linked(each.device)
            for segment in each.span.segments
            if (value := self.world.nodes[each.device].disk.replicas.get((segment, replay.step)))
        }  # fmt: skip
        if len(states) < len(span):
            return False
        made = replayed(self.model, states, self._records_after(replay.step), self._inputs(replay))
        if made is None:
            return False
        last, sent = made
        for each in sent:
            self._log("activation", each.step, span[-1], each.activation)
            self._log("cotangent", each.step, span[0] - 1, each.cotangent)
            for segment in sorted(self.model.tied & set(span)):
                self._log("tied", each.step, segment, each.gradients[segment])
            self.log.finish(each.step)
        self.states |= {s: (self.view.resume_step, value) for s, value in last.items()}
        self.world.replay_count += 1
        return True

    def _records_after(self, step: int) -> list[StepRecord]:
        assert self.view is not None
        found = [record for record in self.view.records if record.step > step]
        if self.world.flaws.guess_clip_scale:
            found = [
                StepRecord(step=r.step, loss=r.loss, gradient_norm=r.gradient_norm, clip_scale=1.0)
                for r in found
            ]
        return found

    def _inputs(self, replay: Replay) -> ReplayInputs:
        span = replay.span.segments

        def logged(kind: LogKind, segment: int, step: int, giver: DeviceId | None) -> Value | None:
            for part in replay.parts:
                if part.kind == kind and part.first_step <= step <= part.last_step:
                    giver = part.device  # there is one microbatch, so one giver for each step
            if giver is None or not self._linked(giver):
                return None
            found = self.world.nodes[giver].stage.log.read(kind, segment, step)
            return found[0] if found else None

        def data(end: str, step: int) -> Value | None:
            giver = replay.data_from
            there = giver is not None and self._linked(giver)
            return fed(end, step) if there and self.world.nodes[giver].disk.has_data else None

        def activation(step: int) -> Value | None:
            if span[0] == 0:
                return data("inputs", step)
            return logged("activation", span[0] - 1, step, replay.activations_from)

        def cotangent(step: int) -> Value | None:
            if span[-1] == self.model.count - 1:
                return data("labels", step)
            return logged("cotangent", span[-1], step, replay.cotangents_from)

        def tied(segment: int, step: int) -> Value | None:
            givers = {each.segment: each.device for each in replay.tied_from}
            return logged("tied", segment, step, givers.get(segment))

        return ReplayInputs(activation=activation, cotangent=cotangent, tied=tied)

    def _log(self, kind: LogKind, step: int, segment: int, value: Value) -> None:
        inside = 0 <= segment < self.model.count - 1
        if inside or kind == "tied":
            key = LogKey(kind=kind, step=step, microbatch=0, segment=segment, index=0)
            self.log.put(key, value)

    # Steps.

    def begin_step(self) -> None:
        """The step after the applied one; inputs may have come early."""
        own = self.own
        if own is None or not self.ready:
            return
        step = self.states[own.first_segment][0] + 1
        if step > self.world.last_step:
            return
        self._pass = Pass(span=own.segments)
        self.gradient_step = step
        self.gradients = {}
        compute_s = self.world.rng.uniform(0.5, 1.5) * self.world.step_s + self.node.slowness_s
        if own.first_segment == 0:
            self._later(compute_s, lambda: self._enter("entering", step, fed("inputs", step)))
        if own.segments[-1] == self.model.count - 1:
            self._later(compute_s, lambda: self._enter("returning", step, fed("labels", step)))
        self._go_on()

    def _enter(self, kind: str, step: int, value: Value) -> None:
        self._tensors[kind, step, 0] = value
        self._go_on()

    def _go_on(self) -> None:
        """Whatever the tensors that are here allow."""
        own, step = self.own, self.gradient_step
        if own is None or self._pass is None or self.gradients:
            return
        states = self._own_states(own)
        entering = self._tensors.get(("entering", step, 0))
        if entering is not None and not self._pass.activation:
            self._pass.run_forward(states, entering)
            self._log("activation", step, own.segments[-1], self._pass.activation)
            self._pass_on("activation", step, own.segments[-1], self._pass.activation)
        returning = self._tensors.get(("returning", step, 0))
        if self._pass.activation and returning is not None and not self._pass.cotangent:
            self._pass.run_backward(states, returning)
            self._log("cotangent", step, own.first_segment - 1, self._pass.cotangent)
            self._pass_on("cotangent", step, own.first_segment - 1, self._pass.cotangent)
            for segment in sorted(self.model.tied & set(own.segments)):
                self._log("tied", step, segment, self._pass.gradients[segment])
                self._pass_on("tied", step, segment, self._pass.gradients[segment])
        if self._pass.cotangent:
            self._complete_gradients(own, step)

    def _complete_gradients(self, own: StagePlan, step: int) -> None:
        assert self._pass is not None
        needed = {s for each in own.segments for s in self.model.tied_with(each)}
        needed -= set(own.segments)
        tied = {s: self._tensors.get(("tied", step, s)) for s in needed}
        known = {s: value for s, value in tied.items() if value is not None}
        if len(known) == len(needed):
            self.gradients = summed(self.model, self._pass.gradients, known)
            self.log.finish(step)
            self.node.told(step)
            done = StageDone(position=self.position, step=step, gradients=self.gradients)
            self._tell_members(done)

    def _pass_on(self, kind: str, step: int, segment: int, value: Value) -> None:
        """To the stage across the boundary, or to all others with a tied copy."""
        view, own = self.view, self.own
        assert view is not None
        assert own is not None
        if kind == "tied":
            targets = set(self.model.tied_with(segment)) - set(own.segments)
        else:
            target = segment + 1 if kind == "activation" else segment
            targets = {target} & set(range(self.model.count))
        devices = {view.plan.stages[view.plan.stage_of_segment(t)].device for t in targets}
        told = Tensor(position=self.position, kind=kind, step=step, segment=segment, value=value)
        for device in sorted(devices):
            self._ship(device, told)

    def _ship(self, to: DeviceId, message: object) -> None:
        position = self.position
        self.world.ship(self.node, to, message, lambda: self.position == position)

    def _tell_members(self, message: object) -> None:
        assert self.view is not None
        for member in self.view.members:
            self._ship(member, message)

    def apply(self, record: StepRecord) -> None:
        """A committed step: update, perhaps snapshot, and go on."""
        if self.ready and self._apply(record):
            own = self.own
            assert own is not None
            assert self.view is not None
            self.world.checker.on_applied(self.node, self.view.lineage, record.step)
            self.world.checker.on_states(self.node, record.step, self._own_states(own))
            if record.step % self.view.plan.replica_every == 0:
                self._snapshot(own, record.step)
            self.begin_step()

    def _apply(self, record: StepRecord) -> bool:
        """Update what has complete gradients of exactly this step."""
        applied = False
        for segment, (step, state) in list(self.states.items()):
            gradient = self.gradients.get(segment)
            if step == record.step - 1 == self.gradient_step - 1 and gradient is not None:
                self.states[segment] = (record.step, updated(segment, state, gradient, record))
                applied = True
        return applied

    # Replicas.

    def _snapshot(self, own: StagePlan, step: int) -> None:
        assert self.view is not None
        index = self.view.plan.stages.index(own)
        keeper = self.view.plan.replicas[index]
        if self.world.flaws.release_early:
            self.log.release(step)
        for segment in own.segments if keeper is not None else ():
            state = self.states[segment][1]
            self.disk.replicas[segment, step] = state  # for a forced return to the whole set
            replica = Replica(
                position=self.position, step=step, segment=segment, state=state,
                digest=digest(state),
            )  # fmt: skip
            self._send_replica(keeper, replica)

    def _send_replica(self, keeper: DeviceId | None, replica: Replica) -> None:
        if keeper is not None:
            self._later(0.1, lambda: self._ship(keeper, replica))

    def _keep(self, replica: Replica, sender: DeviceId) -> None:
        """What arrived may be damaged: only what has the announced digest is kept."""
        state = replica.state
        if self.world.rng.random() < self.world.corruption:
            state = bytes([state[0] ^ 1]) + state[1:]
        if digest(state) != replica.digest and not self.world.flaws.trust_replicas:
            owner = self.world.nodes[sender].stage
            self._later(0.3, lambda: owner._send_replica(self.node.device, replica))
            return
        self.disk.replicas[replica.segment, replica.step] = state
        self._announce(replica.segment, replica.step, replica.digest)

    def _announce(self, segment: int, step: int, known: str | None = None) -> None:
        assert self.view is not None
        state = digest(self.disk.replicas[segment, step]) if known is None else known
        stored = ReplicaStored(
            stamp=_stamp(self.view.plan), step=step, segment=segment,
            state=state,  # type: ignore[arg-type]  # a digest
        )  # fmt: skip
        self._tell_members((self.position, stored))

    def _note_stored(self, message: ReplicaStored, sender: DeviceId) -> None:
        self.sets.stored(message, sender)
        step = self.sets.releasable_step()
        if step is not None and step > 0:
            self.log.release(step)
            self.node.machine.forget_before(step)
            self.sets.forget_before(step)
            for segment, at in [key for key in self.disk.replicas if key[1] < step]:
                del self.disk.replicas[segment, at]

    # Messages.

    def take(self, message: object, sender: DeviceId) -> None:
        """Anything from a data link; of a later view it waits, of an earlier it is dropped."""
        position = message[0] if isinstance(message, tuple) else message.position  # type: ignore[attr-defined]
        if position > self.position:
            self._early.append((message, sender))
        elif position == self.position:
            self._take_present(message, sender)

    def _take_present(self, message: object, sender: DeviceId) -> None:
        match message:
            case Tensor():
                name = {"activation": "entering", "cotangent": "returning"}.get(message.kind)
                if name is None:
                    self._tensors["tied", message.step, message.segment] = message.value
                else:
                    self._tensors[name, message.step, 0] = message.value
                self._go_on()
            case StageDone():
                self.node.note_done(message, sender)
            case Replica():
                self._keep(message, sender)
            case Complaint():
                self.node.complained(sender)
            case (_, ReplicaStored() as stored):
                self._note_stored(stored, sender)
