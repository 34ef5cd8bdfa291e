"""Schedules for any number of stages and microbatches."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from p2ptrain.schedule.actions import SCHEDULES, all_actions, check, in_flight_max, one_f_one_b
from p2ptrain.schedule.simulator import ceiling, simulate

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
