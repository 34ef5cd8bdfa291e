"""Several inputs, running values, frozen and tied tensors: the same bits for every placement."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from p2ptrain.engine.contract import Array, Engine
from p2ptrain.engine.onnxruntime_engine import open_engine
from p2ptrain.errors import BundleError, InvariantBroken
from p2ptrain.ids import Digest
from p2ptrain.runtime.compute.stage import StageWorker
from p2ptrain.schedule.actions import Held
from p2ptrain.store.bundles import Bundle
from p2ptrain.training.random import draw_tensor
from p2ptrain.training.segment_state import read_segment_state
from tests.bundles import CONTEXT, WIDTH, contract_for, tiny_bundle
from tests.pipelines import LocalPipeline
from tests.varied_bundle import varied_bundle

STEPS = 12
TEXT = np.frombuffer((b"peers train together, bit for bit. " * 40)[:1200], np.uint8)
PLACEMENTS = {1: (), 2: (3,), 3: (2, 5), 7: (1, 2, 3, 4, 5, 6)}
SHAPE = (2, CONTEXT, WIDTH)
TOKENS = np.arange(2 * CONTEXT, dtype=np.int64).reshape(2, CONTEXT)
KEEP = TOKENS % 3 != 0
INPUTS = (TOKENS, KEEP)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return open_engine(threads=1)


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return varied_bundle()


def trained(
    engine: Engine, bundle: Bundle, *, stages: int = 1, rematerialise: bool = False
) -> LocalPipeline:
    contract = contract_for(bundle, steps=STEPS, rematerialise=rematerialise)
    pipeline = LocalPipeline.make(engine, bundle, contract, PLACEMENTS[stages], TEXT)
    pipeline.train(1, STEPS)
    return pipeline


def stage_of(engine: Engine, bundle: Bundle, segments: range, in_flight: int = 2) -> StageWorker:
    stage = StageWorker(
        engine=engine, bundle=bundle, segments=segments, contract=contract_for(bundle),
        holds=Held(in_flight=in_flight, delayed=0),
    )  # fmt: skip
    stage.draw_parameters()
    return stage


def forward(
    stage: StageWorker, sequence: int = 0, *, training: bool = True,
    inputs: tuple[Array, ...] = INPUTS,
) -> float | None:  # fmt: skip
    return stage.forward(
        step=1, microbatch=sequence, sequence=sequence, training=training, inputs=inputs,
        labels=TOKENS, loss_weight=1.0,
    )  # fmt: skip


@pytest.mark.parametrize("rematerialise", [False, True])
def test_varied_curve_and_state_have_the_same_bits_for_every_placement(
    engine: Engine, bundle: Bundle, rematerialise: bool
) -> None:
    one = trained(engine, bundle)
    evaluated = one.evaluate()
    assert one.losses[-1] < one.losses[0] - 0.1, "it learns"
    for stages in PLACEMENTS:
        other = trained(engine, bundle, stages=stages, rematerialise=rematerialise)
        assert other.losses == one.losses
        assert other.norms == one.norms
        assert other.evaluate() == evaluated
        assert other.digest(STEPS) == one.digest(STEPS)


@pytest.mark.parametrize("stages", [1, 3])
def test_rematerialised_dropout_has_the_same_bits(engine: Engine, stages: int) -> None:
    tiny = tiny_bundle(blocks=4, dropout=0.3)
    plain, again = (trained(engine, tiny, stages=stages, rematerialise=r) for r in (False, True))
    assert again.losses == plain.losses
    assert again.digest(STEPS) == plain.digest(STEPS)


def test_rematerialised_stage_keeps_one_stash_for_all_segments_of_a_kind(
    engine: Engine, bundle: Bundle
) -> None:
    contract = contract_for(bundle, rematerialise=True)
    stage = StageWorker(
        engine=engine,
        bundle=bundle,
        segments=range(7),
        contract=contract,
        holds=Held(in_flight=3, delayed=0),
    )
    kept = {
        slot.values["h"].host().ctypes.data
        for runner in stage._runners[4:6]
        for slot in runner._slots
    }
    assert len(kept) == 1


def test_varied_restart_from_stored_bytes_gives_the_same_curve(
    engine: Engine, bundle: Bundle
) -> None:
    whole = trained(engine, bundle)
    first = LocalPipeline.make(engine, bundle, whole.contract, PLACEMENTS[3], TEXT)
    first.train(1, 5)
    stored = [state.to_bytes(first.header(i, 5)) for i, state in enumerate(first.states(5))]
    second = LocalPipeline.make(engine, bundle, whole.contract, PLACEMENTS[2], TEXT)
    states = [
        read_segment_state(
            content, bundle.manifest, bundle=bundle.digest, state_names=("m", "v")
        ).state
        for content in stored
    ]
    assert list(states[1].running) == ["mix0.mean"]
    assert list(states[3].tensors) == ["fixed.b"], "frozen tensors are not saved"
    second.load(states)
    assert second.evaluate() == first.evaluate()
    second.train(6, STEPS)
    assert first.losses + second.losses == whole.losses
    assert second.digest(STEPS) == whole.digest(STEPS)


def test_tied_copies_start_equal_and_stay_equal(engine: Engine, bundle: Bundle) -> None:
    pipeline = LocalPipeline.make(engine, bundle, contract_for(bundle), (3,), TEXT)
    for step in range(3):
        states = pipeline.states(step)
        table, copy = states[0].tensors["start.table"], states[6].tensors["head.table"]
        np.testing.assert_array_equal(table, copy)
        for name in ("m", "v"):
            np.testing.assert_array_equal(
                states[0].state[name]["start.table"], states[6].state[name]["head.table"]
            )
        pipeline.train(step + 1, step + 1)


def test_tied_gradient_is_the_sum_of_both_and_counts_once(engine: Engine, bundle: Bundle) -> None:
    pipeline = LocalPipeline.make(engine, bundle, contract_for(bundle), (3,), TEXT)
    pipeline._microbatches(1)
    first, last = pipeline.workers
    assert (first.held_ties, last.held_ties) == (("start.table",), ("head.table",))
    parts = [first.gradient("start.table").copy(), last.gradient("head.table").copy()]
    assert all(np.abs(part).max() > 0 for part in parts)
    pipeline.sum_ties()
    total = parts[0] + parts[1]
    np.testing.assert_array_equal(first.gradient("start.table"), total)
    np.testing.assert_array_equal(last.gradient("head.table"), total)
    assert first.square_sums()[0] == pytest.approx(np.square(total.astype(np.float64)).sum())
    assert last.square_sums()[-1] == 0.0


def test_tied_gradients_are_summed_once_and_before_use(engine: Engine, bundle: Bundle) -> None:
    stage = stage_of(engine, bundle, range(7))
    with pytest.raises(InvariantBroken, match="once, after every backward"):
        stage.sum_ties({})
    forward(stage)
    stage.backward(microbatch=0, sequence=0)
    with pytest.raises(InvariantBroken, match="not summed"):
        stage.square_sums()
    with pytest.raises(InvariantBroken, match="not summed"):
        stage.update(step=1, learning_rate=0.1, clip_scale=1.0)
    stage.sum_ties({})
    with pytest.raises(InvariantBroken, match="once, after every backward"):
        stage.sum_ties({})
    stage.update(step=1, learning_rate=0.1, clip_scale=1.0)


def test_tied_gradient_without_the_other_stages_copy_is_refused(
    engine: Engine, bundle: Bundle
) -> None:
    stage = stage_of(engine, bundle, range(6))
    forward(stage)
    stage.exit_cotangent(0)[0].fill(1.0)
    stage.backward(microbatch=0, sequence=0)
    with pytest.raises(InvariantBroken, match=r"lacks \['head.table'\]"):
        stage.sum_ties({})
    with pytest.raises(InvariantBroken, match=r"no gradient of 'head\.table'"):
        stage.gradient("head.table")


def entering(stage: StageWorker, sequence: int) -> Array:
    x, keep = stage.entry(sequence)
    x[...] = np.random.default_rng(sequence).standard_normal(SHAPE, np.float32)
    keep[...] = KEEP
    seen: Array = x * KEEP[..., None]
    return seen


def mean_after(mean: Array, seen: Array) -> Array:
    return 0.75 * mean + 0.25 * seen.mean(axis=(0, 1))


def test_running_values_follow_every_microbatch_and_belong_to_the_update(
    engine: Engine, bundle: Bundle
) -> None:
    stage = stage_of(engine, bundle, range(1, 2))
    mean = np.zeros(WIDTH)
    for sequence in (0, 1):
        mean = mean_after(mean, entering(stage, sequence))
        forward(stage, sequence)
    np.testing.assert_array_equal(stage.state(1, 0).running["mix0.mean"], 0.0)
    for sequence in (0, 1):
        stage.exit_cotangent(sequence)[0].fill(1.0)
        stage.backward(microbatch=sequence, sequence=sequence)
    stage.update(step=1, learning_rate=0.0, clip_scale=1.0)
    np.testing.assert_allclose(stage.state(1, 1).running["mix0.mean"], mean, atol=1e-6)


def test_running_values_of_an_abandoned_step_never_were(engine: Engine, bundle: Bundle) -> None:
    clean, disturbed = (
        LocalPipeline.make(engine, bundle, contract_for(bundle), (), TEXT) for _ in range(2)
    )
    for pipeline in (clean, disturbed):
        pipeline.train(1, 1)
    disturbed._microbatches(2)
    disturbed.workers[0].abandon_step()
    for pipeline in (clean, disturbed):
        pipeline.train(2, 3)
    assert disturbed.losses == clean.losses
    assert disturbed.digest(3) == clean.digest(3)


def test_evaluation_reads_the_running_values_of_the_last_update(
    engine: Engine, bundle: Bundle
) -> None:
    stage = stage_of(engine, bundle, range(1, 2))
    state = stage.state(1, 0)
    mean = np.linspace(-1, 1, WIDTH, dtype=np.float32)
    stage.load(1, dataclasses.replace(state, running={"mix0.mean": mean}))
    seen = entering(stage, 0)
    forward(stage, training=False)
    y, kept = stage.exit(0)
    np.testing.assert_allclose(y, seen - mean + mean / 64, atol=1e-6)
    np.testing.assert_array_equal(kept, KEEP)
    forward(stage)
    np.testing.assert_allclose(y, seen - seen.mean(axis=(0, 1)) + mean / 64, atol=1e-6)


def test_values_without_a_cotangent_have_none_at_the_boundary(
    engine: Engine, bundle: Bundle
) -> None:
    stage = stage_of(engine, bundle, range(1, 3))
    assert [a.dtype for a in stage.entry(0)] == [np.float32, np.bool_]
    assert [a.shape for a in stage.entry_cotangent(0)] == [SHAPE]
    assert [a.shape for a in stage.exit_cotangent(0)] == [SHAPE]


@pytest.mark.parametrize(
    "inputs", [(TOKENS,), (TOKENS[:1], KEEP), (TOKENS, KEEP[:, :1])], ids=["one", "few", "narrow"]
)
def test_first_stage_wants_every_input_in_its_shape(
    engine: Engine, bundle: Bundle, inputs: tuple[Array, ...]
) -> None:
    with pytest.raises(InvariantBroken, match="needs data"):
        forward(stage_of(engine, bundle, range(1)), inputs=inputs)


def test_varied_gradients_agree_with_central_differences(engine: Engine) -> None:
    bundle = varied_bundle(dropout=0.25)
    contract = contract_for(bundle, microbatches=1, microbatch_size=3)
    pipeline = LocalPipeline.make(engine, bundle, contract, (), TEXT)
    (worker,) = pipeline.workers
    for places in (("start.table", "head.table"), ("mix0.scale",), ("fixed.b",), ("block0.w",)):
        pipeline._microbatches(1)
        pipeline.sum_ties()
        gradient = worker.gradient(places[0])
        position = int(np.argmax(np.abs(gradient)))
        exact = float(gradient.reshape(-1)[position])
        worker.abandon_step()
        losses = [
            changed_loss(pipeline, places, position, np.float32(change)) for change in (0.02, -0.02)
        ]
        assert (losses[0] - losses[1]) / 0.04 == pytest.approx(exact, rel=0.02, abs=2e-5)


def changed_loss(
    pipeline: LocalPipeline, names: tuple[str, ...], position: int, change: np.float32
) -> float:
    """The loss of step 1 with one element of a tensor, and of its tied copy, changed."""
    (worker,) = pipeline.workers
    changed = [
        memory.parameters[place.start : place.stop]
        for memory in worker._memories.values()
        for place in memory.layout.places
        if place.tensor.name in names
    ]
    before = [float(values[position]) for values in changed]
    for values in changed:
        values[position] += change
    loss = pipeline._microbatches(1)
    worker.abandon_step()
    for values, value in zip(changed, before, strict=True):
        values[position] = value
    return loss


def drawn_matrix(bundle: Bundle, seed: int = 7) -> Array:
    names = [tensor.name for tensor in bundle.manifest.tensors]
    return draw_tensor(bundle.manifest, seed, names.index("fixed.w"))


def fixed_output(stage: StageWorker) -> tuple[Array, Array]:
    seen = entering(stage, 0)
    forward(stage)
    return stage.exit(0)[0], seen


def mapped(path: Path, array: Array) -> Array:
    array.tofile(path)
    return np.memmap(path, np.float32, "r", shape=array.shape)


@pytest.mark.parametrize("source", ["drawn", "memory", "file"])
def test_frozen_tensor_is_a_constant_wherever_it_comes_from(
    engine: Engine, tmp_path: Path, source: str
) -> None:
    plain = varied_bundle()
    matrix = drawn_matrix(plain)
    digest = Digest(hashlib.sha256(matrix.tobytes()).hexdigest())
    bundle = plain if source == "drawn" else varied_bundle(frozen_digest=digest)
    sources: dict[str, Callable[[], dict[str, Array] | None]] = {
        "drawn": lambda: None,
        "memory": lambda: {"fixed.w": matrix},
        "file": lambda: {"fixed.w": mapped(tmp_path / "weights", matrix)},
    }
    stage = StageWorker(
        engine=engine, bundle=bundle, segments=range(3, 4), contract=contract_for(plain),
        weights=sources[source](),
    )  # fmt: skip
    stage.draw_parameters()
    y, _ = fixed_output(stage)
    x = stage.entry(0)[0]
    np.testing.assert_allclose(y, x + np.tanh(x @ matrix) * KEEP[..., None], atol=1e-5)
    (runner,) = stage._runners
    assert runner._programs.forward.inputs == ("x", "keep", "b")
    assert runner._programs.backward is not None
    assert "w" not in runner._programs.backward.inputs
    assert list(stage.state(3, 0).tensors) == ["fixed.b"]
    assert list(stage.state(3, 0).state["m"]) == ["fixed.b"]


def test_frozen_weights_that_do_not_fit_are_refused(engine: Engine) -> None:
    bundle = varied_bundle(frozen_digest=Digest("5" * 64))
    for weights in ({}, {"fixed.w": np.zeros((WIDTH, 2), np.float32)}):
        with pytest.raises(BundleError, match=r"'fixed\.w'"):
            StageWorker(
                engine=engine, bundle=bundle, segments=range(3, 4),
                contract=contract_for(bundle), weights=weights,
            )  # fmt: skip


def test_trainable_tensors_start_from_the_weights(engine: Engine, bundle: Bundle) -> None:
    value = np.arange(WIDTH, dtype=np.float32)
    tensors = tuple(
        dataclasses.replace(t, digest=Digest("5" * 64)) if t.name == "block0.b" else t
        for t in bundle.manifest.tensors
    )
    manifest = dataclasses.replace(bundle.manifest, tensors=tensors)
    weighted = dataclasses.replace(
        bundle, manifest=manifest, manifest_bytes=manifest.to_bytes(), digest=manifest.digest
    )
    stage = StageWorker(
        engine=engine, bundle=weighted, segments=range(4, 6),
        contract=contract_for(weighted), weights={"block0.b": value},
    )  # fmt: skip
    stage.draw_parameters()
    np.testing.assert_array_equal(stage.state(4, 0).tensors["block0.b"], value)
    np.testing.assert_array_equal(stage.state(5, 0).tensors["block1.b"], 0.0)
