"""The numerics contract on hand-made graphs: same bits for every placement and after a restart."""

from __future__ import annotations

import math

import numpy as np
import pytest

from p2ptrain.engine.contract import Engine
from p2ptrain.engine.onnxruntime_engine import open_engine
from p2ptrain.store.bundles import Bundle
from p2ptrain.training.contract import OptimizerChoice
from p2ptrain.training.segment_state import read_segment_state
from tests.bundles import contract_for, tiny_bundle
from tests.pipelines import LocalPipeline

STEPS = 20
TOKENS = np.frombuffer((b"peers train together, bit for bit. " * 40)[:1200], np.uint8)
PLACEMENTS = {1: (), 2: (3,), 3: (1, 4), 4: (1, 2, 5)}
OPTIMIZERS = {
    "adamw": OptimizerChoice(warmup_steps=4, clip_norm=0.2),
    "sgd": OptimizerChoice(name="sgd", peak_learning_rate=0.5, warmup_steps=4, clip_norm=0.2),
}


@pytest.fixture(scope="module")
def engine() -> Engine:
    return open_engine(threads=1)


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return tiny_bundle(dropout=0.1)


def trained(
    engine: Engine, bundle: Bundle, *, optimizer: str = "adamw", stages: int = 1, seed: int = 7
) -> LocalPipeline:
    contract = contract_for(bundle, steps=STEPS, seed=seed, optimizer=OPTIMIZERS[optimizer])
    pipeline = LocalPipeline.make(engine, bundle, contract, PLACEMENTS[stages], TOKENS)
    pipeline.train(1, STEPS)
    return pipeline


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_stage_losses_and_state_have_the_same_bits_for_1_to_4_stages(
    engine: Engine, bundle: Bundle, optimizer: str
) -> None:
    runs = {n: trained(engine, bundle, optimizer=optimizer, stages=n) for n in PLACEMENTS}
    one = runs[1]
    assert max(one.norms) > 0.2, "clipping is active"
    assert one.losses[0] == pytest.approx(math.log(256), rel=0.2), "a mean per token"
    assert one.losses[-1] < one.losses[0] - 0.2, "it learns"
    for other in runs.values():
        assert other.losses == one.losses
        assert other.norms == one.norms
        assert other.digest(STEPS) == one.digest(STEPS)


def test_stage_another_seed_gives_other_losses(engine: Engine, bundle: Bundle) -> None:
    one, other = trained(engine, bundle), trained(engine, bundle, seed=8)
    assert not set(one.losses) & set(other.losses)
    assert one.digest(STEPS) != other.digest(STEPS)


def test_stage_restart_from_stored_bytes_gives_the_same_curve(
    engine: Engine, bundle: Bundle
) -> None:
    whole = trained(engine, bundle)
    first = LocalPipeline.make(engine, bundle, whole.contract, PLACEMENTS[3], TOKENS)
    first.train(1, 10)
    stored = [
        state.to_bytes(first.header(index, 10)) for index, state in enumerate(first.states(10))
    ]
    second = LocalPipeline.make(engine, bundle, whole.contract, PLACEMENTS[2], TOKENS)
    second.load(
        [
            read_segment_state(
                content, bundle.manifest, bundle=bundle.digest, state_names=("m", "v")
            ).state
            for content in stored
        ]
    )
    second.train(11, STEPS)
    assert first.losses + second.losses == whole.losses
    assert second.digest(STEPS) == whole.digest(STEPS)


def test_stage_update_through_spare_buffers_equals_in_place(engine: Engine) -> None:
    runs = [trained(engine, tiny_bundle(in_place=in_place)) for in_place in (True, False)]
    assert runs[0].losses == runs[1].losses
    assert runs[0].digest(STEPS) == runs[1].digest(STEPS)


@pytest.mark.parametrize("stages", [1, 4])
def test_stage_evaluation_changes_nothing_and_ignores_placement(
    engine: Engine, bundle: Bundle, stages: int
) -> None:
    plain, evaluated = trained(engine, bundle), None
    pipeline = LocalPipeline.make(engine, bundle, plain.contract, PLACEMENTS[stages], TOKENS)
    before = pipeline.evaluate()
    for step in range(1, STEPS + 1):
        pipeline.train(step, step)
        evaluated = pipeline.evaluate()
    assert pipeline.losses == plain.losses
    assert evaluated == plain.evaluate()
    assert evaluated < before


def test_stage_gradients_agree_with_central_differences(engine: Engine) -> None:
    bundle = tiny_bundle(blocks=2, dropout=0.25)
    contract = contract_for(bundle, microbatches=1, microbatch_size=3)
    pipeline = LocalPipeline.make(engine, bundle, contract, (), TOKENS)
    (worker,) = pipeline.workers
    pipeline._microbatches(1)
    for index, tensor in enumerate(("table", "w", "w", "head")):
        memory = worker._memories[index]
        (place,) = (p for p in memory.layout.places if p.local == tensor)
        gradient = memory.gradients[place.start : place.stop].copy()
        position = place.start + int(np.argmax(np.abs(gradient)))
        exact = float(memory.gradients[position])
        worker.abandon_step()
        losses = []
        start = memory.parameters[position]
        for change in (0.02, -0.02):
            memory.parameters[position] = start + np.float32(change)
            losses.append(pipeline._microbatches(1))
            worker.abandon_step()
        memory.parameters[position] = start
        pipeline._microbatches(1)
        assert (losses[0] - losses[1]) / 0.04 == pytest.approx(exact, rel=0.02, abs=2e-5)
