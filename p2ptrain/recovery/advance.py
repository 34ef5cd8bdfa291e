"""Move segments to other devices without a run waiting for their states, which come in advance.

A view names in `aim` the stages that are to follow it. Every set of snapshots that it makes also
goes to those devices that get segments then, and stages log what crosses the cuts to come. Once
the states are there, the next view moves the segments, and each is replayed from its own replica.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

from p2ptrain.agreement.view import View
from p2ptrain.ids import DeviceId, short
from p2ptrain.planner.plan import Plan
from p2ptrain.recovery.inventory import Inventory, SegmentSpan
from p2ptrain.recovery.restoration import SpanAt

Keepers = Callable[[int, int], Collection[DeviceId]]
"""Who is known to keep the state after a step (first) of a segment (second)."""


def stages_of(plan: Plan) -> tuple[SpanAt, ...]:
    """A plan's stages as a view names them in `aim`."""
    return tuple(
        SpanAt(
            span=SegmentSpan(first=stage.first_segment, count=stage.segment_count),
            device=stage.device,
        )
        for stage in plan.stages
    )


def receivers(view: View) -> dict[int, DeviceId]:
    """By segment, who gets it next: those only that another device runs in this view."""
    runs = {s: stage.devices for stage in view.plan.stages for s in stage.segments}
    return {
        segment: at.device
        for at in view.aim
        for segment in at.span.segments
        if at.device not in runs[segment]
    }


def marks(view: View, segments: range) -> tuple[int, ...]:
    """Segments of a stage, its last one excepted, after which a stage of the aim ends: what
    crosses there is logged though nobody is sent it."""
    ends = (at.span.segments[-1] for at in view.aim)
    return tuple(end for end in ends if end in segments[:-1])


def advanced_step(view: View, steps: Iterable[int], keepers: Keepers) -> int | None:
    """The newest of these steps after which every receiver keeps all that it gets; None: not yet,
    or the view has no aim. Earlier ones than the view's are not looked at: what crosses the cuts to
    come was not logged before."""
    moving = receivers(view)
    whole = (
        step
        for step in steps
        if step >= view.resume_step
        and all(device in keepers(step, segment) for segment, device in moving.items())
    )
    return max(whole, default=None) if moving else None


def told_step(view: View, promises: Mapping[DeviceId, Inventory]) -> int | None:
    """`advanced_step` by what promises tell."""

    def keepers(step: int, segment: int) -> list[DeviceId]:
        return [
            device
            for device, held in promises.items()
            if any(s.step == step and segment in s.span.segments for s in held.states)
        ]

    steps = {held.step for each in promises.values() for held in each.states}
    return advanced_step(view, steps, keepers)


def announced(aim: Collection[SpanAt], plan: Plan) -> Iterator[str]:
    """One sentence for each device whose stage changes, for a plan's reasons."""
    before = {(at.device, at.span) for at in stages_of(plan)}
    for at in aim:
        if (at.device, at.span) not in before:
            first, last = at.span.first, at.span.segments[-1]
            yield (
                f"{short(at.device)} is to run segments {first} to {last} "
                "once the states that it lacks have come"
            )
