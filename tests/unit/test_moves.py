"""What moving segments costs, and when it pays."""

from __future__ import annotations

import dataclasses

from p2ptrain.bundle.manifest import Manifest, UpdateRule
from p2ptrain.ids import DeviceId, Digest
from p2ptrain.planner.choose import choose_plan
from p2ptrain.planner.input import LinkEstimate
from p2ptrain.planner.moves import is_worth_moving, moving_ns
from p2ptrain.planner.objective import Goal
from p2ptrain.planner.plan import Plan, StagePlan
from tests.planning_cases import device, manifest, planning_input, profile

A, B, C = device("a"), device("b"), device("c")


def stages(*spans: tuple[DeviceId, int]) -> list[StagePlan]:
    found, first = [], 0
    for owner, count in spans:
        found.append(
            StagePlan(
                device=owner, first_segment=first, segment_count=count, in_flight_max=1,
                step_compute_ns=1, memory_bytes=1, parameter_count=1,
            )
        )  # fmt: skip
        first += count
    return found


def link(first: DeviceId, second: DeviceId) -> LinkEstimate:
    rate = 1_000 if C in (first, second) else 1_000_000
    return LinkEstimate(first=first, second=second, latency_ns=7, bytes_per_s=rate)


def cost(model: Manifest, after: list[StagePlan]) -> int:
    before = stages((A, 4), (B, 4))
    return moving_ns(before, after, manifest=model, optimizer="adamw", link=link)


def test_only_segments_that_change_their_device_travel() -> None:
    model = manifest(8)
    assert cost(model, stages((A, 4), (B, 4))) == 0
    one_ns = 7 + 16 * 4 * 1_000  # 16 parameters of 4 bytes at 1 byte per microsecond
    assert cost(model, stages((A, 5), (B, 3))) == one_ns
    assert cost(model, stages((B, 8))) == 4 * one_ns
    assert cost(model, stages((A, 7), (C, 1))) == 3 * one_ns + 7 + 16 * 4 * 1_000_000


def test_optimizer_state_travels_with_its_parameters() -> None:
    rule = UpdateRule(graph=Digest("0" * 64), state=("m", "v"), scalars=(), in_place=True)
    model = dataclasses.replace(manifest(8), updates={"adamw": rule})
    assert cost(model, stages((A, 5), (B, 3))) == 7 + 3 * 16 * 4 * 1_000


PLAN = choose_plan(planning_input([profile("a", [(1, 2)])], segment_count=1)).plan


def plan(step_ns: int, step_uj: int | None = None, goal: Goal = "time") -> Plan:
    return dataclasses.replace(PLAN, step_ns=step_ns, step_uj=step_uj, goal=goal)


def test_steps_that_are_left_decide() -> None:
    gains = [
        is_worth_moving(plan(120), plan(100), steps_left=left, moves_ns=2000) for left in (100, 101)
    ]
    assert gains == [False, True]
    assert not is_worth_moving(plan(100), plan(120), steps_left=10**6, moves_ns=0)


def test_a_step_has_to_get_better_by_a_tenth() -> None:
    better = [
        is_worth_moving(plan(100), plan(after), steps_left=10**6, moves_ns=0) for after in (91, 90)
    ]
    assert better == [False, True]


def test_least_energy_counts_joules_also_of_the_move() -> None:
    like, frugal = plan(100, 50, "energy"), plan(300, 20, "energy")
    assert is_worth_moving(like, frugal, steps_left=11, moves_ns=600)  # 300 uJ of 330
    assert not is_worth_moving(like, frugal, steps_left=10, moves_ns=600)
    assert not is_worth_moving(plan(100), plan(300, goal="energy"), steps_left=10**6, moves_ns=0)
