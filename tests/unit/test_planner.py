"""The planner on cases small enough to know the answer."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from p2ptrain import limits
from p2ptrain.errors import ConfigError, PlanInfeasible
from p2ptrain.planner import kinds
from p2ptrain.planner.choose import choose_plan, run_question
from p2ptrain.planner.input import LinkEstimate, PlanningInput, StageMemory, stage_shares
from p2ptrain.planner.kinds import KINDS, Kind, kinds_at_start, kinds_compared
from p2ptrain.planner.objective import Objective
from p2ptrain.planner.pace import at_pace
from p2ptrain.planner.plan import Plan
from p2ptrain.planner.pricing import Pricing
from p2ptrain.planner.profile import (
    Battery,
    KindCost,
    PeerProfile,
    Power,
    SizedCosts,
    is_plausible,
)
from p2ptrain.schedule.actions import Held
from p2ptrain.store.bundles import load_bundle, shipped_bundles
from p2ptrain.training.contract import Contract
from p2ptrain.wire.codec import from_plain, to_plain
from tests.planning_cases import device, fast_links, planning_input, profile

EQUAL = [(1_000_000, 2_000_000)] * 8


def test_two_equal_peers_split_in_half_and_home_comes_first() -> None:
    choice = choose_plan(planning_input([profile("a", EQUAL), profile("b", EQUAL)],
                                        segment_count=8, home="b"))  # fmt: skip
    plan = choice.plan
    assert [stage.device for stage in plan.stages] == [device("b"), device("a")]
    assert [stage.segment_count for stage in plan.stages] == [4, 4]
    assert [stage.in_flight_max for stage in plan.stages] == [2, 1]
    assert 0 <= plan.step_ns - 9 * 12_000_000 <= 500  # tensors, and a replica set of 256 bytes
    assert stage_shares(plan) == (0.5, 0.5)
    assert "1.78 times the speed of the best single peer" in plan.reasons[0]
    assert plan.stages[0].parameter_count == 4 * 16


@pytest.mark.parametrize(("codec", "size"), [("fp32", 256), ("bf16", 128), ("int8", 68)])
def test_links_are_charged_for_encoded_bytes(codec: str, size: int) -> None:
    planning = planning_input([profile("a", EQUAL), profile("b", EQUAL)], segment_count=8)
    contract = dataclasses.replace(planning.contract, codec=codec)
    question = run_question(dataclasses.replace(planning, contract=contract))
    assert Pricing(question).costs.segments[3].sent_bytes == size  # 4 samples of 16 values


def test_reasons_name_every_peer() -> None:
    peers = [profile("a", EQUAL), profile("b", EQUAL), profile("c", [(10**9, 10**9)] * 8)]
    choice = choose_plan(planning_input(peers, segment_count=8))
    assert choice.plan.reasons[0].startswith("2 of 3 peers compute: a step is predicted to take")
    assert "1.78 times the speed of the best single peer" in choice.plan.reasons[0]
    assert [one.device for one in choice.left_out] == [device("c")]
    assert any(reason.startswith("cccccccc left out: the best step found with it takes")
               for reason in choice.plan.reasons)  # fmt: skip
    assert "owns the data" in choice.plan.reasons[1]
    assert choice.plan.members == (device("a"), device("b"), device("c"))  # c is in reserve


def test_home_that_only_holds_data_is_a_member() -> None:
    slow = profile("a", [(10**9, 10**9)] * 8)
    choice = choose_plan(planning_input([slow, profile("b", EQUAL)], segment_count=8))
    assert choice.plan.members == (device("a"), device("b"))
    assert [stage.device for stage in choice.plan.stages] == [device("b")]


def test_slow_link_makes_one_peer_enough() -> None:
    peers = [profile("a", EQUAL), profile("b", EQUAL)]
    slow = LinkEstimate(
        first=device("a"), second=device("b"), latency_ns=10**9, bytes_per_s=1_000_000
    )
    choice = choose_plan(planning_input(peers, segment_count=8, links=(slow,)))
    assert len(choice.plan.stages) == 1
    assert choice.plan.reasons[0].startswith("1 of 2 peers compute:")


def test_peers_on_one_host_share_its_cores() -> None:
    peers = [profile(letter, EQUAL, host="one", cores=2) for letter in "abcd"]
    choice = choose_plan(planning_input(peers, segment_count=8))
    assert len(choice.plan.stages) == 2
    assert any("3 threads on 2 cores" in one.reason for one in choice.left_out)


def test_peers_below_quotas_share_a_machine_but_not_its_cores() -> None:
    watts = Power(idle_uw=4_000_000, busy_uw=4_000_000, pj_per_byte=0)
    below = [profile(x, EQUAL, host="one", cores=2, own_cores=f"quota-{x}") for x in "abcd"]
    below = [dataclasses.replace(each, power=watts) for each in below]
    planning = planning_input(below, segment_count=8, stages=4, links=())
    choice = choose_plan(planning)
    assert choice.plan.stages[0].step_compute_ns == 8 * 2 * 3_000_000, "not stretched"
    assert not any("share the 2 cores" in reason for reason in choice.plan.reasons)
    assert choice.plan.step_uj is not None
    assert choice.plan.step_uj == pytest.approx(4e6 * choice.plan.step_ns / 1e9, abs=4), "idle once"
    reasons = "; ".join(choice.plan.reasons)
    assert "links on one host are assumed" in reasons
    assert "links between hosts" not in reasons


def test_a_profile_of_an_older_peer_has_the_cores_of_its_host() -> None:
    told = to_plain(profile("a", EQUAL, host="one"))
    del told["own_cores"]
    read = from_plain(PeerProfile, told)
    assert (read.own_cores, read.cores_identity) == ("", "one")


def test_a_profile_of_an_older_peer_says_nothing_of_the_end_of_a_step() -> None:
    told = to_plain(profile("a", EQUAL))
    del told["record_ns"]
    for cost in told["kinds"].values():
        del cost["norm_ns"], cost["update_ns"]
    assert from_plain(PeerProfile, told) == profile("a", EQUAL)


@pytest.mark.parametrize(
    "changes",
    [
        {"forward_ns": limits.PART_NS_MAX + 1},
        {"cotangents_ns": limits.PART_NS_MAX + 1},
        {"norm_ns": limits.PART_NS_MAX + 1},
        {"update_ns": limits.PART_NS_MAX + 1},
    ],
)
def test_no_plan_is_made_with_times_that_cannot_be(changes: dict[str, int]) -> None:
    told = profile("a", EQUAL)
    cost = dataclasses.replace(told.kinds["k3"], **changes)
    assert is_plausible(told, told.kinds)
    assert not is_plausible(dataclasses.replace(told, kinds={**told.kinds, "k3": cost}), told.kinds)


@pytest.mark.parametrize(
    "changes",
    [
        {"cores": 0},
        {"record_ns": limits.PART_NS_MAX + 1},
        {"power": Power(idle_uw=0, busy_uw=limits.POWER_UW_MAX + 1, pj_per_byte=0)},
        {"power": Power(idle_uw=0, busy_uw=0, pj_per_byte=limits.PJ_PER_BYTE_MAX + 1)},
        {"other_sizes": (SizedCosts(microbatch_size=2, kinds={}),)},
        {"kinds": {}},
    ],
)
def test_no_plan_is_made_with_a_peer_that_cannot_be(changes: dict[str, Any]) -> None:
    told = profile("a", EQUAL)  # Any: fields by name
    assert not is_plausible(dataclasses.replace(told, **changes), told.kinds)


def test_paces_of_view_after_view_leave_times_that_can_be_told() -> None:
    told = profile("a", EQUAL)
    for _ in range(20):
        told = at_pace(told, limits.PACE_PERMILLE_MAX)
    assert is_plausible(told, told.kinds)


def test_a_step_of_months_is_no_plan() -> None:
    peers = [profile("a", [(limits.PART_NS_MAX, limits.PART_NS_MAX)] * 8)]
    with pytest.raises(PlanInfeasible, match="a step would take") as refused:
        choose_plan(planning_input(peers, segment_count=8))
    assert "measures so slowly" in refused.value.hint


def test_commit_counts_members_without_a_stage_and_the_disk() -> None:
    """Three members, of which one computes: it waits for the record of the nearest other."""
    peers = [profile(letter, EQUAL) for letter in "abc"]
    peers = [dataclasses.replace(each, record_ns=5_000) for each in peers]
    near = fast_links(peers, latency_ns=100_000)
    alone = choose_plan(planning_input(peers[:1], segment_count=8, stages=1)).plan
    planning = planning_input(peers, segment_count=8, stages=1, links=near)
    one = choose_plan(dataclasses.replace(planning, replica_every=10**9)).plan
    passes_ns = alone.stages[0].step_compute_ns
    assert len(one.stages) == 1
    assert alone.step_ns == passes_ns + 5_000
    assert one.step_ns == passes_ns + 2 * 100_000 + 5_000


def test_forced_stages_on_one_host_are_stretched() -> None:
    peers = [profile(letter, EQUAL, host="one", cores=2) for letter in "abcd"]
    choice = choose_plan(planning_input(peers, segment_count=8, stages=4))
    assert [stage.segment_count for stage in choice.plan.stages] == [2, 2, 2, 2]
    assert choice.plan.stages[0].step_compute_ns == 8 * 2 * 3_000_000 * 2
    assert "4 threads share the 2 cores of one host: times there are stretched 2.0 times" in (
        choice.plan.reasons
    )


def test_memory_decides_before_speed() -> None:
    # b is ten times faster but holds 3 segments; 1F1B stage 0 of 2 keeps 2 in flight.
    fast = profile("b", [(100_000, 200_000)] * 8, memory_bytes=3 * 200)
    choice = choose_plan(planning_input([profile("a", EQUAL), fast], segment_count=8))
    by_device = {stage.device: stage for stage in choice.plan.stages}
    assert by_device[device("b")].segment_count == 3
    assert by_device[device("b")].memory_bytes <= 600


def test_assumed_links_are_said_to_be_assumed() -> None:
    times = [(100_000_000, 200_000_000)] * 8
    peers = [profile("a", times), profile("b", times)]
    reasons = choose_plan(planning_input(peers, segment_count=8, links=())).plan.reasons
    assert reasons[-1] == "links between hosts are assumed to carry 11.9 MiB per second"


def test_peer_without_measurements_is_left_out() -> None:
    choice = choose_plan(
        planning_input([profile("a", EQUAL), profile("b", EQUAL[:3])], segment_count=8)
    )
    assert choice.left_out[0].reason == "it has not measured this model"


@pytest.mark.parametrize(
    ("letters", "memory_bytes", "stages", "message", "hint"),
    [
        ("", 0, None, "no peer has measured", "join a peer"),
        ("ab", 1 << 40, 3, "3 stages were asked for, but 2 peers can", "use --stages 2"),
        ("ab", 1 << 40, 9, "the model has 8 segments", "use --stages 2"),
        ("abc", 900, 1, "exactly 1 stages fits the memory", "use --stages 3"),
        ("a", 150, None, "segment s0 alone needs 200 B, the largest peer has 150 B",
         "add a peer with at least 1.6 KiB"),
        ("a", 1200, None, "needs 1.6 KiB on one peer, the largest has 1.2 KiB",
         "use --microbatch-size 2 --microbatches 16, or add a peer with at least 600 B"),
        ("ab", 700, None, "no cut over 2 peers fits", "add a peer with at least 1000 B"),
        ("ab", 200, None, "no cut over 2 peers fits", "add a peer with at least 1.6 KiB"),
    ],
)  # fmt: skip
def test_infeasible_says_what_is_short_and_what_would_do(
    letters: str, memory_bytes: int, stages: int | None, message: str, hint: str
) -> None:
    peers = [profile(letter, EQUAL, memory_bytes=memory_bytes) for letter in letters]
    with pytest.raises(PlanInfeasible) as caught:
        choose_plan(_of_any_size(planning_input(peers, segment_count=8, stages=stages)))
    assert message in caught.value.message
    assert hint in caught.value.hint


def _of_any_size(planning: PlanningInput) -> PlanningInput:
    """What a segment holds of a microbatch grows with its samples, of which it has four."""

    def memory_of(other: Contract) -> StageMemory:
        def memory(segments: range, holds: Held) -> int:
            return len(segments) * 25 * (4 + holds.in_flight * other.microbatch_size)

        return memory

    return dataclasses.replace(planning, memory_of=memory_of)


def test_what_cannot_be_changed_any_more_is_not_suggested() -> None:
    """A run under way has its contract."""
    with pytest.raises(PlanInfeasible) as caught:
        choose_plan(planning_input([profile("a", EQUAL, memory_bytes=150)], segment_count=8))
    assert caught.value.hint == "add a peer with at least 1.6 KiB"


def test_delayed_gradients_shorten_the_step_where_backwards_have_parts() -> None:
    peers = [profile(letter, EQUAL, delayed_percent=50) for letter in "ab"]
    found = {
        schedule: choose_plan(
            planning_input(peers, segment_count=8, stages=2, schedule=schedule)
        ).plan
        for schedule in ("1f1b", "zb-h1")
    }
    assert found["zb-h1"].schedule == "zb-h1"
    assert found["zb-h1"].step_ns < found["1f1b"].step_ns
    assert [stage.in_flight_max for stage in found["zb-h1"].stages] == [2, 2]
    assert found["zb-h1"].stages[1].memory_bytes > found["1f1b"].stages[1].memory_bytes


def test_backwards_without_parts_gain_nothing_from_being_delayed() -> None:
    peers = [profile(letter, EQUAL) for letter in "ab"]
    found = {
        schedule: choose_plan(
            planning_input(peers, segment_count=8, stages=2, schedule=schedule)
        ).plan.step_ns
        for schedule in ("1f1b", "zb-h1")
    }
    assert found["zb-h1"] == found["1f1b"]


def test_unknown_schedule_is_refused() -> None:
    with pytest.raises(ConfigError, match="zigzag"):
        choose_plan(planning_input([profile("a", EQUAL)], segment_count=8, schedule="zigzag"))


def test_many_peers_are_planned_within_the_candidate_bounds() -> None:
    letters = "abcdefghijkl"
    peers = [
        profile(letter, [(1_000_000 + 50_000 * rank, 2_000_000)] * 40)
        for rank, letter in enumerate(letters)
    ]
    choice = choose_plan(
        planning_input(peers, segment_count=40, links=fast_links(peers), microbatches=16)
    )
    assert len(choice.plan.stages) > 8
    alone = choose_plan(planning_input(peers[:1], segment_count=40, microbatches=16))
    assert choice.plan.step_ns < alone.plan.step_ns // 5


def test_a_device_cannot_have_two_profiles() -> None:
    with pytest.raises(ValueError, match="two profiles"):
        planning_input([profile("a", EQUAL)] * 2, segment_count=8, links=())


ALL: tuple[Kind, ...] = ("one device", "pipeline", "data", "hybrid")


def test_replicas_are_chosen_where_they_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds, "RUNTIME_KINDS", KINDS)
    planning = planning_input([profile("a", EQUAL), profile("b", EQUAL)], segment_count=8)
    plan = choose_plan(dataclasses.replace(planning, kinds=ALL)).plan
    assert [(s.split, s.weights) for s in plan.stages] == [("replicas", (4, 4))]
    assert plan.replicas == (None,), "each replica has the state"
    assert "4 of 8 parts of the microbatches" in plan.reasons[1]
    assert plan.step_ns == 4 * 8 * 3_000_000 + plan.step_ns % 10_000, "gradients are 512 bytes"


def test_a_faster_kind_that_nobody_asked_for_is_named() -> None:
    planning = planning_input([profile("a", EQUAL), profile("b", EQUAL)], segment_count=8)
    plan = choose_plan(dataclasses.replace(planning, compared=("data",))).plan
    assert [stage.split for stage in plan.stages] == ["none", "none"]
    assert any(
        reason.startswith("data parallelism would take 96.0 ms a step")
        and reason.endswith("--parallelism auto allows it")
        for reason in plan.reasons
    )
    many = dataclasses.replace(planning.contract, microbatches=64)
    plan = choose_plan(dataclasses.replace(planning, compared=("data",), contract=many)).plan
    assert not any("parallelism" in reason for reason in plan.reasons), "1 or 2 % are not worth it"


def test_a_kind_that_cannot_be_had_says_why() -> None:
    planning = planning_input([profile("a", EQUAL)], segment_count=8)
    with pytest.raises(PlanInfeasible, match="data parallelism because it takes two devices"):
        choose_plan(dataclasses.replace(planning, kinds=("data",)))
    pair = planning_input([profile("a", EQUAL), profile("b", EQUAL)], segment_count=8)
    with pytest.raises(PlanInfeasible, match="tensor parallelism because the bundle does not"):
        choose_plan(dataclasses.replace(pair, kinds=("tensor",)))


def test_a_lone_peer_is_charged_for_its_keeper() -> None:
    alone = choose_plan(planning_input([profile("a", EQUAL)], segment_count=8)).plan
    slow = profile("b", [(10**9, 10**9)] * 8)
    kept = choose_plan(planning_input([profile("a", EQUAL), slow], segment_count=8)).plan
    assert kept.replicas == (device("b"),)
    assert alone.step_ns < kept.step_ns < alone.step_ns + 1000
    assert "replica sets every" in " ".join(kept.reasons)
    assert "replica sets every" not in " ".join(alone.reasons)


FRUGAL = Power(idle_uw=1_000_000, busy_uw=2_000_000, pj_per_byte=0)
HUNGRY = Power(idle_uw=40_000_000, busy_uw=80_000_000, pj_per_byte=0, measured=True)


def _powered(objective: Objective, **changes: Power | None) -> PlanningInput:
    """Two equal peers; a is frugal, b is hungry."""
    powers = {"a": FRUGAL, "b": HUNGRY, **changes}
    peers = [dataclasses.replace(profile(each, EQUAL), power=powers[each]) for each in "ab"]
    return dataclasses.replace(planning_input(peers, segment_count=8), objective=objective)


def test_least_energy_leaves_a_hungry_peer_out() -> None:
    fast = choose_plan(_powered(Objective())).plan
    assert len(fast.stages) == 2
    assert fast.goal == "time"
    choice = choose_plan(_powered(Objective(goal="energy")))
    plan = choice.plan
    assert [stage.device for stage in plan.stages] == [device("a")]
    assert plan.goal == "energy"
    assert plan.step_uj is not None
    assert fast.step_uj is not None
    assert plan.step_uj == pytest.approx(2_000_000 * 0.192, rel=1e-3)
    assert fast.step_uj > 10 * plan.step_uj
    assert "1 of 2 peers compute for least energy" in plan.reasons[0]
    assert "costs" in choice.left_out[0].reason
    assert any("watts are all modelled" in reason for reason in plan.reasons)
    assert any("measured on 1 of 2 peers, else modelled" in reason for reason in fast.reasons)


@pytest.mark.parametrize(
    ("measured", "bands", "words"),
    [
        ((False, False), (300, 500), "watts are all modelled within 50 %"),
        ((False, False), (None, None), "watts are all modelled"),
        (
            (True, False),
            (500, 300),
            "watts are measured on 1 of 2 peers, else modelled within 30 %",
        ),
        ((True, True), (500, 500), "watts are all measured"),
    ],
)
def test_plan_says_how_well_its_watts_are_known(
    measured: tuple[bool, bool], bands: tuple[int | None, int | None], words: str
) -> None:
    peers = [
        dataclasses.replace(
            profile(letter, EQUAL),
            power=Power(idle_uw=1, busy_uw=2, pj_per_byte=0, measured=told, error_permille=band),
        )
        for letter, told, band in zip("ab", measured, bands, strict=True)
    ]
    reasons = choose_plan(planning_input(peers, segment_count=8, stages=2)).plan.reasons
    assert [reason for reason in reasons if reason.endswith(words)]


def test_a_deadline_takes_the_hungry_peer_in_again() -> None:
    deadline = Objective(goal="energy", deadline_ns=10 * 120_000_000)
    assert len(choose_plan(_powered(deadline)).plan.stages) == 2


def test_limits_that_nothing_meets_name_what_would() -> None:
    with pytest.raises(PlanInfeasible, match="nothing is done within") as refused:
        choose_plan(_powered(Objective(deadline_ns=1000)))
    assert refused.value.hint == "use --deadline 1.09"
    with pytest.raises(PlanInfeasible, match="nothing is done with 1 mJ"):
        choose_plan(_powered(Objective(joules_uj=1000)))


def _on_battery(percent: int, **changes: object) -> PlanningInput:
    """Two equal peers on batteries of 10 J, of which 20 % are kept."""
    planning = _powered(Objective(), a=FRUGAL, b=FRUGAL)
    battery = Battery(
        charge_uj=percent * 100_000, capacity_uj=10_000_000, reserve_percent=20
    )  # fmt: skip
    peers = tuple(dataclasses.replace(p, battery=battery) for p in planning.profiles)
    return dataclasses.replace(planning, profiles=peers, **changes)  # type: ignore[arg-type]  # by name


def test_a_battery_has_to_last_for_the_steps_that_are_left() -> None:
    plan = choose_plan(_on_battery(100)).plan
    assert len(plan.stages) == 2
    assert plan.step_uj is not None
    spent_uj = plan.step_uj // 2  # by each, in a step
    said = [reason for reason in plan.reasons if "that the battery of" in reason]
    assert len(said) == 2
    assert "of the 8 J that the battery of aaaaaaaa has above its reserve" in said[0]
    reserve = 20 + 10 * spent_uj // 100_000
    assert len(choose_plan(_on_battery(reserve + 1)).plan.stages) == 2
    with pytest.raises(PlanInfeasible, match="do not last for 10 steps: aaaaaaaa has") as refused:
        choose_plan(_on_battery(reserve - 1))
    assert refused.value.hint == "plug aaaaaaaa, bbbbbbbb in, or --steps 9 is possible"
    choose_plan(_on_battery(reserve - 1, steps_left=9))
    with pytest.raises(PlanInfeasible, match="do not last for 10 steps"):
        choose_plan(_on_battery(15))


def test_a_peer_whose_battery_does_not_last_is_left_out() -> None:
    planning = _on_battery(21)
    plugged_in = dataclasses.replace(planning.profiles[0], battery=None)
    mixed = dataclasses.replace(planning, profiles=(plugged_in, planning.profiles[1]))
    choice = choose_plan(mixed)
    assert [stage.device for stage in choice.plan.stages] == [device("a")]
    assert "and the 100 mJ that its battery has above its reserve" in choice.left_out[0].reason


def test_a_peer_that_does_not_say_what_it_draws_has_no_part_in_frugal_plans() -> None:
    choice = choose_plan(_powered(Objective(goal="energy"), a=None))
    assert choice.left_out[0].reason == "it does not say what it draws"
    assert choose_plan(_powered(Objective(), a=None)).plan.step_uj is None
    with pytest.raises(PlanInfeasible, match="no peer says what it draws"):
        choose_plan(_powered(Objective(goal="energy"), a=None, b=None))


def test_peers_of_one_machine_idle_once() -> None:
    apart = _powered(Objective(), a=HUNGRY)
    together = dataclasses.replace(
        apart, profiles=tuple(dataclasses.replace(p, host="one") for p in apart.profiles)
    )
    spent = []
    for planning in (apart, together):
        plan = choose_plan(dataclasses.replace(planning, stages=2)).plan
        assert plan.step_uj is not None
        spent.append(plan.step_uj)
    assert spent[0] - spent[1] == pytest.approx(40_000_000 * 0.108, rel=1e-3)


def test_a_schedule_that_shortens_the_step_is_chosen_where_it_may_be() -> None:
    parted = [profile(letter, EQUAL, delayed_percent=50) for letter in "ab"]
    planning = planning_input(parted, segment_count=8)
    both = dataclasses.replace(planning, further_schedules=("zb-h1",))
    assert choose_plan(planning).plan.schedule == "1f1b"
    assert choose_plan(both).plan.schedule == "zb-h1"
    whole = planning_input([profile(letter, EQUAL) for letter in "ab"], segment_count=8)
    equal = dataclasses.replace(whole, further_schedules=("zb-h1",))
    assert choose_plan(equal).plan.schedule == "1f1b", "the first among equals"


def test_an_eager_schedule_is_chosen_where_links_take_their_time() -> None:
    peers = [profile(letter, EQUAL) for letter in "ab"]

    def plan_for(latency_ns: int, peers: list[PeerProfile], *further: str) -> Plan:
        links = fast_links(peers, latency_ns=latency_ns)
        planning = planning_input(peers, segment_count=8, links=links)
        changes = {"further_schedules": further, "stages": 2}
        return choose_plan(dataclasses.replace(planning, **changes)).plan

    assert plan_for(0, peers, "eager-1f1b").schedule == "1f1b", "the one that takes less memory"
    eager = plan_for(4_000_000, peers, "eager-1f1b")
    assert eager.schedule == "eager-1f1b"
    assert [stage.in_flight_max for stage in eager.stages] == [3, 1]
    assert plan_for(4_000_000, peers).step_ns - eager.step_ns > 20_000_000
    small = [dataclasses.replace(peer, memory_bytes=1150) for peer in peers]
    assert plan_for(4_000_000, small, "eager-1f1b").schedule == "1f1b", "three in flight do not fit"


def _shardable() -> PlanningInput:
    """Two peers with gpt-nano, of which one is twice as fast, on links that cost nothing."""
    shared = load_bundle(shipped_bundles()["gpt-nano"]).manifest
    peers = [
        dataclasses.replace(
            profile(letter, []),
            kinds={
                kind: KindCost(forward_ns=10**9 * s, backward_ns=10**9 * s) for kind in shared.kinds
            },
        )
        for letter, s in (("a", 1), ("b", 2))
    ]
    planning = planning_input(peers, segment_count=len(shared.segments))
    return dataclasses.replace(planning, manifest=shared)


def test_shards_are_named_where_they_are_faster_and_taken_by_name_only() -> None:
    planning = dataclasses.replace(
        _shardable(), kinds=kinds_at_start("auto"), compared=kinds_compared("auto")
    )
    contract = dataclasses.replace(planning.contract, microbatches=1)
    plan = choose_plan(dataclasses.replace(planning, contract=contract)).plan
    assert not any(stage.is_sharded for stage in plan.stages)
    assert any(
        "parallelism would take" in reason and "allows it, but" in reason for reason in plan.reasons
    )
