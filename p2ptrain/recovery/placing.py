"""Price the placements of `recovery.successor` with the planner's own costs."""

from __future__ import annotations

from collections.abc import Sequence

from p2ptrain.ids import DeviceId
from p2ptrain.planner.costs import CostModel
from p2ptrain.planner.input import PlanningInput
from p2ptrain.recovery.successor import Place, Placement


def placing(planning: PlanningInput) -> Place:
    """A function that prices stages as `choose_plan` would.

    Of `planning` it takes manifest, contract, profiles, memory model, schedule and links.
    """
    model = CostModel(planning)
    kinds = {segment.kind for segment in planning.manifest.segments}
    known = {each.device: each for each in planning.profiles if kinds <= each.kinds.keys()}

    def place(spans: Sequence[tuple[DeviceId, range]]) -> Placement | None:
        if any(device not in known for device, _ in spans):
            return None
        costs = model.order(tuple(known[device] for device, _ in spans))
        bounds = [(index, span.start, span.stop) for index, (_, span) in enumerate(spans)]
        if not all(model.fits(costs, *bound) for bound in bounds):
            return None
        cuts = tuple(end for _, _, end in bounds)
        return Placement(
            stages=tuple(model.stage_plan(costs, *bound) for bound in bounds),
            step_ns=model.play(costs, cuts).step_ns,
        )

    return place
