"""Why a device has no part in any plan that was found."""

from __future__ import annotations

from p2ptrain.planner.explore import Found
from p2ptrain.planner.pricing import Pricing
from p2ptrain.schedule.actions import ONE
from p2ptrain.units import UJ_PER_J, bytes_rounded_up, format_bytes, format_joules


def nothing_with(pricing: Pricing, found: Found, index: int) -> str:
    """The reason, of a device that `found.with_device` lacks.

    What is said follows from the question alone, or is no more than that the search found nothing:
    of many devices it tries the likely plans only.
    """
    question, device = pricing.question, pricing.devices[index]
    against = found.objections.get("pipeline")
    if question.private and against is not None:
        return f"private: there is no pipeline, since {against}"
    room = device.profile.memory_bytes
    least = min(pricing.memory_bytes(i, i + 1, ONE) for i in range(pricing.segment_count))
    if least > room:
        return (
            f"not one segment fits its {format_bytes(room)}: the smallest needs "
            f"{bytes_rounded_up(least)}"
        )
    bounds = [f"its {format_bytes(room)}"]
    if question.objective.has_limits:
        bounds.append("the limits")
    if device.battery_uj is not None:
        above = " has above its reserve" if question.for_run else " has"
        bounds.append(f"the {format_joules(device.battery_uj / UJ_PER_J)} that its battery{above}")
    return f"no plan with it was found that fits {' and '.join(bounds)}"
