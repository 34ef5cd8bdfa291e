"""Every schedule gives the bits of one stage: delayed gradients are added in the same order."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from p2ptrain.engine.contract import Engine
from p2ptrain.engine.onnxruntime_engine import open_engine
from p2ptrain.errors import InvariantBroken
from p2ptrain.runtime.compute.stage import StageWorker
from p2ptrain.schedule.actions import SCHEDULES, Held
from p2ptrain.store.bundles import Bundle, load_bundle
from p2ptrain.training.contract import OptimizerChoice
from tests.adapted_bundle import adapted_bundle
from tests.bundles import CONTEXT, contract_for, tiny_bundle
from tests.parted_bundle import parted_bundle
from tests.pipelines import LocalPipeline
from tests.varied_bundle import varied_bundle

STEPS = 6
TEXT = np.frombuffer((b"peers train together, bit for bit. " * 40)[:1200], np.uint8)
MODELS = Path(__file__).resolve().parents[2] / "onnx_models"
BUNDLES: dict[str, Callable[[], Bundle]] = {
    "dropout": lambda: parted_bundle(tiny_bundle()),
    "running values, ties, frozen": lambda: parted_bundle(varied_bundle()),
    "adapters": lambda: parted_bundle(adapted_bundle()),
    "without parts": tiny_bundle,
}
PLACEMENTS = {1: (), 2: (3,), 3: (2, 4)}
TOKENS = np.arange(2 * CONTEXT, dtype=np.int64).reshape(2, CONTEXT)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return open_engine(threads=1)


@pytest.fixture(scope="module", params=BUNDLES)
def bundle(request: pytest.FixtureRequest) -> Bundle:
    return BUNDLES[str(request.param)]()


def trained(
    engine: Engine, bundle: Bundle, stages: int, schedule: str, *, rematerialise: bool = False
) -> LocalPipeline:
    contract = contract_for(bundle, steps=STEPS, microbatches=5, rematerialise=rematerialise)
    pipeline = LocalPipeline.make(
        engine, bundle, contract, PLACEMENTS[stages], TEXT, schedule=schedule
    )
    pipeline.train(1, STEPS)
    return pipeline


@pytest.mark.parametrize("rematerialise", [False, True])
def test_every_schedule_has_the_bits_of_one_stage(
    engine: Engine, bundle: Bundle, rematerialise: bool
) -> None:
    one = trained(engine, bundle, 1, "1f1b")
    assert one.losses[-1] < one.losses[0]
    for schedule in SCHEDULES:
        for stages in PLACEMENTS:
            other = trained(engine, bundle, stages, schedule, rematerialise=rematerialise)
            assert other.losses == one.losses, (schedule, stages)
            assert other.digest(STEPS) == one.digest(STEPS), (schedule, stages)


@pytest.mark.parametrize("codec", ["bf16", "int8"])
def test_what_a_codec_loses_is_the_same_under_every_schedule(engine: Engine, codec: str) -> None:
    made = parted_bundle(tiny_bundle())
    contract = contract_for(made, steps=STEPS, microbatches=5, codec=codec)
    digests = set()
    for schedule in SCHEDULES:
        run = LocalPipeline.make(engine, made, contract, (2, 4), TEXT, schedule=schedule)
        run.train(1, STEPS)
        digests.add(run.digest(STEPS))
    assert len(digests) == 1


@pytest.mark.parametrize(
    "name", ["gpt-nano", "llama-nano", "bert-mini", "vit-tiny", "mlp", "mobilenet-v2"]
)
def test_a_stage_of_a_shipped_bundle_has_the_same_gradients_in_parts(
    engine: Engine, name: str
) -> None:
    made = load_bundle(MODELS / name)
    count = len(made.manifest.segments)
    sums = {}
    for delayed in (0, 2):
        contract = contract_for(made, microbatches=3, microbatch_size=2)
        stage = StageWorker(
            engine=engine, bundle=made, segments=range(1, count - 1), contract=contract,
            holds=Held(in_flight=3, delayed=delayed),
        )  # fmt: skip
        stage.draw_parameters()
        run_all(stage, delayed)
        sums[delayed] = stage.square_sums()
    assert np.isfinite(sums[0]).all()
    assert sums[0].max() > 0
    np.testing.assert_array_equal(sums[2], sums[0])


def run_all(stage: StageWorker, delayed: int) -> None:
    """Three microbatches, the last gradients late where they may be."""
    generator = np.random.Generator(np.random.Philox(5))
    for index in range(3):
        for array in stage.entry(index):
            if array.dtype == np.float32:
                array[...] = generator.standard_normal(array.shape)
            elif array.dtype == np.bool_:
                array[...] = True
        stage.forward(
            step=1, microbatch=index, sequence=index, training=True, inputs=None, labels=None,
            loss_weight=0.0,
        )  # fmt: skip
    for index in range(3):
        for array in stage.exit_cotangent(index):
            array[...] = generator.standard_normal(array.shape)
    if not delayed:
        for index in range(3):
            stage.backward(microbatch=index, sequence=index)
        return
    for action, index in (("B", 0), ("B", 1), ("W", 0), ("B", 2), ("W", 1), ("W", 2)):
        run = stage.backward_cotangents if action == "B" else stage.backward_gradients
        run(microbatch=index, sequence=index)


def test_parts_come_in_order_and_no_more_than_there_is_room_for(engine: Engine) -> None:
    made = parted_bundle(tiny_bundle())
    contract = contract_for(made, microbatches=3)
    stage = StageWorker(
        engine=engine,
        bundle=made,
        segments=range(6),
        contract=contract,
        holds=Held(in_flight=3, delayed=1),
    )
    stage.draw_parameters()
    for index in range(3):
        stage.forward(
            step=1, microbatch=index, sequence=index, training=True, inputs=(TOKENS,),
            labels=TOKENS, loss_weight=1.0,
        )  # fmt: skip
    with pytest.raises(InvariantBroken, match="before its cotangents"):
        stage.backward_gradients(microbatch=0, sequence=0)
    stage.backward_cotangents(microbatch=0, sequence=0)
    with pytest.raises(InvariantBroken, match="more than 1 microbatches wait"):
        stage.backward_cotangents(microbatch=1, sequence=1)
    with pytest.raises(InvariantBroken, match="overtakes delayed gradients"):
        stage.backward(microbatch=1, sequence=1)
    with pytest.raises(InvariantBroken, match="an update needs every backward"):
        stage.update(step=1, learning_rate=1e-3, clip_scale=1.0)
    stage.backward_gradients(microbatch=0, sequence=0)
    for index in (1, 2):
        stage.backward(microbatch=index, sequence=index)
    assert stage.gradients_complete


def test_an_abandoned_step_forgets_delayed_gradients(engine: Engine) -> None:
    made = parted_bundle(tiny_bundle())
    contract = contract_for(
        made, steps=2, microbatches=2, optimizer=OptimizerChoice(warmup_steps=0)
    )
    contract = dataclasses.replace(contract, dropout=0.0)
    undisturbed = LocalPipeline.make(engine, made, contract, (3,), TEXT, schedule="zb-h1")
    undisturbed.train(1, 2)
    disturbed = LocalPipeline.make(engine, made, contract, (3,), TEXT, schedule="zb-h1")
    disturbed.train(1, 1)
    last = disturbed.workers[1]
    feed = disturbed.samples.training(seed=1, step=9, first_sample=0, count=2)
    last.forward(
        step=2, microbatch=0, sequence=disturbed.sequence, training=True, inputs=None,
        labels=feed.labels, loss_weight=1.0,
    )  # fmt: skip
    last.backward_cotangents(microbatch=0, sequence=disturbed.sequence)
    last.abandon_step()
    disturbed.train(2, 2)
    assert disturbed.digest(2) == undisturbed.digest(2)
