"""Stages whose speed changes for hours: when a re-plan is asked for, and how seldom at worst."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable

import pytest

from p2ptrain import limits
from p2ptrain.ids import DeviceId, Digest, Lineage, RunId, ViewNumber
from p2ptrain.planner.pace import AS_PLANNED, STEPS_MIN, PaceWatch, at_pace
from p2ptrain.planner.plan import Plan, StagePlan, StageShare
from tests.planning_cases import device as make_device
from tests.planning_cases import profile

OWN, OTHER = make_device("a"), make_device("b")
STEP_NS = 2_000_000_000
HOURS = 3600.0

Speed = Callable[[float], float]
"""Time -> how many times as long as measured at first a step takes."""


def plan(own_ns: int = STEP_NS, other_ns: int = STEP_NS) -> Plan:
    stages = tuple(
        StagePlan(
            device=owner, first_segment=index, segment_count=1, in_flight_max=1,
            step_compute_ns=planned_ns, memory_bytes=1, parameter_count=1,
        )
        for index, (owner, planned_ns) in enumerate([(OWN, own_ns), (OTHER, other_ns)])
    )  # fmt: skip
    return Plan(
        run=RunId("r" * 26), lineage=Lineage(0), view=ViewNumber(1), members=(OWN, OTHER),
        home=OWN, holders=(OWN,), contract=Digest("1" * 64), schedule="1f1b", stages=stages,
        step_ns=1, reasons=(),
    )  # fmt: skip


def asks(speed: Speed, *, seed: int, hours: float = 4.0, noise: float = 0.08) -> list[float]:
    """When a stage asks; each time a view follows that was planned with its pace."""
    rng = random.Random(seed)
    watch = PaceWatch(OWN)
    planned_ns, now = STEP_NS, 0.0
    watch.begin(plan(planned_ns))
    found = []
    while now < hours * HOURS:
        stalled = 5.0 if rng.random() < 0.03 else 1.0  # somebody opens a browser
        took_ns = int(STEP_NS * speed(now) * math.exp(rng.gauss(0.0, noise)) * stalled)
        now += took_ns / 1e9
        if watch.note(OWN, took_ns, now):
            found.append(now)
            planned_ns = planned_ns * watch.paces()[OWN] // AS_PLANNED
            watch.begin(plan(planned_ns))
    return found


@pytest.mark.parametrize("seed", range(8))
def test_noise_alone_asks_for_nothing(seed: int) -> None:
    assert asks(lambda now: 1.0, seed=seed) == []


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("times", [1.5, 3.0])
def test_throttling_asks_once_when_it_begins_and_once_when_it_ends(seed: int, times: float) -> None:
    found = asks(lambda now: times if HOURS < now < 3 * HOURS else 1.0, seed=seed)
    assert len(found) == 2
    within_s = 4 * limits.DRIFT_FOR_S  # a majority of the window, with stalled steps among them
    assert limits.DRIFT_FOR_S / 2 <= found[0] - HOURS < within_s
    assert limits.DRIFT_FOR_S / 2 <= found[1] - 3 * HOURS < within_s


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("period_s", [5, 40, 90, 200, 600, 1500])
def test_oscillation_costs_a_bounded_number_of_views(seed: int, period_s: float) -> None:
    found = asks(lambda now: 2.0 if now % period_s < period_s / 2 else 1.0, seed=seed, hours=8.0)
    assert len(found) <= 6 + 8 * HOURS / limits.DRIFT_PAUSE_S_MAX
    assert len([at for at in found if at > HOURS]) <= 1 + 7 * HOURS / limits.DRIFT_PAUSE_S_MAX


def test_short_disturbance_asks_for_nothing() -> None:
    assert asks(lambda now: 4.0 if 600 < now < 615 else 1.0, seed=0, noise=0.0) == []


@pytest.mark.parametrize("seed", range(4))
def test_pace_on_the_very_line_asks_at_most_once(seed: int) -> None:
    """Once planned with it, it is no drift any more."""
    assert len(asks(lambda now: 1.2, seed=seed)) <= 1


def test_rough_steps_ask_seldom() -> None:
    """With 25 % of noise in each step a drift is guessed sometimes, but within the bound."""
    found = asks(lambda now: 1.0, seed=1, hours=8.0, noise=0.25)
    assert len(found) <= 6 + 8 * HOURS / limits.DRIFT_PAUSE_S_MAX


def test_paces_of_all_stages_are_known_after_a_few_steps() -> None:
    watch = PaceWatch(OWN)
    watch.begin(plan(other_ns=STEP_NS // 2))
    for step in range(STEPS_MIN):
        assert OTHER not in watch.paces()
        assert not watch.note(OTHER, STEP_NS, float(1000 * step))
        assert not watch.note(make_device("c"), STEP_NS, float(1000 * step))
    watch.note(OWN, 0, 5000.0)
    assert watch.paces() == {OTHER: 2 * AS_PLANNED}
    watch.note(OTHER, 10**18, 6000.0)
    assert max(watch.paces().values()) <= limits.PACE_PERMILLE_MAX


@pytest.mark.parametrize("device", [OWN, OTHER])
def test_uneven_replicas_that_run_to_plan_ask_for_nothing(device: DeviceId) -> None:
    """Seven microbatches as four and three."""
    part_ns = {OWN: 4 * STEP_NS, OTHER: 3 * STEP_NS}
    shares = tuple(
        StageShare(device=d, weight=own // STEP_NS, step_compute_ns=own, memory_bytes=1)
        for d, own in part_ns.items()
    )
    stage = dataclasses.replace(
        plan(4 * STEP_NS).stages[0], split="replicas", segment_count=2, shares=shares
    )
    watch = PaceWatch(device)
    watch.begin(dataclasses.replace(plan(), stages=(stage,)))
    for now in range(0, 1000, 8):
        assert not any(watch.note(d, own, float(now)) for d, own in part_ns.items())
    assert watch.paces() == {OWN: AS_PLANNED, OTHER: AS_PLANNED}


def test_profile_at_a_pace_scales_every_time() -> None:
    base = profile("a", [(100, 201)], delayed_percent=50)
    ends = {
        kind: dataclasses.replace(c, norm_ns=10, update_ns=21) for kind, c in base.kinds.items()
    }
    (cost,) = at_pace(dataclasses.replace(base, kinds=ends), 1500).kinds.values()
    assert (cost.norm_ns, cost.update_ns) == (15, 32)
    assert (cost.forward_ns, cost.backward_ns) == (150, 302)
    assert (cost.cotangents_ns, cost.gradients_ns) == (152, 150)
    (plain,) = at_pace(profile("a", [(100, 201)]), 500).kinds.values()
    assert (plain.forward_ns, plain.backward_ns, plain.cotangents_ns) == (50, 101, None)
