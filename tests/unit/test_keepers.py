"""Who keeps replicas and the second copy of the data."""

from __future__ import annotations

from dataclasses import replace

from p2ptrain.planner.keepers import data_holders, keepers_of, replica_keepers
from p2ptrain.planner.plan import Plan, Split, StageShare
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


def test_of_tensor_shards_the_first_and_another_keep_the_whole() -> None:
    plan = make_plan(A)
    shares = tuple(
        StageShare(device=each, weight=1, step_compute_ns=1, memory_bytes=1) for each in (A, B)
    )

    def shared(split: Split) -> Plan:
        stages = (replace(plan.stages[0], split=split, shares=shares),)
        kept = replica_keepers(stages, (A, B))
        return replace(
            plan,
            stages=stages,
            members=(A, B),
            schedule="1f1b",
            replicas=kept,
            home=A,
            holders=(A,),
        )

    assert keepers_of(shared("tensor"), 0) == (A, B)
    assert replica_keepers(shared("tensor").stages, (A, B, C)) == (C,), "who has no slice"
    assert keepers_of(shared("sequence"), 0) == ()
    assert keepers_of(replace(shared("tensor"), replicas=()), 0) == ()


def test_second_data_holder_is_in_reserve_if_anybody_is() -> None:
    stages = make_plan(A, B).stages
    assert data_holders(A, stages, (A, B, C), keep_data_here=False) == (A, C)
    assert data_holders(A, stages, (A, B), keep_data_here=False) == (A, B)
    assert data_holders(A, stages, (A, B, C), keep_data_here=False, holding=(B,)) == (A, B)


def test_data_that_stays_or_has_nowhere_to_go_has_one_holder() -> None:
    stages = make_plan(A, B).stages
    assert data_holders(A, stages, (A, B), keep_data_here=True) == (A,)
    assert data_holders(A, stages[:1], (A,), keep_data_here=False) == (A,)
