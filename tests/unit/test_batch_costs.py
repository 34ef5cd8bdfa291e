"""A segment's time for microbatch sizes that nobody has measured."""

from __future__ import annotations

import dataclasses

import pytest

from p2ptrain.planner.batch_costs import cost_for, second_size
from p2ptrain.planner.profile import KindCost


def cost(times: int, *, parted: bool = False) -> KindCost:
    parts = {"cotangents_ns": times, "gradients_ns": 3 * times} if parted else {}
    return KindCost(forward_ns=times, backward_ns=2 * times, **parts)


@pytest.mark.parametrize(("batch", "forward_ns"), [(2, 30), (3, 40), (4, 50), (6, 70), (8, 90)])
def test_time_is_a_fixed_part_and_one_per_sample(batch: int, forward_ns: int) -> None:
    sizes = {2: cost(30), 4: cost(50)}  # 10 and 10 per sample
    found = cost_for(sizes, batch, in_parts=False)
    assert found is not None
    assert (found.forward_ns, found.backward_ns) == (forward_ns, 2 * forward_ns)
    assert found.cotangents_ns is None


def test_end_of_a_step_does_not_depend_on_the_size() -> None:
    ends = {"norm_ns": 7, "update_ns": 9}
    sizes = {n: dataclasses.replace(cost(10 * n), **ends) for n in (2, 4)}
    found = cost_for(sizes, 3, in_parts=False)
    assert found == dataclasses.replace(cost(30), **ends)


def test_what_is_far_from_anything_measured_is_not_guessed() -> None:
    sizes = {4: cost(30), 8: cost(50)}
    assert cost_for(sizes, 1, in_parts=False) is None
    assert cost_for(sizes, 17, in_parts=False) is None
    assert cost_for({4: cost(30)}, 5, in_parts=False) is None
    assert cost_for({}, 5, in_parts=False) is None
    assert cost_for({4: cost(30)}, 4, in_parts=False) == cost(30)


def test_parts_must_have_been_measured_where_they_are_needed() -> None:
    sizes = {2: cost(30), 4: cost(50)}
    assert cost_for(sizes, 4, in_parts=True) is None
    parted = {2: cost(30, parted=True), 4: cost(50, parted=True)}
    found = cost_for(parted, 3, in_parts=True)
    assert found is not None
    assert (found.cotangents_ns, found.gradients_ns) == (40, 120)


def test_noise_gives_no_negative_time_and_none_that_falls() -> None:
    sizes = {2: cost(100), 4: cost(90), 8: cost(10**6)}
    for batch in range(1, 17):
        found = cost_for(sizes, batch, in_parts=False)
        assert found is not None
        assert found.forward_ns >= 90


def test_second_size_is_another_one() -> None:
    assert [second_size(batch) for batch in (1, 2, 3, 8)] == [2, 1, 1, 4]
