"""Schedules by known cases: orders, refusals, simulated times, the drawing."""

from __future__ import annotations

import pytest

from p2ptrain.errors import ConfigError
from p2ptrain.schedule.actions import (
    Action,
    all_actions,
    check,
    gpipe,
    in_flight_max,
    one_f_one_b,
    parse_action,
    stage_actions,
)
from p2ptrain.schedule.drawing import draw
from p2ptrain.schedule.simulator import ceiling, simulate


def _text(actions: tuple[Action, ...]) -> str:
    return " ".join(str(action) for action in actions)


def _lists(*stages: str) -> list[list[Action]]:
    return [[parse_action(word) for word in stage.split()] for stage in stages]


@pytest.mark.parametrize(
    ("stage", "stages", "microbatches", "expected"),
    [
        (0, 1, 2, "0F0 0B0 0F1 0B1"),
        (0, 2, 3, "0F0 0F1 0B0 0F2 0B1 0B2"),
        (1, 2, 3, "1F0 1B0 1F1 1B1 1F2 1B2"),
        (0, 4, 2, "0F0 0F1 0B0 0B1"),
        (1, 3, 3, "1F0 1F1 1B0 1F2 1B1 1B2"),
    ],
)
def test_one_f_one_b_fills_alternates_and_drains(
    stage: int, stages: int, microbatches: int, expected: str
) -> None:
    assert _text(one_f_one_b(stage, stages, microbatches)) == expected


def test_gpipe_runs_backwards_by_microbatch() -> None:
    assert _text(gpipe(1, 2, 3)) == "1F0 1F1 1F2 1B0 1B1 1B2"


@pytest.mark.parametrize("text", ["2F0", "0B17", "63F4095"])
def test_action_prints_what_it_parses(text: str) -> None:
    assert str(parse_action(text)) == text


@pytest.mark.parametrize("text", ["", "F0", "2f0", "2W0", "-1F0", "2F", "2F0 ", "2F0x", "٢F0"])
def test_action_refuses_other_text(text: str) -> None:
    with pytest.raises(ValueError, match="not an action"):
        parse_action(text)


@pytest.mark.parametrize(
    ("stage", "stages", "count"), [(2, 2, 1), (0, 0, 1), (0, 65, 1), (0, 1, 0)]
)
def test_schedule_refuses_impossible_counts(stage: int, stages: int, count: int) -> None:
    with pytest.raises(ValueError, match=r"stage|microbatches"):
        one_f_one_b(stage, stages, count)


def test_unknown_schedule_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="zigzag"):
        stage_actions("zigzag", 0, 1, 1)


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        (_lists("0F0 0B0", "0F0 0B0"), "another stage"),
        (_lists("0F0 0F0"), "goes forward once"),
        (_lists("0F0 0F1 0B1 0B0"), "order of their microbatches"),
        (_lists("0F0 0B0 0F1 0B1", "1F0 1F1 1B0 1B1"), "0B0 waits for ever"),
        (_lists("0B0 0F0"), "0B0 waits for ever"),
        (_lists("0F0 0B0", ""), "goes forward once"),
    ],
)
def test_check_refuses_what_cannot_run(lists: list[list[Action]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(lists)


def test_simulate_refuses_a_deadlock_too() -> None:
    lists = _lists("0F0 0B0 0F1 0B1", "1F0 1F1 1B0 1B1")
    with pytest.raises(ConfigError, match="0B0 waits for ever"):
        simulate(lists, forward_ns=[1, 1], backward_ns=[1, 1], transfer_ns=[0])


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_equal_stages_reach_the_known_makespan(schedule: str) -> None:
    # (M + S - 1) (f + b) for both schedules when stages are equal and links free.
    actions = all_actions(schedule, 2, 8)
    timeline = simulate(actions, forward_ns=[10, 10], backward_ns=[20, 20], transfer_ns=[0])
    assert timeline.step_ns == 9 * 30
    assert timeline.bubble_share == pytest.approx(1 / 9)
    assert ceiling(actions, forward_ns=[10, 10], backward_ns=[20, 20]) == pytest.approx(16 / 9)


def test_transfers_queue_in_one_direction() -> None:
    # Two tensors leave at 1 and 2 and need 10 each: the second arrives at 21, not at 12.
    actions = all_actions("gpipe", 2, 2)
    timeline = simulate(actions, forward_ns=[1, 1], backward_ns=[1, 1], transfer_ns=[10])
    starts = [span.start_ns for span in timeline.stages[1]]
    assert starts == [11, 21, 22, 23]
    assert timeline.step_ns == 23 + 10 + 10 + 1


def test_simulate_refuses_times_that_do_not_match() -> None:
    with pytest.raises(ValueError, match="times for"):
        simulate(all_actions("1f1b", 2, 1), forward_ns=[1], backward_ns=[1, 1], transfer_ns=[0])
    with pytest.raises(ValueError, match="negative"):
        simulate(all_actions("1f1b", 1, 1), forward_ns=[-1], backward_ns=[1], transfer_ns=[])


def test_in_flight_counts_held_stashes() -> None:
    assert [in_flight_max(own) for own in all_actions("1f1b", 3, 8)] == [3, 2, 1]
    assert in_flight_max(gpipe(0, 3, 8)) == 8


def test_drawing_shows_the_bubble() -> None:
    actions = all_actions("1f1b", 2, 2)
    timeline = simulate(actions, forward_ns=[1, 1], backward_ns=[1, 1], transfer_ns=[0])
    assert draw(timeline, width=6) == "stage 0 |01.A.B|\nstage 1 |.0A1B.|"
