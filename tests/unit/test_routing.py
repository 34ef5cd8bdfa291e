"""Who runs which microbatch of a plan, and in which order."""

from __future__ import annotations

import dataclasses

import pytest

from p2ptrain.errors import InvariantBroken
from p2ptrain.ids import DeviceId
from p2ptrain.planner.plan import Plan, StagePlan, StageShare
from p2ptrain.schedule.actions import Held, evaluation, held, stage_actions
from p2ptrain.training.routing import Route, has_replicas, runners
from tests.sim.plans import device, make_contract, make_plan


def stage(index: int, devices: tuple[DeviceId, ...], weights: tuple[int, ...]) -> StagePlan:
    shares = tuple(
        StageShare(device=each, weight=weight, step_compute_ns=1, memory_bytes=1)
        for each, weight in zip(devices, weights, strict=True)
    )
    return StagePlan(
        device=devices[0], first_segment=index, segment_count=1, in_flight_max=2,
        step_compute_ns=1, memory_bytes=1, parameter_count=1,
        split="replicas" if len(devices) > 1 else "none", shares=shares if len(devices) > 1 else (),
    )  # fmt: skip


A, B, C, D = (device(index) for index in range(4))


def plan(*stages: tuple[tuple[DeviceId, ...], tuple[int, ...]]) -> Plan:
    members = [each for devices, _ in stages for each in devices]
    made = tuple(stage(index, *own) for index, own in enumerate(stages))
    return dataclasses.replace(make_plan(*members), stages=made)


SHARED = plan(((A, B), (2, 1)), ((C,), (1,)))


def test_microbatches_are_shared_out_by_weight() -> None:
    assert runners(SHARED.stages[0], 6) == ((A,), (A,), (B,), (A,), (A,), (B,))
    assert Route(SHARED, B).own(6) == (2, 5)
    assert Route(SHARED, B).own(2) == ()
    assert Route(SHARED, C).own(3) == (0, 1, 2)
    assert Route(SHARED, C).beside(-1, 3) == ((A,), (A,), (B,))
    assert Route(SHARED, A).beside(-1, 3) == ()
    assert Route(SHARED, A).beside(1, 2) == ((C,), (C,))
    assert Route(SHARED, C).neighbours == (A, B)
    assert (Route(SHARED, B).stage_index, Route(SHARED, B).rank) == (0, 1)


def test_every_shard_runs_every_microbatch() -> None:
    whole = plan(((A, B), (1, 1)))
    sharded = dataclasses.replace(whole.stages[0], split="tensor")
    assert runners(sharded, 2) == ((A, B), (A, B))


def test_plans_without_replicas_keep_their_order() -> None:
    alone = plan(((A,), (1,)), ((B,), (1,)))
    assert has_replicas(SHARED)
    assert not has_replicas(alone)
    contract = make_contract()
    for index, each in enumerate((A, B)):
        route = Route(alone, each)
        assert route.training(8) == stage_actions("1f1b", index, 2, 8)
        assert route.evaluation(5, trained=8) == evaluation(index, 2, 5, in_flight=2)
        assert route.held(contract) == held("1f1b", stage_actions("1f1b", index, 2, 8))


def test_replicas_run_their_own_in_order_and_hold_what_that_takes() -> None:
    contract = make_contract()
    for each in (A, B, C):
        route = Route(SHARED, each)
        for actions, count in ((route.training(8), 8), (route.evaluation(11, trained=8), 11)):
            for kind in "FB":
                ran = tuple(action.microbatch for action in actions if action.kind == kind)
                assert ran == route.own(count)
        assert route.held(contract).covers(held("1f1b", route.training(8)))
        assert route.held(contract).covers(held("1f1b", route.evaluation(1, trained=8)))
    assert Route(plan(((A, B), (9, 1))), B).held(dataclasses.replace(
        contract, microbatches=2, heldout_microbatches=1
    )) == Held(in_flight=1, delayed=0)  # fmt: skip


@pytest.mark.parametrize("weights", [(1, 1), (5, 3), (3, 1)])
def test_a_replica_of_the_last_stage_holds_one_microbatch(weights: tuple[int, int]) -> None:
    """Nobody after it waits for what it could begin with."""
    shared = ((A, B), weights)
    for each in (A, B):
        for made in (plan(shared), plan(((C,), (1,)), shared)):
            assert Route(made, each).held(make_contract()) == Held(in_flight=1, delayed=0)


def test_who_has_no_stage_has_no_route() -> None:
    with pytest.raises(InvariantBroken):
        Route(SHARED, D)
