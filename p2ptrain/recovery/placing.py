"""Price the placements of `recovery.successor` with the planner's own costs."""

from __future__ import annotations

from collections.abc import Sequence

from p2ptrain.ids import DeviceId
from p2ptrain.planner.choose import run_question
from p2ptrain.planner.drafting import Drafting
from p2ptrain.planner.explore import Explorer
from p2ptrain.planner.input import PlanningInput
from p2ptrain.planner.pricing import Pricing
from p2ptrain.recovery.successor import Place, Placement


def placing(planning: PlanningInput) -> Place:
    """A function that prices stages as `choose_plan` would.

    Of `planning` it takes manifest, contract, profiles, memory model, schedule and links.
    """
    pricing = Pricing(run_question(planning))
    explorer = Explorer(pricing)
    known = {device.id: index for index, device in enumerate(pricing.devices)}

    def place(spans: Sequence[tuple[DeviceId, range]]) -> Placement | None:
        if any(device not in known for device, _ in spans):
            return None
        groups = tuple((known[device],) for device, _ in spans)
        arrangement = pricing.arrange(groups, planning.schedule)
        if arrangement is None:
            return None
        for (replica,), (_, span) in zip(arrangement.stages, spans, strict=True):
            if span.stop > pricing.longest_fit(replica, span.start):
                return None
        candidate = explorer.candidate(arrangement, tuple(span.stop for _, span in spans))
        draft = Drafting(planning, pricing, candidate)
        return Placement(
            stages=draft.stages(), step_ns=candidate.price.step_ns, step_uj=draft.step_uj()
        )

    return place
