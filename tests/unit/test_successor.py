"""Candidate plans after losses, leaves and joins: little moves, the fastest first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from p2ptrain.ids import DeviceId
from p2ptrain.planner.plan import Plan, StagePlan, StageShare
from p2ptrain.recovery.placing import placing
from p2ptrain.recovery.successor import Placement, Succession, Wish, successor_plans
from tests.planning_cases import device as planning_device
from tests.planning_cases import planning_input, profile
from tests.sim.plans import device
from tests.sim.run_views import staged_plan, staged_view

A, B, C, D, E = (device(index) for index in range(5))
BASE = staged_view((A, 2), (B, 2), (C, 2), (D, 2), reserves=(E,)).plan
BASE = replace(BASE, replicas=(C, D, A, B), holders=(A, D))


def place(wishes: Sequence[Wish]) -> Placement:
    """A step takes as long as its largest stage, and every device holds at most 4 segments."""
    shape = tuple((wish.devices[0], len(wish.segments)) for wish in wishes)
    stages = staged_plan(BASE, *shape, members=tuple(sorted({A, *dict(shape)})), replicas=(),
                         holders=(A,)).stages  # fmt: skip
    return Placement(stages=stages, step_ns=max(stage.segment_count for stage in stages))


def small(wishes: Sequence[Wish]) -> Placement | None:
    return place(wishes) if all(len(wish.segments) <= 2 for wish in wishes) else None


def wish(segments: range, *devices: DeviceId, weights: tuple[int, ...] = (1,)) -> Wish:
    return Wish(devices=devices, weights=weights, segments=segments)


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
    found = price([wish(range(4), a), wish(range(4, 8), b)])
    assert found is not None
    assert [stage.in_flight_max for stage in found.stages] == [2, 1]
    assert 0 <= found.step_ns - 9 * 12_000_000 <= 500
    assert price([wish(range(3), a), wish(range(3, 8), c)]) is None
    assert price([wish(range(4), a), wish(range(4, 8), planning_device("d"))]) is None


def shared_base(*stages: tuple[int, str, tuple[int, ...]]) -> Plan:
    """Stages of so many segments on devices named by letters, with weights."""
    made, first = [], 0
    for count, letters, weights in stages:
        devices = [DeviceId(letter * 26) for letter in letters]
        shares = tuple(
            StageShare(device=device, weight=weight, step_compute_ns=1, memory_bytes=1)
            for device, weight in zip(devices, weights, strict=True)
        )
        made.append(
            StagePlan(
                device=devices[0], first_segment=first, segment_count=count, in_flight_max=1,
                step_compute_ns=1, memory_bytes=1, parameter_count=1,
                split="replicas" if len(devices) > 1 else "none",
                shares=shares if len(devices) > 1 else (),
            )
        )  # fmt: skip
        first += count
    members = tuple(sorted({each for stage in made for each in stage.devices}))
    return replace(BASE, stages=tuple(made), members=members, replicas=(), holders=(A, D))


def wishes(base: Plan, *usable: DeviceId) -> list[list[tuple[str, tuple[int, ...], int]]]:
    """What is asked to be priced: letters, weights and segments of each stage."""
    asked: list[list[tuple[str, tuple[int, ...], int]]] = []

    def note(found: Sequence[Wish]) -> None:
        asked.append(
            [("".join(d[0] for d in w.devices), w.weights, len(w.segments)) for w in found]
        )

    assert successor_plans(succession(*usable, base=base), note) == ()
    return asked


def test_replicas_that_are_left_go_on_with_their_stage() -> None:
    data = shared_base((8, "acd", (4, 1, 3)))
    assert wishes(data, A, D) == [[("ad", (4, 3), 8)]]
    assert wishes(data, D) == [[("d", (3,), 8)]]
    hybrid = shared_base((2, "ab", (1, 1)), (6, "cd", (2, 1)))
    assert wishes(hybrid, A, B, D) == [[("ab", (1, 1), 2), ("d", (1,), 6)]]
    assert wishes(hybrid, A, D, E) == [[("a", (1,), 2), ("d", (1,), 6)]]


def test_lost_single_stage_goes_to_a_reserve_or_to_replicas_beside_it() -> None:
    mixed = shared_base((5, "ad", (2, 1)), (3, "c", (1,)))
    assert wishes(mixed, A, D, E) == [
        [("ad", (2, 1), 8)],
        [("ad", (2, 1), 5), ("e", (1,), 3)],
    ]
    assert wishes(shared_base((4, "ad", (1, 1)), (4, "bc", (1, 1))), A, D) == [[("ad", (1, 1), 8)]]


def test_shards_that_lost_one_of_them_are_taken_over_by_one_peer() -> None:
    whole = shared_base((8, "ad", (1, 1)))
    sharded = replace(whole, stages=(replace(whole.stages[0], split="tensor"),))
    assert wishes(sharded, A, E) == [[("a", (1,), 8)], [("e", (1,), 8)]]


def test_weights_of_those_left_come_to_as_many_as_there_are_microbatches() -> None:
    equal = [(1_000_000, 2_000_000)] * 8
    peers = [profile(letter, equal) for letter in "abc"]
    price = placing(planning_input(peers, segment_count=8))
    a, b, c = map(planning_device, "abc")
    found = price([wish(range(4), a, b, weights=(30, 10)), wish(range(4, 8), c)])
    assert found is not None
    assert [stage.split for stage in found.stages] == ["replicas", "none"]
    assert found.stages[0].weights[0] == 3 * found.stages[0].weights[1]
    assert price([wish(range(8), a, b, weights=(1000, 1))]) is not None


def test_shards_stay_as_they_are_while_all_of_them_do() -> None:
    shares = tuple(
        StageShare(device=each, weight=1, step_compute_ns=1, memory_bytes=1) for each in (A, B)
    )
    whole = replace(BASE.stages[0], segment_count=8, split="tensor", shares=shares, in_flight_max=1)
    base = replace(BASE, stages=(whole,), replicas=(), holders=(A,))
    (kept,) = successor_plans(succession(A, B, C, base=base), place)
    assert kept.stages == base.stages
    assert kept.replicas == (C,)
    assert {len(plan.stages) for plan in successor_plans(succession(A, C, base=base), place)} == {1}
