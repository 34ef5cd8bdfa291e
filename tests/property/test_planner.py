"""The planner on random groups: valid, within memory, near the best, the same every time."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from p2ptrain.errors import PlanInfeasible
from p2ptrain.planner.choose import choose_plan, run_question
from p2ptrain.planner.input import LinkEstimate, PlanningInput
from p2ptrain.planner.pricing import Pricing, spans
from p2ptrain.schedule.actions import SCHEDULES, all_actions, held
from tests.planning_cases import device, planning_input, profile

_TIME = st.integers(1, 100_000)


@st.composite
def _inputs(draw: st.DrawFn, *, segments_max: int = 10, peers_max: int = 4) -> PlanningInput:
    segment_count = draw(st.integers(1, segments_max))
    times = draw(st.lists(st.tuples(_TIME, _TIME), min_size=segment_count, max_size=segment_count))
    peers = []
    for letter in "abcd"[: draw(st.integers(1, peers_max))]:
        slowness = draw(st.integers(1, 10))
        peers.append(
            profile(
                letter,
                [(slowness * f, slowness * b) for f, b in times],
                memory_bytes=draw(st.sampled_from([500, 1500, 4000, 1 << 30])),
                host=draw(st.sampled_from(["one", "two"])),
                cores=draw(st.integers(1, 4)),
                delayed_percent=draw(st.none() | st.integers(0, 100)),
            )
        )
    links = tuple(
        LinkEstimate(
            first=device(a),
            second=device(b),
            latency_ns=draw(st.integers(0, 200_000)),
            bytes_per_s=draw(st.integers(10**6, 10**10)),
        )
        for a, b in itertools.combinations("abcd"[: len(peers)], 2)
    )
    return planning_input(
        peers,
        segment_count=segment_count,
        links=links,
        microbatches=draw(st.integers(1, 8)),
        threads=draw(st.integers(1, 2)),
        schedule=draw(st.sampled_from(SCHEDULES)),
    )


def _best_by_exhaustion(planning: PlanningInput) -> int | None:
    """Simulate every subset, order and cut that fits."""
    pricing, best = Pricing(run_question(planning)), None
    count = pricing.segment_count
    for stages in range(1, min(count, len(pricing.devices)) + 1):
        for order in itertools.permutations(range(len(pricing.devices)), stages):
            arrangement = pricing.arrange(tuple((i,) for i in order), planning.schedule)
            assert arrangement is not None
            for inner in itertools.combinations(range(1, count), stages - 1):
                cuts = (*inner, count)
                own = zip(arrangement.stages, spans(cuts), strict=True)
                if all(end <= pricing.longest_fit(r, first) for (r,), (first, end) in own):
                    step_ns = pricing.price(arrangement, cuts).step_ns
                    best = step_ns if best is None else min(best, step_ns)
    return best


@given(planning=_inputs())
@settings(max_examples=20, deadline=None)
def test_plan_is_within_one_percent_of_the_best(planning: PlanningInput) -> None:
    best_ns = _best_by_exhaustion(planning)
    try:
        found_ns = choose_plan(planning).plan.step_ns
    except PlanInfeasible:
        assert best_ns is None
    else:
        assert best_ns is not None
        assert best_ns <= found_ns <= best_ns * 1.01


@given(planning=_inputs(segments_max=15))
@settings(max_examples=40, deadline=None)
def test_plan_covers_the_model_and_respects_memory(planning: PlanningInput) -> None:
    try:
        plan = choose_plan(planning).plan
    except PlanInfeasible:
        assert _best_by_exhaustion(planning) is None
        return
    covered = [index for stage in plan.stages for index in stage.segments]
    assert covered == list(range(len(planning.manifest.segments)))
    rooms = {peer.device: peer.memory_bytes for peer in planning.profiles}
    actions = all_actions(plan.schedule, len(plan.stages), planning.contract.microbatches)
    for stage, own in zip(plan.stages, actions, strict=True):
        holds = held(plan.schedule, own)
        assert stage.in_flight_max == holds.in_flight
        needed = planning.stage_memory(stage.segments, holds)
        assert stage.memory_bytes == needed <= rooms[stage.device]
    parameters = sum(stage.parameter_count for stage in plan.stages)
    assert parameters == planning.manifest.parameter_count


@given(planning=_inputs(), data=st.data())
@settings(max_examples=25, deadline=None)
def test_order_of_profiles_does_not_matter(planning: PlanningInput, data: st.DataObject) -> None:
    shuffled = planning_input(
        data.draw(st.permutations(planning.profiles)),
        segment_count=len(planning.manifest.segments),
        links=tuple(reversed(planning.links)),
        microbatches=planning.contract.microbatches,
        threads=planning.contract.threads,
        schedule=planning.schedule,
    )
    outcomes: list[str] = []
    for one in (planning, planning, shuffled):
        try:
            outcomes.append(choose_plan(one).plan.digest)
        except PlanInfeasible as refused:
            outcomes.append(refused.message)
    assert outcomes[0] == outcomes[1] == outcomes[2]
