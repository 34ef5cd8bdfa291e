"""Which peers of a plan run each microbatch, and in which order one of them works.

Replicas of a stage share its microbatches out by their weights; shards of a stage all run every
microbatch. A plan without replicas has the order of `schedule.actions`, bit for bit as before.
"""

from __future__ import annotations

import dataclasses

from p2ptrain.errors import InvariantBroken
from p2ptrain.ids import DeviceId
from p2ptrain.planner.plan import Plan, StagePlan
from p2ptrain.schedule.actions import (
    Action,
    Held,
    evaluation,
    held,
    in_flight_max,
    stage_actions,
)
from p2ptrain.schedule.replicated import (
    Owners,
    owners_by_weight,
    replicated_actions,
    replicated_evaluation,
)
from p2ptrain.training.contract import Contract

Runners = tuple[tuple[DeviceId, ...], ...]
"""By microbatch: the devices of a stage that run it, by rank."""


def has_replicas(plan: Plan) -> bool:
    """Whether any stage shares its microbatches out."""
    return any(stage.split == "replicas" for stage in plan.stages)


def runners(stage: StagePlan, microbatches: int) -> Runners:
    """Who runs each microbatch of an item that has so many."""
    if stage.split != "replicas":
        return (stage.devices,) * microbatches
    return tuple((stage.devices[rank],) for rank in owners_by_weight(stage.weights, microbatches))


class Route:
    """One peer's place in a plan: what it runs, with whom it exchanges tensors, in which order."""

    def __init__(self, plan: Plan, device: DeviceId, *, stage: int | None = None) -> None:
        """`stage`: which, of a device with two; InvariantBroken for a device without it."""
        own = plan.stages_of(device)
        index = next(iter(own), None) if stage is None else stage
        if index is None or index not in own:
            raise InvariantBroken("a device without a stage runs no microbatches")
        self._plan, self._device = plan, device
        self.stage_index, self.stage = index, plan.stages[index]
        self.rank = self.stage.devices.index(device)
        self._replicated = has_replicas(plan)

    def own(self, microbatches: int) -> tuple[int, ...]:
        """Those of an item's microbatches that this peer runs, ascending."""
        ran_by = runners(self.stage, microbatches)
        return tuple(index for index, devices in enumerate(ran_by) if self._device in devices)

    def beside(self, offset: int, microbatches: int) -> Runners:
        """Who runs each microbatch in the stage before (-1) or after (1); empty: there is none."""
        index = self.stage_index + offset
        inside = 0 <= index < len(self._plan.stages)
        return runners(self._plan.stages[index], microbatches) if inside else ()

    @property
    def neighbours(self) -> tuple[DeviceId, ...]:
        """All devices of the stages before and after."""
        places = (self.stage_index - 1, self.stage_index + 1)
        stages = (self._plan.stages[i] for i in places if 0 <= i < len(self._plan.stages))
        return tuple(dict.fromkeys(device for stage in stages for device in stage.devices))

    def training(self, microbatches: int) -> tuple[Action, ...]:
        """This peer's actions in a step."""
        plan = self._plan
        if not self._replicated:
            return stage_actions(plan.schedule, self.stage_index, len(plan.stages), microbatches)
        replicas = [len(stage.devices) for stage in plan.stages]
        lists = replicated_actions(plan.schedule, self._owners(microbatches), replicas)
        return lists[self.stage_index][self.rank]

    def evaluation(self, microbatches: int, *, trained: int) -> tuple[Action, ...]:
        """This peer's actions in an evaluation, which may have more microbatches than a step
        (`trained`), but needs no more room."""
        stages, index = len(self._plan.stages), self.stage_index
        if not self._replicated:
            return evaluation(index, stages, microbatches, in_flight=self.stage.in_flight_max)
        replicas = [len(stage.devices) for stage in self._plan.stages]
        lists = replicated_evaluation(self._owners(microbatches), replicas, microbatches=trained)
        return lists[index][self.rank]

    def held(self, contract: Contract) -> Held:
        """How many microbatches this peer needs room for."""
        trains = held(self._plan.schedule, self.training(contract.microbatches))
        if not self._replicated:
            return trains
        evaluated = self.evaluation(contract.heldout_microbatches, trained=contract.microbatches)
        most = max(1, trains.in_flight, in_flight_max(evaluated))
        return dataclasses.replace(trains, in_flight=most)

    def _owners(self, microbatches: int) -> tuple[Owners, ...]:
        return tuple(owners_by_weight(stage.weights, microbatches) for stage in self._plan.stages)
