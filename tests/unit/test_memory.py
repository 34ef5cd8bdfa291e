"""The predicted memory of a stage, part by part, against what a stage allocates."""

from __future__ import annotations

import dataclasses

import pytest

from p2ptrain.bundle.manifest import Manifest
from p2ptrain.errors import PlanInfeasible
from p2ptrain.runtime.compute.stage import StageWorker
from p2ptrain.schedule.actions import ONE, Held
from p2ptrain.store.bundles import Bundle
from p2ptrain.training import memory
from p2ptrain.training.contract import OptimizerChoice
from p2ptrain.training.layout import FlatLayout, flat_layout
from p2ptrain.training.memory import SESSION_BYTES, StageMemory, stage_memory
from tests.allocations import CountingEngine
from tests.bundles import CONTEXT, VOCABULARY, WIDTH, contract_for, tiny_bundle
from tests.parted_bundle import parted_bundle
from tests.varied_bundle import varied_bundle

TINY = tiny_bundle(blocks=2)
VARIED = varied_bundle()
PARTED = parted_bundle(VARIED)
ACTIVATION = 2 * CONTEXT * WIDTH * 4
BLOCK = WIDTH * WIDTH + WIDTH


def predicted(
    segments: range, *, bundle: Bundle = TINY, batch: int = 2, in_flight: int = 1,
    rule: str = "adamw", **changes: object,
) -> StageMemory:  # fmt: skip
    contract = contract_for(bundle, microbatch_size=batch, optimizer=OptimizerChoice(name=rule))
    contract = dataclasses.replace(contract, **changes)
    return stage_memory(bundle.manifest, segments, contract, Held(in_flight=in_flight, delayed=0))


def test_memory_counts_each_microbatch_in_flight() -> None:
    one, two = (predicted(range(1, 2), in_flight=n) for n in (1, 2))
    assert (one.stash, two.stash) == (2 * ACTIVATION, 4 * ACTIVATION), "h and mask"
    assert two.boundaries - one.boundaries == 4 * ACTIVATION, "activations and cotangents"
    assert predicted(range(1, 2), dropout=0.0).stash == ACTIVATION, "no mask is drawn"


def test_memory_of_a_rematerialising_stage_holds_one_stash_for_each_kind() -> None:
    plain, again = (
        predicted(range(1, 3), in_flight=3, rematerialise=flag) for flag in (False, True)
    )
    assert (plain.stash, again.stash) == (12 * ACTIVATION, 2 * ACTIVATION)
    assert plain.total - again.total == plain.stash - again.stash


def test_memory_of_delayed_gradients_is_bounded_by_how_many_wait() -> None:
    bundle = parted_bundle(TINY)
    contract = contract_for(bundle, microbatch_size=2)
    none, one, two = (
        stage_memory(bundle.manifest, range(1, 2), contract, Held(in_flight=3, delayed=delayed))
        for delayed in (0, 1, 2)
    )
    assert (one.stash - none.stash, two.stash - one.stash) == (ACTIVATION, ACTIVATION)
    assert two.boundaries - one.boundaries == 4 * ACTIVATION
    assert one.sessions - none.sessions == 2 * SESSION_BYTES
    assert two.sessions == one.sessions
    again = dataclasses.replace(contract, rematerialise=True)
    assert (
        stage_memory(bundle.manifest, range(1, 2), again, Held(in_flight=3, delayed=2)).stash
        == stage_memory(bundle.manifest, range(1, 2), again, Held(in_flight=3, delayed=0)).stash
    )


def test_memory_counts_parameters_gradients_scratch_and_state() -> None:
    adamw, sgd = (predicted(range(1, 3), rule=rule).parameters for rule in ("adamw", "sgd"))
    assert adamw == 4 * BLOCK * (2 * 4 + 1)
    assert sgd == 4 * BLOCK * (2 * 3 + 1)
    assert predicted(range(1)).parameters == 5 * VOCABULARY * WIDTH * 4


def test_memory_counts_what_int8_loses_of_the_cotangents_that_are_sent() -> None:
    plain, bf16, int8 = (predicted(range(1, 3), codec=codec) for codec in ("fp32", "bf16", "int8"))
    assert plain == bf16
    assert int8.boundaries - plain.boundaries == 2 * 4 * ACTIVATION, "4 microbatches, twice"
    assert predicted(range(2), codec="int8") == predicted(range(2)), "the first stage sends none"


def test_memory_counts_running_values_and_frozen_matrices() -> None:
    mix = predicted(range(1, 2), bundle=VARIED, in_flight=2)
    assert mix.parameters == 4 * WIDTH * (5 + 4)
    assert mix.frozen == 0
    fixed = predicted(range(3, 4), bundle=VARIED)
    assert fixed.parameters == 4 * WIDTH * 5
    assert fixed.frozen == 4 * WIDTH * WIDTH * 3


def test_memory_grows_with_stages_and_batch() -> None:
    totals = [predicted(range(end)).total for end in (1, 2, 3, 4)]
    assert totals == sorted(totals)
    assert predicted(range(4), batch=4).total > predicted(range(4)).total
    own = stage_memory(TINY.manifest, range(4), contract_for(TINY), ONE, 0)
    assert own.total == predicted(range(4)).total - predicted(range(4)).process


def test_memory_refuses_an_unknown_optimizer() -> None:
    updates = {"adamw": TINY.manifest.updates["adamw"]}
    manifest = dataclasses.replace(TINY.manifest, updates=updates)
    contract = contract_for(TINY, optimizer=OptimizerChoice(name="sgd"))
    with pytest.raises(PlanInfeasible, match="'sgd'"):
        stage_memory(manifest, range(1), contract, ONE)


@pytest.mark.parametrize(("delayed", "early"), [(0, 1), (1, 1), (2, 1), (2, 2)])
@pytest.mark.parametrize("rematerialise", [False, True])
@pytest.mark.parametrize("segments", [range(7), range(1), range(1, 5), range(4, 7)])
def test_memory_counts_what_a_stage_allocates(
    segments: range, rematerialise: bool, delayed: int, early: int
) -> None:
    engine = CountingEngine(threads=1)
    contract = contract_for(PARTED, microbatch_size=16, rematerialise=rematerialise)
    holds = Held(in_flight=3, delayed=delayed, early=early)
    StageWorker(engine=engine, bundle=PARTED, segments=segments, contract=contract, holds=holds)
    memory = stage_memory(PARTED.manifest, segments, contract, holds)
    counted = memory.parameters + memory.stash + memory.boundaries
    assert engine.allocated == pytest.approx(counted, rel=0.02)


def test_model_reads_each_segment_once_for_all_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []

    def counted(manifest: Manifest, index: int) -> FlatLayout:
        read.append(index)
        return flat_layout(manifest, index)

    contract = contract_for(PARTED)
    count = len(PARTED.manifest.segments)
    stages = [range(a, b) for a in range(count) for b in range(a + 1, count + 1)]
    delayed = Held(in_flight=3, delayed=2)
    alone = [stage_memory(PARTED.manifest, s, contract, delayed) for s in stages]
    monkeypatch.setattr(memory, "flat_layout", counted)
    model = memory.MemoryModel(PARTED.manifest, contract)
    assert [model.stage(s, delayed) for s in stages] == alone
    assert sorted(read) == list(range(count))
