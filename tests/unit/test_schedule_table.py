"""`tools/schedule_table.py`: known bubbles, and what the zero-bubble schedule gains."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from p2ptrain.schedule.actions import SCHEDULES
from tools.schedule_table import STAGES, Times, main, rows

FREE = Times(forward_ns=1000, backward_ns=2000, transfer_ns=0)


def test_bubbles_of_equal_stages_are_the_known_ones() -> None:
    found = {(row.schedule, row.stages): row for row in rows(FREE, 8)}
    assert len(found) == len(SCHEDULES) * len(STAGES)
    for stages in STAGES:
        for schedule in ("1f1b", "gpipe", "eager-1f1b"):
            row = found[schedule, stages]
            assert row.bubble == pytest.approx((stages - 1) / (8 + stages - 1))
            assert row.ceiling == row.speed_up == pytest.approx(stages * 8 / (8 + stages - 1))
        assert found["1f1b", stages].held == min(stages, 8)
        assert found["eager-1f1b", stages].held == min(2 * stages - 1, 8)
        assert found["gpipe", stages].held == 8


def test_delayed_gradients_fill_two_thirds_of_the_bubble() -> None:
    # Qi et al. 2024: with equal F, B and W the bubble of ZB-H1 is a third of that of 1F1B.
    found = {(row.schedule, row.stages): row for row in rows(FREE, 32)}
    for stages in STAGES:
        whole = found["1f1b", stages].bubble / (1 - found["1f1b", stages].bubble)
        filled = found["zb-h1", stages].bubble / (1 - found["zb-h1", stages].bubble)
        assert filled == pytest.approx(whole / 3, rel=0.01)


def test_transfers_cost_speed_but_not_the_ceiling() -> None:
    slow = Times(forward_ns=1000, backward_ns=2000, transfer_ns=4000)
    for row, free in zip(rows(slow, 8), rows(FREE, 8), strict=True):
        assert row.ceiling == free.ceiling > row.speed_up


@pytest.mark.parametrize("transfer_ns", [300, 1000])
@pytest.mark.parametrize(("plain", "ways"), [("1f1b", 2), ("zb-h1", 1)])
def test_eager_schedules_hide_transfers_up_to_a_forward(
    plain: str, ways: int, transfer_ns: int
) -> None:
    """They cost what the first and the last microbatch need, which under ZB-H1 is the first."""

    def step_ns(schedule: str, stages: int, transfer_ns: int) -> float:
        times = Times(forward_ns=1000, backward_ns=2000, transfer_ns=transfer_ns)
        found = next(row for row in rows(times, 32, [stages]) if row.schedule == schedule)
        return 32 * stages * 3000 / found.speed_up

    for stages in STAGES:
        eager = step_ns(f"eager-{plain}", stages, transfer_ns)
        free = step_ns(plain, stages, 0)
        assert eager == pytest.approx(free + ways * transfer_ns * (stages - 1))
        assert eager < step_ns(plain, stages, transfer_ns)


def test_it_prints_a_table_or_an_object() -> None:
    runner = CliRunner()
    table = runner.invoke(main, ["--microbatches", "4"])
    assert table.exit_code == 0
    assert "4 microbatches, backward 2 and transfer 0 forwards" in table.output
    answer = json.loads(runner.invoke(main, ["--json"]).output)
    assert (answer["version"], len(answer["rows"])) == (1, 35)
