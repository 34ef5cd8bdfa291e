"""Candidate plans after losses, leaves and joins: little moves, the fastest first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from p2ptrain.ids import DeviceId
from p2ptrain.planner.plan import Plan
from p2ptrain.recovery.placing import placing
from p2ptrain.recovery.successor import Placement, Succession, successor_plans
from tests.planning_cases import device as planning_device
from tests.planning_cases import planning_input, profile
from tests.sim.plans import device
from tests.sim.run_views import staged_plan, staged_view

A, B, C, D, E = (device(index) for index in range(5))
BASE = staged_view((A, 2), (B, 2), (C, 2), (D, 2), reserves=(E,)).plan
BASE = replace(BASE, replicas=(C, D, A, B), holders=(A, D))


def place(spans: Sequence[tuple[DeviceId, range]]) -> Placement:
    """A step takes as long as its largest stage, and every device holds at most 4 segments."""
    shape = tuple((owner, len(segments)) for owner, segments in spans)
    stages = staged_plan(BASE, *shape, members=tuple(sorted({A, *dict(shape)})), replicas=(),
                         holders=(A,)).stages  # fmt: skip
    return Placement(stages=stages, step_ns=max(stage.segment_count for stage in stages))


def small(spans: Sequence[tuple[DeviceId, range]]) -> Placement | None:
    return place(spans) if all(len(segments) <= 2 for _, segments in spans) else None


def shapes(plans: tuple[Plan, ...]) -> list[str]:
    """`a2 b2` for two stages of two segments."""
    return [
        " ".join(f"{stage.device[0]}{stage.segment_count}" for stage in plan.stages)
        for plan in plans
    ]


def succession(*usable: DeviceId, base: Plan = BASE) -> Succession:
    return Succession(base=base, usable=usable, holding=(A, D), reason="b is gone")


def test_lost_stage_goes_to_a_reserve_or_a_neighbour() -> None:
    plans = successor_plans(succession(A, C, D, E), place)
    assert shapes(plans) == ["a2 e2 c2 d2", "a4 c2 d2", "a2 c4 d2"]
    best = plans[0]
    assert (best.view, best.members, best.home) == (2, (A, C, D, E), A)
    assert best.holders == (A, D)
    assert best.reasons == ("b is gone", f"stage 1 on {E[:8]} now runs segments 2 to 3")
    assert best.replicas == (C, D, A, E)


def test_memory_leaves_only_the_reserve() -> None:
    assert shapes(successor_plans(succession(A, C, D, E), small)) == ["a2 e2 c2 d2"]
    assert successor_plans(succession(A, C, D), small) == ()


def test_neighbouring_losses_go_together_or_apart() -> None:
    found = set(shapes(successor_plans(succession(A, D, E), place)))
    assert found == {"a2 e4 d2", "a6 d2", "a2 d6", "a4 d4", "a4 e2 d2", "a2 e2 d4"}


def test_losses_apart_never_give_a_device_two_ranges() -> None:
    for shape in shapes(successor_plans(succession(B, D, E), place)):
        owners = [part[0] for part in shape.split()]
        assert len(set(owners)) == len(owners)


def test_lost_home_is_succeeded_by_a_holder_unless_the_data_stays() -> None:
    plans = successor_plans(succession(B, C, D, E), place)
    assert {plan.home for plan in plans} == {D}
    assert shapes(plans)[0] == "e2 b2 c2 d2"
    assert plans[0].holders == (D, B)
    stays = replace(BASE, keep_data_here=True, holders=(A,))
    assert successor_plans(succession(B, C, D, E, base=stays), place) == ()
    nobody = Succession(base=BASE, usable=(B, C), holding=(A, D), reason="")
    assert successor_plans(nobody, place) == ()


def test_joiner_becomes_a_member_and_nothing_moves() -> None:
    joined = replace(BASE, members=(A, B, C, D))
    plans = successor_plans(succession(A, B, C, D, E, base=joined), place)
    assert shapes(plans) == ["a2 b2 c2 d2"]
    assert plans[0].members == (A, B, C, D, E)


def test_last_one_left_takes_everything() -> None:
    (alone,) = successor_plans(succession(D), place)
    assert shapes((alone,)) == ["d8"]
    assert (alone.replicas, alone.holders) == ((None,), (D,))


def test_candidates_are_bounded_and_deterministic() -> None:
    many = tuple(device(index) for index in range(12, 30))
    first = successor_plans(succession(D, *many), place)
    assert first == successor_plans(succession(D, *reversed(many)), place)


def test_planner_prices_placements_as_it_prices_its_own() -> None:
    equal = [(1_000_000, 2_000_000)] * 8
    peers = [profile("a", equal), profile("b", equal), profile("c", equal, memory_bytes=3 * 200)]
    price = placing(planning_input(peers, segment_count=8))
    a, b, c = map(planning_device, "abc")
    found = price([(a, range(4)), (b, range(4, 8))])
    assert found is not None
    assert [stage.in_flight_max for stage in found.stages] == [2, 1]
    assert 0 <= found.step_ns - 9 * 12_000_000 <= 500
    assert price([(a, range(3)), (c, range(3, 8))]) is None
    assert price([(a, range(4)), (planning_device("d"), range(4, 8))]) is None
