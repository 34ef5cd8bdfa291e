"""Which replica sets are whole: every segment's state of one step, durable away from its owner.

A stage that two present peers or more run each for themselves needs no copy of it: whoever is left
has its state. Of tensor shards nobody has: two members keep copies of the whole.

Knowledge comes from `ReplicaStored` only. A decided view starts it anew: owners and members have
changed, and every keeper says again what it still keeps, so a copy that vanished with a disk is
not counted for long.
"""

from __future__ import annotations

from collections.abc import Collection

from p2ptrain.agreement.view import View
from p2ptrain.errors import RemoteProtocolError
from p2ptrain.ids import DeviceId, Digest
from p2ptrain.planner.plan import Plan, StagePlan
from p2ptrain.training.messages import ReplicaStored


class ReplicaSets:
    """What one member has heard; the same messages give the same answers everywhere."""

    def __init__(self) -> None:
        self._plan: Plan | None = None
        self._logs_from = self._committed = 0
        self._keepers: dict[int, dict[int, set[DeviceId]]] = {}
        self._states: dict[tuple[int, int], set[Digest]] = {}

    @property
    def logs_from(self) -> int:
        """The step since which the logs of all stages are known to be complete."""
        return self._logs_from

    def begin(self, view: View) -> None:
        """A view counts from now; keepers say again what they keep.

        Only a set made in this view protects: what had been logged before may have gone with a
        device, or be released by a member that knew a set to be whole which is so no longer.
        """
        self._logs_from = self._committed = view.resume_step
        self._plan = view.plan
        self._keepers.clear()
        self._states.clear()

    def stored(self, message: ReplicaStored, sender: DeviceId) -> None:
        """A keeper has checked a copy and made it durable.

        Where keepers tell of different states of one segment and step, none of them counts: a
        replay could not tell which is right.

        Raises:
            RemoteProtocolError: there is no such segment.
        """
        plan = self._plan
        if plan is None or sender not in plan.members:
            return
        if message.segment not in range(_segment_count(plan)):
            raise RemoteProtocolError(f"a replica of segment {message.segment}, which is not there")
        self._states.setdefault((message.step, message.segment), set()).add(message.state)
        self._keepers.setdefault(message.step, {}).setdefault(message.segment, set()).add(sender)

    @property
    def steps(self) -> tuple[int, ...]:
        """Steps of which a replica is known in this view."""
        return tuple(self._keepers)

    def committed(self, step: int) -> None:
        """A step of the view can no longer be lost."""
        self._committed = max(self._committed, step)

    def keepers(self, step: int, segment: int) -> tuple[DeviceId, ...]:
        """Who is known to keep this segment's state of that step."""
        return tuple(sorted(self._keepers.get(step, {}).get(segment, ())))

    def whole_step(self, present: Collection[DeviceId]) -> int | None:
        """The newest step from which any one lost stage of the present plan can be replayed.

        Every segment is kept by a present member other than the one that runs it, and all logs
        since are complete. Step 0 needs no copies: its states are drawn. Where every stage has
        siblings it is the newest committed step. None: there is none.
        """
        plan = self._plan
        if plan is None:
            return None
        steps = [step for step in self._keepers if step >= self._logs_from]
        whole = [step for step in steps if self._is_whole(plan, step, present)]
        drawn = [0] if self._logs_from == 0 else []
        if all(_has_siblings(stage, present) for stage in plan.stages):
            return self._committed
        alone = [s for s in plan.stages if s.split == "replicas" and not _has_siblings(s, present)]
        return None if alone else max([*drawn, *whole], default=None)

    def releasable_step(self) -> int | None:
        """Logs, records and replicas of earlier steps (logs of it, too) may go; None: nothing.

        All members count, also those that cannot be reached now: what is durable stays so. A set
        is only let go for a newer one that is whole.
        """
        return None if self._plan is None else self.whole_step(self._plan.members)

    def forget_before(self, step: int) -> None:
        """Drop what is known of older sets."""
        self._keepers = {at: known for at, known in self._keepers.items() if at >= step}
        self._states = {key: found for key, found in self._states.items() if key[0] >= step}

    def _is_whole(self, plan: Plan, step: int, present: Collection[DeviceId]) -> bool:
        return all(
            self._is_kept(step, segment, stage, _counted(plan, stage, present))
            for stage in plan.stages
            if stage.split != "replicas"
            for segment in stage.segments
        )

    def _is_kept(
        self, step: int, segment: int, stage: StagePlan, counted: Collection[DeviceId]
    ) -> bool:
        """Whether a copy is left, whoever of its owner and its keepers is lost."""
        keepers = self._keepers[step].get(segment, set()) & set(counted)
        agree = len(self._states.get((step, segment), ())) == 1
        if stage.split == "tensor":  # with any one peer a slice is lost
            return agree and len(keepers) > 1
        return agree and bool(keepers)


def _counted(plan: Plan, stage: StagePlan, present: Collection[DeviceId]) -> set[DeviceId]:
    """Whose copies of a stage protect it. Without the home peer a private run pauses anyway, and it
    comes back with its disk; of shards everybody's count."""
    stays = plan.keeps_itself(stage) or stage.split == "tensor"
    return set(present) if stays else set(present) - {stage.device}


def _has_siblings(stage: StagePlan, present: Collection[DeviceId]) -> bool:
    return stage.split == "replicas" and len(set(stage.devices) & set(present)) > 1


def _segment_count(plan: Plan) -> int:
    return plan.stages[-1].first_segment + plan.stages[-1].segment_count
