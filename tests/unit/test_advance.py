"""Segments that move once their states have come: who gets what, when, and replayed from where."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

from p2ptrain.ids import DeviceId
from p2ptrain.recovery.advance import advanced_step, announced, marks, receivers, told_step
from p2ptrain.recovery.inventory import (
    HeldLog,
    HeldState,
    Inventory,
    LiveStage,
    LogKind,
    SegmentSpan,
)
from p2ptrain.recovery.planning import Losses, restoration
from p2ptrain.recovery.restoration import Replay, Restoration, SpanAt
from tests.sim.plans import device
from tests.sim.run_views import make_step, staged_plan, staged_view

A, B, C = (device(index) for index in range(3))
SENT, NOW = 10, 14
"""After which step the states were sent, and after which the next view goes on."""


def at(owner: DeviceId, first: int, count: int) -> SpanAt:
    return SpanAt(span=SegmentSpan(first=first, count=count), device=owner)


WAITING = replace(
    staged_view((A, 3), (B, 3), reserves=(C,)),
    resume_step=SENT,
    aim=(at(A, 0, 2), at(B, 2, 2), at(C, 4, 2)),
)
"""Segment 2 goes from a to b, 4 and 5 from b to c."""
NEXT = staged_plan(WAITING.plan, (A, 2), (B, 2), (C, 2))


def held(first: int, count: int, step: int = SENT) -> HeldState:
    return HeldState(span=SegmentSpan(first=first, count=count), step=step)


def logs(*places: tuple[LogKind, int]) -> tuple[HeldLog, ...]:
    return tuple(
        HeldLog(kind=kind, segment=segment, first_step=SENT + 1, last_step=NOW)
        for kind, segment in places
    )


def member(first: int | None, *states: HeldState, logged: tuple[HeldLog, ...] = ()) -> Inventory:
    live = None
    if first is not None:
        span = SegmentSpan(first=first, count=3)
        live = LiveStage(span=span, step=NOW, gradients_complete=False)
    return Inventory(live=live, states=states, logs=logged, has_data=first == 0, linked=(A, B, C))


WHOLE: Mapping[DeviceId, Inventory] = {
    A: member(0, logged=logs(("activation", 2), ("activation", 1), ("cotangent", 1))),
    B: member(
        3, held(2, 1), logged=logs(("cotangent", 2), ("activation", 3), ("cotangent", 3))
    ),
    C: member(None, held(4, 2)),
}  # fmt: skip


def restored(promises: Mapping[DeviceId, Inventory]) -> Restoration:
    found = restoration(
        Losses(
            base=WAITING, plan=NEXT, promises=promises, resume_step=NOW,
            records=tuple(make_step(step) for step in range(SENT + 1, NOW + 1)),
        )
    )  # fmt: skip
    assert isinstance(found, Restoration)
    return found


def test_those_get_states_that_do_not_run_the_segments_yet() -> None:
    assert receivers(WAITING) == {2: B, 4: C, 5: C}
    assert receivers(replace(WAITING, aim=())) == {}


def test_cuts_to_come_are_marked_inside_the_stages_of_now() -> None:
    assert [marks(WAITING, stage.segments) for stage in WAITING.plan.stages] == [(1,), (3,)]
    aim = (at(A, 0, 3), at(C, 3, 3))
    assert [marks(replace(WAITING, aim=aim), s.segments) for s in WAITING.plan.stages] == [(), ()]


def test_reasons_name_every_device_whose_stage_changes() -> None:
    sentences = list(announced(WAITING.aim, WAITING.plan))
    assert [sentence[:8] for sentence in sentences] == [A[:8], B[:8], C[:8]]
    assert "segments 4 to 5" in sentences[2]
    assert not list(announced((at(A, 0, 3), at(B, 3, 3)), WAITING.plan))


@pytest.mark.parametrize(
    ("kept", "step"),
    [
        ({}, None),
        ({SENT: {2: B, 4: C}}, None),
        ({SENT: {2: B, 4: C, 5: B}}, None),
        ({SENT: {2: B, 4: C, 5: C}}, SENT),
        ({SENT: {2: B, 4: C, 5: C}, NOW: {2: B, 4: C, 5: C}}, NOW),
        ({SENT: {2: B}, NOW: {4: C, 5: C}}, None),
        ({SENT - 1: {2: B, 4: C, 5: C}}, None),
    ],
    ids=["nothing", "some", "elsewhere", "all", "newest", "two steps", "before the view"],
)
def test_states_have_come_when_everybody_has_all_of_one_step(
    kept: dict[int, dict[int, DeviceId]], step: int | None
) -> None:
    def keepers(at_step: int, segment: int) -> tuple[DeviceId, ...]:
        return tuple(d for s, d in kept[at_step].items() if s == segment)

    assert advanced_step(WAITING, kept, keepers) == step
    assert advanced_step(replace(WAITING, aim=()), kept, keepers) is None


def test_promises_tell_the_same() -> None:
    assert told_step(WAITING, WHOLE) == SENT
    assert told_step(WAITING, {**WHOLE, C: member(None, held(4, 1))}) is None


def test_moved_segments_are_replayed_from_their_own_replicas() -> None:
    found = restored(WHOLE)
    assert [(each.span, each.replayer, each.step) for each in found.replays] == [
        (SegmentSpan(first=2, count=1), B, SENT), (SegmentSpan(first=4, count=2), C, SENT)
    ]  # fmt: skip
    middle, last = found.replays
    assert middle.replicas == (at(B, 2, 1),)
    assert (middle.activations_from, middle.cotangents_from) == (A, B)
    assert last == Replay(
        span=SegmentSpan(first=4, count=2), step=SENT, replayer=C, replicas=(at(C, 4, 2),),
        activations_from=B, cotangents_from=None, tied_from=(), data_from=A,
    )  # fmt: skip
    assert found.sources == (at(A, 0, 2), at(B, 2, 2), at(C, 4, 2))


@pytest.mark.parametrize(
    "changed",
    [
        {C: member(None, held(4, 1))},
        {B: member(3, held(2, 1), logged=logs(("cotangent", 2), ("cotangent", 3)))},
        {B: member(3, held(2, 1), held(4, 2)), C: member(None)},
    ],
    ids=["one state is missing", "the new cut was not logged", "only its owner keeps it"],
)
def test_what_cannot_be_replayed_is_fetched_from_who_runs_it(
    changed: dict[DeviceId, Inventory],
) -> None:
    found = restored({**WHOLE, **changed})
    assert C not in {each.replayer for each in found.replays}
    assert found.sources[-1].device == B


@pytest.mark.parametrize(
    "aim",
    [
        (at(A, 0, 6), at(A, 0, 6)),
        (at(A, 0, 3), at(device(9), 3, 3)),
        (at(A, 0, 3), at(B, 4, 2)),
        (at(A, 0, 3), at(B, 3, 2)),
        (at(B, 3, 3), at(A, 0, 3)),
    ],
    ids=["twice", "stranger", "gap", "short", "order"],
)
def test_aim_that_is_no_plan_of_the_view_is_refused(aim: tuple[SpanAt, ...]) -> None:
    with pytest.raises(ValueError, match="stages to come"):
        replace(WAITING, aim=aim)
