"""A plan that a person asks for becomes the plan of a run's first view."""

from __future__ import annotations

import dataclasses

import pytest

from p2ptrain.errors import ConfigError, PlanInfeasible
from p2ptrain.planner import kinds
from p2ptrain.planner.asked import Known
from p2ptrain.planner.choose import asked_plan
from p2ptrain.planner.input import LeftOut, LinkEstimate
from p2ptrain.planner.kinds import KINDS
from p2ptrain.planner.plan import Plan
from p2ptrain.planner.plan_file import read_plan
from p2ptrain.planner.profile import Battery, Power
from tests.planning_cases import device, planning_input, profile

A, B, C = (device(letter) for letter in "abc")
EQUAL = [(1_000_000, 2_000_000)] * 8
KNOWN = Known(names={A: "laptop", B: "cellar", C: "loft"})


def _asked(text: str, **changes: object) -> tuple[Plan, tuple[LeftOut, ...]]:
    peers = [profile(letter, EQUAL) for letter in "abc"]
    planning = planning_input(peers, segment_count=8)
    planning = dataclasses.replace(planning, **changes)  # type: ignore[arg-type]  # by name
    choice = asked_plan(planning, read_plan(text, file="--plan"), KNOWN)
    return choice.plan, choice.left_out


def _stage(devices: list[str], segments: int, *lines: str) -> str:
    return "\n".join(["[[stage]]", f"devices = {devices}", f"segments = {segments}", *lines, ""])


def test_a_pipeline_as_asked() -> None:
    plan, left_out = _asked(_stage(["cellar"], 5) + _stage(["laptop"], 3))
    assert [(s.device, s.segment_count) for s in plan.stages] == [(B, 5), (A, 3)]
    assert [stage.in_flight_max for stage in plan.stages] == [2, 1]
    assert [stage.memory_bytes for stage in plan.stages] == [1500, 600]
    assert [stage.step_compute_ns for stage in plan.stages] == [120_000_000, 72_000_000]
    assert plan.members == (A, B, C)
    assert plan.replicas == (C, C)
    assert [out.device for out in left_out] == [C]
    assert plan.reasons[0].startswith("2 of 3 peers compute as asked: a step is predicted to take")
    assert "stage 1 on aaaaaaaa: segments 5 to 7, 38 % of the compute" in plan.reasons[2]
    assert "owns the data" in plan.reasons[2]
    assert "replica sets every" in plan.reasons[3]


def test_what_this_version_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds, "RUNTIME_KINDS", ("one device", "pipeline"))
    with pytest.raises(PlanInfeasible, match="does not run plans of the kind data yet") as refused:
        _asked(_stage(["laptop", "cellar"], 8))
    assert "pipeline" in refused.value.hint


def test_replicas_get_their_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds, "RUNTIME_KINDS", KINDS)
    text = _stage(["loft", "cellar"], 6, "weights = [3, 1]") + _stage(["laptop"], 2)
    plan, _ = _asked(text)
    shared, single = plan.stages
    assert (shared.split, shared.device, shared.devices) == ("replicas", C, (C, B))
    assert (shared.weights, single.split, single.shares) == ((3, 1), "none", ())
    assert shared.step_compute_ns == 6 * 6 * 3_000_000, "of the busier replica"
    assert [shared.compute_ns_of(device) for device in (C, B)] == [108_000_000, 36_000_000]
    assert single.compute_ns_of(A) == single.step_compute_ns
    assert shared.memory_bytes == max(share.memory_bytes for share in shared.shares)
    assert plan.replicas[0] is None, "its sibling has the state"
    assert plan.replicas[1] in (B, C)
    assert "3 of 4 parts of the microbatches" in plan.reasons[1]


def test_a_replicated_stage_delays_no_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds, "RUNTIME_KINDS", KINDS)
    for asked, taken in (("zb-h1", "1f1b"), ("eager-zb-h1", "eager-1f1b")):
        plan, _ = _asked(_stage(["loft", "cellar"], 8), schedule=asked)
        assert plan.schedule == taken


def test_int8_has_replicas_of_the_first_stage_only() -> None:
    contract = dataclasses.replace(planning_input([], segment_count=8).contract, codec="int8")
    first = _stage(["loft", "cellar"], 6) + _stage(["laptop"], 2)
    later = _stage(["laptop"], 2) + _stage(["loft", "cellar"], 6)
    plan, _ = _asked(first, contract=contract)
    assert [len(stage.devices) for stage in plan.stages] == [2, 1]
    with pytest.raises(PlanInfeasible, match="stage 1 has replicas, but under") as refused:
        _asked(later, contract=contract)
    assert refused.value.hint == "use --codec bf16 or fp32, or give stage 1 one device"
    for codec in ("bf16", "fp32"):  # what the hint says works
        _asked(later, contract=dataclasses.replace(contract, codec=codec))


def test_a_device_that_is_away_is_named_with_the_reason() -> None:
    known = Known(names=KNOWN.names, absent={device("x"): "busy with run 7"})
    known = dataclasses.replace(known, names={**KNOWN.names, device("x"): "attic"})
    planning = planning_input([profile("a", EQUAL)], segment_count=8)
    with pytest.raises(ConfigError, match="attic takes no part: busy with run 7") as refused:
        asked_plan(planning, read_plan(_stage(["attic"], 8), file="--plan"), known)
    assert "laptop" in refused.value.hint


def test_a_plan_beyond_a_battery_names_whose() -> None:
    battery = Battery(charge_uj=300_000, capacity_uj=1_000_000, reserve_percent=20)
    watts = Power(idle_uw=1_000_000, busy_uw=2_000_000, pj_per_byte=0)
    peers = [dataclasses.replace(profile(x, EQUAL), power=watts) for x in "abc"]
    tired = (peers[0], dataclasses.replace(peers[1], battery=battery), peers[2])
    text = _stage(["laptop"], 4) + _stage(["cellar"], 4)
    with pytest.raises(PlanInfeasible, match="more than cellar has in its battery") as refused:
        _asked(text, profiles=tired)
    assert refused.value.hint.startswith("plug cellar in, or ")
    plan, _ = _asked(_stage(["laptop"], 4) + _stage(["loft"], 4), profiles=tired)
    assert len(plan.stages) == 2


def test_what_links_were_taken_for_is_said() -> None:
    measured = LinkEstimate(first=A, second=B, latency_ns=4_000_000, bytes_per_s=2 << 20)
    text = _stage(["laptop"], 3) + _stage(["cellar"], 3) + _stage(["loft"], 2)
    plan, _ = _asked(text, links=(measured,))
    assert "link aaaaaaaa to bbbbbbbb: 2.0 MiB per second, round trip 8.0 ms, measured" in (
        plan.reasons
    )
    assert "links between hosts are assumed to carry 11.9 MiB per second" in plan.reasons
