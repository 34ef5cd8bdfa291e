"""What each stage of a plan may expect, and whom it sends tied gradients to."""

from __future__ import annotations

import dataclasses

import pytest

from p2ptrain.bundle.manifest import Manifest
from p2ptrain.bundle.reading import check_manifest
from p2ptrain.planner.plan import Plan, StagePlan
from p2ptrain.training.arrivals import FedValue, TieKey, arrivals, tied_sends
from tests.bundles import CONTEXT, contract_for, tiny_bundle
from tests.sim.plans import device, make_plan

BUNDLE = tiny_bundle()
CONTRACT = contract_for(BUNDLE, microbatch_size=3, microbatches=5)


def tied_manifest() -> Manifest:
    """Blocks 0, 2 and 3 (segments 1, 3 and 4) share their matrix."""
    manifest = BUNDLE.manifest
    tensors = [
        dataclasses.replace(t, tied_to="block0.w") if t.name in ("block2.w", "block3.w") else t
        for t in manifest.tensors
    ]
    tied = dataclasses.replace(manifest, tensors=tuple(tensors))
    check_manifest(tied)
    return tied


MANIFEST = tied_manifest()


def plan_of(*counts: int) -> Plan:
    """Stages of so many segments each."""
    first, stages = 0, []
    for index, count in enumerate(counts):
        stages.append(
            StagePlan(
                device=device(index), first_segment=first, segment_count=count, in_flight_max=1,
                step_compute_ns=1, memory_bytes=1, parameter_count=1,
            )
        )  # fmt: skip
        first += count
    members = [device(index) for index in range(len(counts))]
    return dataclasses.replace(make_plan(*members), stages=tuple(stages))


def key(name: str, segment: int) -> TieKey:
    names = [tensor.name for tensor in MANIFEST.tensors]
    return TieKey(segment=segment, tensor_index=names.index(name))


FIRST, SECOND, THIRD = key("block0.w", 1), key("block2.w", 3), key("block3.w", 4)


def test_ends_of_the_pipeline_are_fed_and_the_middle_is_not() -> None:
    plan = plan_of(2, 2, 2)
    tokens = FedValue(shape=(3, CONTEXT), dtype="int64")
    fed = [arrivals(MANIFEST, CONTRACT, plan, plan.stages[stage].device).fed for stage in range(3)]
    assert fed[0] == {"input": (tokens,)}
    assert fed[1] == {}
    assert fed[2] == {"labels": (tokens, FedValue(shape=(1,), dtype="float64"))}
    counts = arrivals(MANIFEST, CONTRACT, plan, plan.stages[1].device).microbatches
    assert {phase: sorted(own) for phase, own in counts.items()} == {
        "train": [0, 1, 2, 3, 4],
        "evaluate": list(range(CONTRACT.heldout_microbatches)),
    }


def test_one_stage_is_fed_both_and_waits_for_no_copy() -> None:
    whole = arrivals(MANIFEST, CONTRACT, plan_of(6), plan_of(6).stages[0].device)
    assert set(whole.fed) == {"input", "labels"}
    assert whole.tied == {}
    assert tied_sends(MANIFEST, plan_of(6), 0) == ()


@pytest.mark.parametrize(
    ("counts", "awaited"),
    [
        ((2, 4), [{SECOND, THIRD}, {FIRST}]),
        ((4, 2), [{THIRD}, {FIRST, SECOND}]),
        ((2, 1, 3), [{SECOND, THIRD}, set(), {FIRST}]),
        ((2, 2, 2), [{SECOND, THIRD}, {FIRST, THIRD}, {FIRST, SECOND}]),
        ((1, 5), [set(), set()]),
    ],
)
def test_a_stage_awaits_the_copies_that_others_hold(
    counts: tuple[int, ...], awaited: list[set[TieKey]]
) -> None:
    plan = plan_of(*counts)
    found = [
        arrivals(MANIFEST, CONTRACT, plan, plan.stages[stage].device).tied
        for stage in range(len(counts))
    ]
    assert [set(tied) for tied in found] == awaited
    shape = MANIFEST.tensor("block0.w").shape
    assert all(tied == dict.fromkeys(tied, shape) for tied in found)


@pytest.mark.parametrize("counts", [(2, 4), (4, 2), (2, 1, 3), (2, 2, 2), (1, 5), (3, 1, 1, 1)])
def test_what_is_sent_is_exactly_what_is_awaited(counts: tuple[int, ...]) -> None:
    plan = plan_of(*counts)
    sent: dict[int, list[TieKey]] = {stage: [] for stage in range(len(counts))}
    for stage in range(len(counts)):
        for send in tied_sends(MANIFEST, plan, stage):
            assert MANIFEST.tensors[send.key.tensor_index].name == send.tensor
            for target in send.devices:
                sent[plan.stage_of(target) or 0].append(send.key)
    for stage, keys in sent.items():
        assert len(set(keys)) == len(keys)
        assert set(keys) == set(arrivals(MANIFEST, CONTRACT, plan, plan.stages[stage].device).tied)


def test_frozen_copies_exchange_nothing() -> None:
    frozen = [
        dataclasses.replace(t, binding="frozen") if t.name.endswith(".w") else t
        for t in MANIFEST.tensors
    ]
    manifest = dataclasses.replace(MANIFEST, tensors=tuple(frozen))
    assert arrivals(manifest, CONTRACT, plan_of(2, 4), plan_of(2, 4).stages[0].device).tied == {}
    assert tied_sends(manifest, plan_of(2, 4), 0) == ()
