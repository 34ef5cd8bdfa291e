"""Schedules for any number of stages and microbatches."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from p2ptrain.schedule.actions import (
    SCHEDULES,
    Action,
    all_actions,
    check,
    delayed_max,
    evaluation,
    held,
    in_flight_max,
    one_f_one_b,
)
from p2ptrain.schedule.simulator import PartsTime, ceiling, simulate

_STAGES = st.integers(1, 8)
_MICROBATCHES = st.integers(1, 20)


@given(schedule=st.sampled_from(SCHEDULES), stages=_STAGES, microbatches=_MICROBATCHES)
@settings(max_examples=60, deadline=None)
def test_schedules_never_deadlock(schedule: str, stages: int, microbatches: int) -> None:
    check(all_actions(schedule, stages, microbatches))


@given(stages=_STAGES, microbatches=_MICROBATCHES, data=st.data())
@settings(max_examples=60, deadline=None)
def test_one_f_one_b_bounds_the_stash(stages: int, microbatches: int, data: st.DataObject) -> None:
    stage = data.draw(st.integers(0, stages - 1))
    actions = one_f_one_b(stage, stages, microbatches)
    assert in_flight_max(actions) == min(microbatches, stages - stage)


@given(stages=_STAGES, microbatches=_MICROBATCHES)
@settings(max_examples=60, deadline=None)
def test_zero_bubble_holds_no_more_than_the_first_stage_of_1f1b(
    stages: int, microbatches: int
) -> None:
    most = in_flight_max(one_f_one_b(0, stages, microbatches))
    for own in all_actions("zb-h1", stages, microbatches):
        assert delayed_max(own) <= in_flight_max(own) <= most


@given(stages=_STAGES, microbatches=_MICROBATCHES)
@settings(max_examples=60, deadline=None)
def test_eager_schedules_hold_less_than_twice_as_many(stages: int, microbatches: int) -> None:
    most = min(microbatches, 2 * stages - 1)
    for schedule in ("eager-1f1b", "eager-zb-h1"):
        every = all_actions(schedule, stages, microbatches)
        assert in_flight_max(every[0]) == most
        assert all(delayed_max(own) <= in_flight_max(own) <= most for own in every)
    assert [in_flight_max(own) for own in all_actions("eager-1f1b", stages, microbatches)] == [
        min(microbatches, 2 * (stages - stage) - 1) for stage in range(stages)
    ]


@given(
    stages=_STAGES,
    microbatches=_MICROBATCHES,
    forward=st.integers(1, 100),
    transfer=st.integers(0, 300),
)
@settings(max_examples=150, deadline=None)
def test_eager_schedules_of_equal_stages_are_never_slower(
    stages: int, microbatches: int, forward: int, transfer: int
) -> None:
    plains = ("1f1b", "zb-h1") if microbatches >= 2 * stages else ("1f1b",)
    for plain in plains:  # where they all drain at once, delayed gradients may be in the way
        took = [
            simulate(
                all_actions(schedule, stages, microbatches),
                forward_ns=[forward] * stages,
                backward_ns=[2 * forward] * stages,
                transfer_ns=[transfer] * (stages - 1),
                parts=[PartsTime(cotangents_ns=forward, gradients_ns=forward)] * stages,
            ).step_ns
            for schedule in (plain, f"eager-{plain}")
        ]
        assert took[1] <= took[0]


@given(
    rows=st.lists(st.tuples(*[st.integers(0, 1000)] * 3), min_size=1, max_size=6),
    microbatches=st.integers(1, 12),
)
@settings(max_examples=60, deadline=None)
def test_zero_bubble_is_never_slower_where_parts_cost_nothing_extra(
    rows: list[tuple[int, int, int]], microbatches: int
) -> None:
    times = {
        "forward_ns": [row[0] for row in rows],
        "backward_ns": [row[1] + row[2] for row in rows],
        "transfer_ns": [0] * (len(rows) - 1),
    }
    parts = [PartsTime(cotangents_ns=row[1], gradients_ns=row[2]) for row in rows]
    made = {
        schedule: simulate(all_actions(schedule, len(rows), microbatches), **times, parts=parts)
        for schedule in ("1f1b", "zb-h1")
    }
    assert made["zb-h1"].step_ns <= made["1f1b"].step_ns
    assert sum(made["zb-h1"].compute_ns) == sum(made["1f1b"].compute_ns)


@given(
    schedule=st.sampled_from(SCHEDULES),
    times=st.lists(st.tuples(*[st.integers(0, 1000)] * 3), min_size=1, max_size=6),
    microbatches=st.integers(1, 12),
)
@settings(max_examples=80, deadline=None)
def test_simulated_time_keeps_its_bounds(
    schedule: str, times: list[tuple[int, int, int]], microbatches: int
) -> None:
    forward, backward = [row[0] for row in times], [row[1] for row in times]
    transfer = [row[2] for row in times][1:]
    actions = all_actions(schedule, len(times), microbatches)
    timeline = simulate(actions, forward_ns=forward, backward_ns=backward, transfer_ns=transfer)
    one_pass = sum(forward) + sum(backward) + 2 * sum(transfer)
    busiest = max(microbatches * (f + b) for f, b in zip(forward, backward, strict=True))
    assert max(one_pass, busiest) <= timeline.step_ns <= microbatches * one_pass
    assert sum(timeline.compute_ns) == microbatches * (sum(forward) + sum(backward))
    assert 0.0 <= timeline.bubble_share <= 1.0
    assert ceiling(actions, forward_ns=forward, backward_ns=backward) <= len(times) + 1e-9


@given(
    stages=_STAGES, microbatches=_MICROBATCHES, rows=st.integers(1, 9), columns=st.integers(0, 9)
)
@settings(max_examples=40, deadline=None)
def test_no_action_starts_before_its_input(
    stages: int, microbatches: int, rows: int, columns: int
) -> None:
    actions = all_actions("1f1b", stages, microbatches)
    timeline = simulate(
        actions,
        forward_ns=[rows + index for index in range(stages)],
        backward_ns=[2 * rows] * stages,
        transfer_ns=[columns] * (stages - 1),
    )
    ends = {str(span.action): span.end_ns for own in timeline.stages for span in own}
    for own in timeline.stages:
        for span in own:
            stage, microbatch = span.action.stage, span.action.microbatch
            if span.action.kind == "F" and stage > 0:
                assert span.start_ns >= ends[f"{stage - 1}F{microbatch}"] + columns
            if span.action.kind == "B" and stage < stages - 1:
                assert span.start_ns >= ends[f"{stage + 1}B{microbatch}"] + columns


@given(
    schedule=st.sampled_from(SCHEDULES),
    stages=st.integers(2, 7),
    microbatches=st.integers(1, 15),
    evaluated=st.integers(1, 30) | st.none(),
)
@settings(max_examples=150, deadline=None)
def test_no_tensor_arrives_while_its_place_is_read(
    schedule: str, stages: int, microbatches: int, evaluated: int | None
) -> None:
    training = all_actions(schedule, stages, microbatches)
    rooms = [held(schedule, own) for own in training]
    lists = training
    if evaluated is not None:
        lists = tuple(
            evaluation(stage, stages, evaluated, in_flight=room.in_flight)
            for stage, room in enumerate(rooms)
        )
        check(lists)
    for stage, own in enumerate(lists):
        places = rooms[stage].at_edges
        if stage > 0:  # an activation may come as soon as the stage before can have computed it
            for sent in (action for action in lists[stage - 1] if action.kind == "F"):
                known = _released_before(lists[stage - 1], sent)
                assert _done(own, "B", known) >= _readers(own, sent.microbatch - places)
        if stage < stages - 1:  # a cotangent may come as soon as our forward has been sent
            for sent in (action for action in own if action.kind == "F"):
                done = set(own[: own.index(sent)])
                assert done >= _readers(own, sent.microbatch - places)


def _released_before(own: tuple[Action, ...], forward: Action) -> int:
    """The newest microbatch whose backward a stage has seen before one of its forwards."""
    before = own[: own.index(forward)]
    return max((action.microbatch for action in before if action.kind == "B"), default=-1)


def _done(own: tuple[Action, ...], kind: str, microbatch: int) -> set[Action]:
    """What a stage has surely done once its action of this kind is known to be done."""
    ends = [i for i, a in enumerate(own) if (a.kind, a.microbatch) == (kind, microbatch)]
    return set(own[: ends[0] + 1]) if ends else set()


def _readers(own: tuple[Action, ...], microbatch: int) -> set[Action]:
    return {action for action in own if action.microbatch == microbatch}
