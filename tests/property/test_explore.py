"""The what-if planner on random groups: near the best of all plans, never worse than a pure one."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

from hypothesis import given, settings
from hypothesis import strategies as st

from p2ptrain.planner.arrangement import Groups
from p2ptrain.planner.explore import Explorer
from p2ptrain.planner.input import LinkEstimate
from p2ptrain.planner.kinds import KINDS
from p2ptrain.planner.links import LOOPBACK_BYTES_PER_S_MIN
from p2ptrain.planner.objective import GOALS, Objective
from p2ptrain.planner.pricing import Pricing, spans
from p2ptrain.planner.profile import PeerProfile, Power
from p2ptrain.planner.question import Question
from p2ptrain.schedule.actions import AUTO_SCHEDULES, SCHEDULES
from p2ptrain.schedule.simulator import PartsTime, simulate
from tests.planning_cases import device, profile
from tests.planning_questions import Device, question

_TIME = st.integers(1, 100_000)


def in_parts(whole: PeerProfile) -> PeerProfile:
    """Backwards whose parts take an eighth more than the whole."""
    kinds = {
        name: dataclasses.replace(
            cost,
            cotangents_ns=cost.backward_ns - cost.backward_ns // 2,
            gradients_ns=cost.backward_ns // 2 + cost.backward_ns // 8,
        )
        for name, cost in whole.kinds.items()
    }
    return dataclasses.replace(whole, kinds=kinds)


def with_ends(whole: PeerProfile, draw: st.DrawFn, longest_ns: int) -> PeerProfile:
    """Norms and updates of any length, from segment to segment, and a disk to wait for."""
    times = st.integers(0, longest_ns)
    kinds = {
        name: dataclasses.replace(cost, norm_ns=draw(times), update_ns=draw(times))
        for name, cost in whole.kinds.items()
    }
    return dataclasses.replace(whole, kinds=kinds, record_ns=draw(times))


@st.composite
def _questions(draw: st.DrawFn, *, devices_max: int = 4, segments_max: int = 10) -> Question:
    segment_count = draw(st.integers(1, segments_max))
    times = draw(st.lists(st.tuples(_TIME, _TIME), min_size=segment_count, max_size=segment_count))
    longest_end_ns = draw(st.sampled_from([0, 100, 300_000]))
    taking_part = []
    for letter in "abcd"[: draw(st.integers(1, devices_max))]:
        slowness = draw(st.integers(1, 10))
        own = profile(
            letter,
            [(slowness * f, slowness * b) for f, b in times],
            memory_bytes=draw(st.sampled_from([500, 1500, 4000, 1 << 30])),
        )
        own = with_ends(in_parts(own), draw, longest_end_ns)
        idle_uw = draw(st.integers(0, 5_000_000))
        power = Power(
            idle_uw=idle_uw,
            busy_uw=idle_uw + draw(st.integers(0, 9_000_000)),
            pj_per_byte=draw(st.integers(0, 10**6)),
        )
        taking_part.append(Device(profile=own, power=power))
    weights = draw(st.lists(st.integers(1, 400), min_size=segment_count, max_size=segment_count))
    medium = draw(st.sampled_from(["", "air"]))
    links = tuple(
        LinkEstimate(
            first=a.id,
            second=b.id,
            latency_ns=draw(st.integers(0, 20_000)),
            bytes_per_s=draw(st.integers(10**7, 10**10)),
            medium=medium,
        )
        for a, b in itertools.combinations(taking_part, 2)
    )
    return question(
        tuple(taking_part),
        segment_count=segment_count,
        links=links,
        microbatches=draw(st.integers(1, 8)),
        schedule=draw(st.sampled_from(SCHEDULES)),
        objective=Objective(goal=draw(st.sampled_from(GOALS))),
        memory=lambda segments, holds: sum(weights[i] for i in segments) * holds.at_edges,
    )


def _every_grouping(count: int) -> Iterator[Groups]:
    """Subset x order x replicas, written down independently of the planner."""
    for places in itertools.product(range(-1, count), repeat=count):
        stages = max(places) + 1
        groups = tuple(
            tuple(i for i, place in enumerate(places) if place == stage) for stage in range(stages)
        )
        if stages and all(groups):
            yield groups


def _best_by_exhaustion(asked: Question) -> int | None:
    pricing, best = Pricing(asked), None
    explorer = Explorer(pricing)
    count = pricing.segment_count
    for groups in _every_grouping(len(pricing.devices)):
        arrangement = pricing.arrange(groups, asked.schedules[0])
        if arrangement is None or len(groups) > count:
            continue
        for inner in itertools.combinations(range(1, count), len(groups) - 1):
            candidate = explorer.candidate(arrangement, (*inner, count))
            rooms = [pricing.devices[i].profile.memory_bytes for i in candidate.devices]
            if all(m <= room for m, room in zip(candidate.memory_bytes, rooms, strict=True)):
                value = explorer.value(candidate.price)
                best = value if best is None else min(best, value)
    return best


@given(asked=_questions())
@settings(max_examples=25, deadline=None)
def test_found_plan_is_within_one_percent_of_the_best(asked: Question) -> None:
    best = _best_by_exhaustion(asked)
    explorer = Explorer(Pricing(asked))
    found = explorer.run().best
    if best is None:
        assert found is None
    else:
        assert found is not None
        assert best <= explorer.value(found.price) <= best * 1.01


@given(asked=_questions())
@settings(max_examples=25, deadline=None)
def test_found_plan_is_never_worse_than_a_pure_one(asked: Question) -> None:
    explorer = Explorer(Pricing(asked))
    whole = explorer.run().best
    for kind in KINDS:
        if kind != "hybrid":
            pure = Explorer(Pricing(dataclasses.replace(asked, kinds=(kind,)))).run().best
            if pure is not None:
                assert whole is not None
                assert explorer.value(whole.price) <= explorer.value(pure.price)


@given(asked=_questions())
@settings(max_examples=15, deadline=None)
def test_a_choice_of_schedules_is_as_good_as_the_best_of_them(asked: Question) -> None:
    explorer = Explorer(Pricing(dataclasses.replace(asked, schedules=AUTO_SCHEDULES)))
    chosen = explorer.run().best
    for schedule in AUTO_SCHEDULES:
        only = Explorer(Pricing(dataclasses.replace(asked, schedules=(schedule,)))).run().best
        if only is not None:
            assert chosen is not None
            assert explorer.value(chosen.price) <= explorer.value(only.price) * 1.01


@given(asked=_questions(), data=st.data())
@settings(max_examples=20, deadline=None)
def test_order_of_devices_does_not_matter(asked: Question, data: st.DataObject) -> None:
    shuffled = dataclasses.replace(
        asked,
        devices=tuple(data.draw(st.permutations(asked.devices))),
        links=tuple(reversed(asked.links)),
    )
    assert Explorer(Pricing(asked)).run().best == Explorer(Pricing(shuffled)).run().best


@given(asked=_questions())
@settings(max_examples=30, deadline=None)
def test_lower_bounds_are_below_the_price(asked: Question) -> None:
    pricing = Pricing(asked)
    count = pricing.segment_count
    for groups in _every_grouping(len(pricing.devices)):
        arrangement = pricing.arrange(groups, asked.schedules[0])
        if arrangement is not None and len(groups) <= count:
            cuts = (*range(1, len(groups)), count)
            assert pricing.bound_ns(arrangement, cuts) <= pricing.price(arrangement, cuts).step_ns


@given(
    stages=st.integers(1, 4),
    microbatches=st.integers(1, 8),
    schedule=st.sampled_from(SCHEDULES),
    data=st.data(),
)
@settings(max_examples=40, deadline=None)
def test_without_replicas_it_is_the_simulator_of_runs(
    stages: int, microbatches: int, schedule: str, data: st.DataObject
) -> None:
    """On one machine no interface is shared by the links of a stage, as there."""
    times = data.draw(st.lists(st.tuples(_TIME, _TIME), min_size=stages, max_size=stages))
    rate = data.draw(st.integers(LOOPBACK_BYTES_PER_S_MIN, 10**9))
    taking_part = tuple(
        Device(
            profile=dataclasses.replace(
                in_parts(profile(letter, [own] * stages)), host="one", own_cores=letter
            ),
            power=Power(idle_uw=0, busy_uw=0, pj_per_byte=0),
        )
        for letter, own in zip("abcd", times, strict=False)
    )
    links = tuple(
        LinkEstimate(first=a.id, second=b.id, latency_ns=0, bytes_per_s=rate)
        for a, b in itertools.combinations(taking_part, 2)
    )
    pricing = Pricing(
        question(
            taking_part, segment_count=stages, links=links, microbatches=microbatches,
            schedule=schedule,
        )
    )  # fmt: skip
    arrangement = pricing.arrange(tuple((i,) for i in range(stages)), schedule)
    assert arrangement is not None
    cuts = tuple(range(1, stages + 1))
    sent = pricing.costs.segments[0].sent_bytes
    expected = simulate(
        [own[0] for own in arrangement.actions],
        forward_ns=[forward for forward, _ in times],
        backward_ns=[backward for _, backward in times],
        transfer_ns=[-(-sent * 10**9 // rate)] * (stages - 1),
        parts=[PartsTime(cotangents_ns=b - b // 2, gradients_ns=b // 2 + b // 8) for _, b in times],
    )
    found = pricing.timeline(arrangement, cuts)
    assert [own[0] for own in found.spans] == list(expected.stages)
    assert len(spans(cuts)) == stages
    assert device("a") == pricing.devices[0].id
