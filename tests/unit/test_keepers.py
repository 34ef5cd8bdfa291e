"""Who keeps replicas and the second copy of the data."""

from __future__ import annotations

from p2ptrain.planner.keepers import data_holders, replica_keepers
from tests.sim.plans import device, make_plan

A, B, C, D = map(device, range(4))


def test_replica_avoids_neighbours_where_the_group_allows() -> None:
    stages = make_plan(A, B, C, D).stages
    assert replica_keepers(stages, (A, B, C, D)) == (C, D, A, B)
    assert replica_keepers(stages[:2], (A, B, C, D)) == (C, D)


def test_replica_goes_to_a_neighbour_when_there_is_nobody_else() -> None:
    assert replica_keepers(make_plan(A, B).stages, (A, B)) == (B, A)


def test_stage_that_is_alone_has_no_replica() -> None:
    assert replica_keepers(make_plan(A).stages, (A,)) == (None,)


def test_second_data_holder_is_in_reserve_if_anybody_is() -> None:
    stages = make_plan(A, B).stages
    assert data_holders(A, stages, (A, B, C), keep_data_here=False) == (A, C)
    assert data_holders(A, stages, (A, B), keep_data_here=False) == (A, B)
    assert data_holders(A, stages, (A, B, C), keep_data_here=False, holding=(B,)) == (A, B)


def test_data_that_stays_or_has_nowhere_to_go_has_one_holder() -> None:
    stages = make_plan(A, B).stages
    assert data_holders(A, stages, (A, B), keep_data_here=True) == (A,)
    assert data_holders(A, stages[:1], (A,), keep_data_here=False) == (A,)
