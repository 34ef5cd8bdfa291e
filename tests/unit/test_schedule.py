"""Schedules by known cases: orders, refusals, simulated times, the drawing."""

from __future__ import annotations

import pytest

from p2ptrain.errors import ConfigError
from p2ptrain.schedule.actions import (
    Action,
    all_actions,
    check,
    delayed_max,
    delayed_microbatches,
    gpipe,
    in_flight_max,
    one_f_one_b,
    parse_action,
    stage_actions,
    zero_bubble,
)
from p2ptrain.schedule.drawing import draw
from p2ptrain.schedule.simulator import PartsTime, ceiling, simulate


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


@pytest.mark.parametrize(
    ("stage", "stages", "microbatches", "expected"),
    [
        (0, 1, 2, "0F0 0B0 0F1 0B1"),
        (0, 2, 3, "0F0 0F1 0B0 0F2 0B1 0B2"),
        (1, 2, 4, "1F0 1B0 1F1 1B1 1W0 1F2 1B2 1W1 1F3 1B3 1W2 1W3"),
        (1, 3, 3, "1F0 1F1 1B0 1F2 1B1 1W0 1B2 1W1 1W2"),
        (2, 3, 1, "2F0 2B0"),
        (2, 3, 2, "2F0 2B0 2F1 2B1 2W0 2W1"),
    ],
)
def test_zero_bubble_delays_gradients_on_all_but_the_first_stage(
    stage: int, stages: int, microbatches: int, expected: str
) -> None:
    actions = zero_bubble(stage, stages, microbatches)
    assert _text(actions) == expected
    check([[*zero_bubble(s, stages, microbatches)] for s in range(stages)])


@pytest.mark.parametrize("text", ["2F0", "0B17", "63F4095", "1W3"])
def test_action_prints_what_it_parses(text: str) -> None:
    assert str(parse_action(text)) == text


@pytest.mark.parametrize("text", ["", "F0", "2f0", "2w0", "-1F0", "2F", "2F0 ", "2F0x", "٢F0"])
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
        (_lists("0F0 0B0 0F1 0B1 0W1 0W0"), "gradients are not added in the order"),
        (_lists("0F0 0B0 0F1 0B1 0W0"), "gradients are not added in the order"),
        (_lists("0F0 0B0 0W0 0W0"), "gradients are not added in the order"),
        (_lists("0F0 0W0 0B0"), "0W0 waits for ever"),
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


@pytest.mark.parametrize("stages", range(2, 9))
def test_zero_bubble_leaves_only_the_filling_of_the_pipeline(stages: int) -> None:
    # Qi et al. 2024, table 2: (S - 1) (f + b - w), here with all three equal; 1F1B has three times
    # as much.
    actions, microbatches = all_actions("zb-h1", stages, 2 * stages), 2 * stages
    times = {"forward_ns": [10] * stages, "backward_ns": [20] * stages}
    parts = [PartsTime(cotangents_ns=10, gradients_ns=10)] * stages
    free = {"transfer_ns": [0] * (stages - 1)}
    assert simulate(actions, **times, **free, parts=parts).step_ns == (
        30 * microbatches + 10 * (stages - 1)
    )
    assert ceiling(actions, **times, parts=parts) == pytest.approx(
        3 * microbatches * stages / (3 * microbatches + stages - 1)
    )
    whole = simulate(all_actions("1f1b", stages, microbatches), **times, **free)
    assert whole.step_ns == 30 * (microbatches + stages - 1)


def test_backwards_without_parts_take_as_long_as_under_1f1b() -> None:
    times = {"forward_ns": [10, 10], "backward_ns": [20, 20]}
    delayed = simulate(all_actions("zb-h1", 2, 8), **times, transfer_ns=[0])
    assert delayed.step_ns == 9 * 30


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
    assert [in_flight_max(own) for own in all_actions("zb-h1", 3, 8)] == [3, 3, 3]


def test_delayed_microbatches_are_those_with_a_w() -> None:
    assert [delayed_max(own) for own in all_actions("zb-h1", 3, 8)] == [0, 2, 3]
    assert delayed_microbatches(zero_bubble(0, 3, 8)) == frozenset()
    assert delayed_microbatches(zero_bubble(2, 3, 8)) == frozenset(range(8))
    assert delayed_max(one_f_one_b(0, 3, 8)) == 0


def test_drawing_shows_the_bubble() -> None:
    actions = all_actions("1f1b", 2, 2)
    timeline = simulate(actions, forward_ns=[1, 1], backward_ns=[1, 1], transfer_ns=[0])
    assert draw(timeline, width=6) == "stage 0 |01.A.B|\nstage 1 |.0A1B.|"


def test_drawing_shows_delayed_gradients() -> None:
    timeline = simulate(
        all_actions("zb-h1", 2, 2), forward_ns=[1, 1], backward_ns=[2, 2], transfer_ns=[0],
        parts=[PartsTime(cotangents_ns=1, gradients_ns=1)] * 2,
    )  # fmt: skip
    assert draw(timeline, width=7) == "stage 0 |01.AABB|\nstage 1 |.0A1Bww|"
