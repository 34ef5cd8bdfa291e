"""The predicted memory of a shard against what a shard allocates, byte by byte."""

from __future__ import annotations

import dataclasses
import functools

import pytest

from p2ptrain.bundle.sharding import Mode
from p2ptrain.errors import PlanInfeasible
from p2ptrain.planner.pricing import Pricing
from p2ptrain.planner.profile import KindCost, Power
from p2ptrain.planner.question import Device, Question
from p2ptrain.planner.sharded import Sharded, ShardedPricing
from p2ptrain.runtime.compute.shard_worker import ShardWorker
from p2ptrain.runtime.planning.placement import predicted_memory
from p2ptrain.schedule.actions import ONE
from p2ptrain.store.bundles import Bundle, load_bundle, shipped_bundles
from p2ptrain.training.contract import OptimizerChoice
from p2ptrain.training.shard_cuts import Share
from p2ptrain.training.shard_meetings import ShardMeetings
from p2ptrain.training.shard_memory import ShardMemoryModel
from tests.allocations import CountingEngine
from tests.bundles import contract_for
from tests.planning_cases import profile

SCALAR_BYTES = 4
PLANS: list[tuple[str, Mode, tuple[int, ...], str]] = [
    ("gpt-nano", "tensor", (2, 1), "adamw"),
    ("gpt-nano", "sequence", (1, 2, 1), "sgd"),
    ("bert-mini", "tensor", (3, 1), "sgd"),
    ("llama-nano", "sequence", (1, 1), "adamw"),
]


@functools.cache
def bundle(name: str) -> Bundle:
    return load_bundle(shipped_bundles()[name])


def scalars_bytes(made: Bundle, rule: str) -> int:
    """What an update is told, for tensors that decay and for others, which is not counted."""
    return 2 * SCALAR_BYTES * len(made.manifest.updates[rule].scalars)


@pytest.mark.parametrize(("name", "mode", "weights", "rule"), PLANS)
def test_memory_counts_what_a_shard_allocates(
    name: str, mode: Mode, weights: tuple[int, ...], rule: str
) -> None:
    made = bundle(name)
    contract = contract_for(made, microbatch_size=3, optimizer=OptimizerChoice(name=rule))
    predicted = ShardMemoryModel(made.manifest, contract, mode).shards(weights)
    for rank, memory in enumerate(predicted[:2]):
        engine = CountingEngine(threads=1)
        share = Share(mode=mode, weights=weights, rank=rank)
        ShardWorker(engine=engine, bundle=made, contract=contract, share=share)
        counted = memory.parameters + memory.stash + memory.boundaries
        assert counted == engine.allocated - scalars_bytes(made, rule)


def test_memory_counts_what_meetings_hold_and_copy() -> None:
    made = bundle("gpt-nano")
    contract = contract_for(made, microbatch_size=3)
    share = Share(mode="tensor", weights=(2, 1), rank=0)
    meetings = ShardMeetings(made.manifest, contract, share)
    (first, other) = ShardMemoryModel(made.manifest, contract, "tensor").shards((2, 1))
    assert first.meetings == other.meetings
    assert first.meetings == meetings.held_bytes_max + 2 * meetings.longest_bytes
    block = made.manifest.boundary_bytes(0, batch=3)
    assert meetings.longest_bytes >= block


def asked(made: Bundle) -> Question:
    """Of two equal devices."""
    contract = contract_for(made, microbatch_size=3)
    costs = dict.fromkeys(made.manifest.kinds, KindCost(forward_ns=10**6, backward_ns=10**6))
    return Question(
        manifest=made.manifest,
        contract=contract,
        devices=tuple(
            Device(
                profile=dataclasses.replace(profile(letter, []), kinds=costs),
                power=Power(idle_uw=0, busy_uw=0, pj_per_byte=0),
            )
            for letter in "ab"
        ),
        stage_memory=predicted_memory(made.manifest, contract),
    )


def test_planner_asks_the_model_where_the_bundle_says_how_it_is_divided() -> None:
    question = asked(bundle("gpt-nano"))
    uneven = Sharded(kind="tensor", devices=(0, 1), weights=(3, 1))
    larger, smaller = ShardedPricing(Pricing(question)).memory_bytes(uneven)
    model = ShardMemoryModel(question.manifest, question.contract, "tensor")
    assert (larger, smaller) == tuple(each.total for each in model.shards((3, 1)))
    whole = question.stage_memory(range(len(question.manifest.segments)), ONE)
    assert smaller < larger < whole
    plain = dataclasses.replace(question.manifest, sharding={})
    guess = ShardedPricing(Pricing(dataclasses.replace(question, manifest=plain)))
    assert guess.memory_bytes(uneven) != (larger, smaller), "what-if questions go without"


def test_model_is_refused_more_ranks_than_units() -> None:
    question = asked(bundle("gpt-nano"))
    model = ShardMemoryModel(question.manifest, question.contract, "tensor")
    with pytest.raises(PlanInfeasible, match="units for 99 peers"):
        model.shards((1,) * 99)
