"""The ceiling that measured stage times allow."""

from __future__ import annotations

import pytest

from p2ptrain.planner.profile import KindCost
from tools.bench.balance import balance, median_costs

COSTS = {
    "block": KindCost(forward_ns=100, backward_ns=200),
    "head": KindCost(forward_ns=50, backward_ns=100),
}


@pytest.mark.parametrize(("microbatches", "expected"), [(8, 16 / 9), (32, 64 / 33)])
def test_balanced_stages_lose_one_microbatch_of_bubble(microbatches: int, expected: float) -> None:
    found = balance(
        COSTS,
        ["block"] * 4,
        [range(2), range(2, 4)],
        schedule="1f1b",
        microbatches=microbatches,
    )
    assert found.forward_ns == (200, 200)
    assert found.backward_ns == (400, 400)
    assert found.ceiling == pytest.approx(expected)


def test_unbalanced_stages_have_a_lower_ceiling() -> None:
    kinds = ["block", "block", "block", "head"]
    even = balance(COSTS, kinds, [range(2), range(2, 4)], schedule="1f1b", microbatches=8)
    odd = balance(COSTS, kinds, [range(1), range(1, 4)], schedule="1f1b", microbatches=8)
    assert even.backward_ns == (400, 300)
    assert odd.ceiling < even.ceiling


def test_one_stage_has_no_bubble() -> None:
    found = balance(COSTS, ["block", "head"], [range(2)], schedule="1f1b", microbatches=8)
    assert found.ceiling == 1.0


def test_median_costs_are_taken_per_kind_and_direction() -> None:
    rounds = [
        {"block": KindCost(forward_ns=forward, backward_ns=backward)}
        for forward, backward in ((100, 900), (300, 200), (200, 250))
    ]
    expected = KindCost(forward_ns=200, backward_ns=250, cotangents_ns=250)
    assert median_costs(rounds) == {"block": expected}


def test_delayed_gradients_raise_the_ceiling_by_what_their_parts_cost() -> None:
    costs = {"block": KindCost(forward_ns=100, backward_ns=200, cotangents_ns=110, gradients_ns=96)}
    stages = [range(2), range(2, 4)]
    found = balance(costs, ["block"] * 4, stages, schedule="zb-h1", microbatches=8)
    assert [part.cotangents_ns for part in found.parts] == [220, 220]
    # The last stage is busy from the first forward on; two of its gradients are left when the
    # first stage gets its last cotangents.
    step_ns = 200 + 8 * (200 + 220 + 192) - 2 * 192 + 400
    assert found.ceiling == pytest.approx(2 * 8 * 600 / step_ns)
