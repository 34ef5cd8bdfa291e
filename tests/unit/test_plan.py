"""Plans: who is in which stage, and what is not a plan."""

from __future__ import annotations

import dataclasses

import pytest

from p2ptrain.ids import Digest, Lineage, RunId, ViewNumber
from p2ptrain.planner.plan import Plan, Split, StagePlan, StageShare
from p2ptrain.schedule.replicated import owners_by_weight
from tests.planning_cases import device

A, B, C, D = (device(letter) for letter in "abcd")


def _stage(
    letters: str, first: int, split: Split = "none", weights: tuple[int, ...] = ()
) -> StagePlan:
    devices = [device(letter) for letter in letters]
    shares = tuple(
        StageShare(device=d, weight=w, step_compute_ns=1, memory_bytes=1)
        for d, w in zip(devices, weights, strict=False)
    )
    return StagePlan(
        device=devices[0], first_segment=first, segment_count=2, in_flight_max=1,
        step_compute_ns=1, memory_bytes=1, parameter_count=1, split=split, shares=shares,
    )  # fmt: skip


def _plan(*stages: StagePlan, schedule: str = "1f1b") -> Plan:
    return Plan(
        run=RunId("1" * 32), lineage=Lineage(0), view=ViewNumber(1), members=(A, B, C, D), home=A,
        holders=(A,), contract=Digest("0" * 64), schedule=schedule, stages=stages, step_ns=1,
        reasons=(),
    )  # fmt: skip


def test_every_peer_of_a_stage_is_found() -> None:
    plan = _plan(_stage("ab", 0, "replicas", (3, 1)), _stage("dc", 2, "replicas", (1, 1)))
    assert [plan.stage_of(one) for one in (A, B, C, D)] == [0, 0, 1, 1]
    assert plan.stages[1].devices == (D, C)
    assert plan.stages[0].weights == (3, 1)
    alone = _stage("a", 0)
    assert (alone.devices, alone.weights, alone.is_sharded) == ((A,), (1,), False)


@pytest.mark.parametrize(
    ("stages", "schedule", "problem"),
    [
        ((_stage("ab", 0, "none", (1, 1)),), "1f1b", "shares where it is split"),
        ((_stage("ab", 0, "replicas"),), "1f1b", "shares where it is split"),
        ((_stage("a", 0, "replicas", (1,)),), "1f1b", "two peers or more"),
        ((_stage("ab", 0, "tensor", (4, 0)),), "1f1b", "a part of its work"),
        ((_stage("ab", 0, "tensor", (4, 3)), _stage("c", 2)), "1f1b", "whole model"),
        ((_stage("ab", 0, "replicas", (1, 1)),), "zb-h1", "no schedule of stages"),
        ((_stage("ab", 0, "replicas", (1, 1)), _stage("b", 2)), "1f1b", "two stages"),
    ],
)
def test_what_is_no_plan(stages: tuple[StagePlan, ...], schedule: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        _plan(*stages, schedule=schedule)


def test_the_first_peer_gives_the_stage_its_device() -> None:
    stage = dataclasses.replace(_stage("ab", 0, "tensor", (1, 1)), device=B)
    with pytest.raises(ValueError, match="its device first"):
        _plan(stage)


def test_microbatches_follow_weights() -> None:
    assert owners_by_weight((1, 1), 4) == (0, 1, 0, 1)
    owners = owners_by_weight((5, 2, 1), 8)
    assert [owners.count(rank) for rank in range(3)] == [5, 2, 1]
    assert owners_by_weight((1,), 3) == (0, 0, 0)
