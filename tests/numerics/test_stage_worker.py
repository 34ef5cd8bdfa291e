"""A stage worker's rings, guards and bookkeeping."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from p2ptrain.engine.contract import Engine
from p2ptrain.engine.onnxruntime_engine import open_engine
from p2ptrain.errors import CheckpointError, ConfigError, GraphError, InvariantBroken
from p2ptrain.runtime.compute.stage import StageStatistics, StageWorker
from p2ptrain.schedule.actions import Held
from p2ptrain.store.bundles import Bundle, bundle_from_parts
from p2ptrain.training.contract import OptimizerChoice
from tests.bundles import CONTEXT, WIDTH, contract_for, graph_files, tiny_bundle
from tests.pipelines import LocalPipeline

TOKENS = np.arange(2 * CONTEXT, dtype=np.int64).reshape(2, CONTEXT)
TEXT = np.frombuffer(bytes(range(256)) * 2, np.uint8)
BLOCKS = 2


@pytest.fixture(scope="module")
def engine() -> Engine:
    return open_engine(threads=1)


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return tiny_bundle(blocks=BLOCKS)


def worker(engine: Engine, bundle: Bundle, segments: range, in_flight: int = 2) -> StageWorker:
    made = StageWorker(
        engine=engine,
        bundle=bundle,
        segments=segments,
        contract=contract_for(bundle),
        holds=Held(in_flight=in_flight, delayed=0),
    )
    made.draw_parameters()
    return made


def forward(stage: StageWorker, sequence: int, *, training: bool = True) -> float | None:
    return stage.forward(
        step=1,
        microbatch=sequence,
        sequence=sequence,
        training=training,
        inputs=(TOKENS,),
        labels=TOKENS,
        loss_weight=1.0,
    )


def changed(bundle: Bundle, **changes: object) -> Bundle:
    manifest = dataclasses.replace(bundle.manifest, **changes)
    return bundle_from_parts(manifest.to_bytes(), graph_files(bundle))


def unchecked(bundle: Bundle, **changes: object) -> Bundle:
    """A manifest that its graphs contradict, which no reader of bundles would hand out."""
    return dataclasses.replace(
        bundle,
        manifest=dataclasses.replace(bundle.manifest, **changes),
        _graphs=graph_files(bundle),
    )


def test_stage_has_boundary_arrays_at_its_inner_ends_only(engine: Engine, bundle: Bundle) -> None:
    first, middle, last = (
        worker(engine, bundle, part) for part in (range(1), range(1, 3), range(3, 4))
    )
    shape = (2, CONTEXT, WIDTH)
    assert first.entry(0) == first.entry_cotangent(0) == ()
    assert last.exit(0) == last.exit_cotangent(0) == ()
    for arrays in (
        first.exit(0),
        middle.entry(0),
        middle.exit_cotangent(0),
        last.entry_cotangent(0),
    ):
        assert [(a.shape, a.dtype) for a in arrays] == [(shape, np.dtype(np.float32))]


@pytest.mark.parametrize("side", ["entry", "exit", "exit_cotangent", "entry_cotangent"])
def test_stage_ring_has_one_place_more_than_in_flight(
    engine: Engine, bundle: Bundle, side: str
) -> None:
    stage = worker(engine, bundle, range(1, 2), in_flight=3)
    starts = [getattr(stage, side)(sequence)[0].ctypes.data for sequence in range(5)]
    assert len(set(starts[:4])) == 4
    assert starts[4] == starts[0]


def test_stage_exit_stays_valid_until_the_ring_wraps_round(engine: Engine, bundle: Bundle) -> None:
    stage = worker(engine, bundle, range(2))
    forward(stage, 0)
    sent = stage.exit(0)[0].copy()
    forward(stage, 1)
    stage.backward(microbatch=0, sequence=0)
    forward(stage, 2)
    np.testing.assert_array_equal(stage.exit(0)[0], sent)
    assert not np.array_equal(stage.exit(1)[0], sent)


def test_stage_loss_is_that_of_the_weight_and_only_on_the_last_stage(
    engine: Engine, bundle: Bundle
) -> None:
    whole = worker(engine, bundle, range(4))
    full = forward(whole, 0, training=False)
    assert full is not None
    assert full == pytest.approx(TOKENS.size * np.log(256), rel=0.5)
    half = whole.forward(
        step=1, microbatch=0, sequence=1, training=False, inputs=(TOKENS,), labels=TOKENS,
        loss_weight=0.5,
    )  # fmt: skip
    assert half == pytest.approx(full / 2)
    assert forward(worker(engine, bundle, range(2)), 0) is None


def test_stage_backward_frees_the_stash_for_the_next_microbatch(
    engine: Engine, bundle: Bundle
) -> None:
    stage = worker(engine, bundle, range(4))
    for sequence in (0, 1):
        forward(stage, sequence)
    with pytest.raises(InvariantBroken, match="more than 2"):
        forward(stage, 2)
    stage.backward(microbatch=0, sequence=0)
    forward(stage, 2)
    with pytest.raises(InvariantBroken, match="before its forward"):
        stage.backward(microbatch=0, sequence=0)


def test_stage_refuses_calls_out_of_order(engine: Engine, bundle: Bundle) -> None:
    stage = worker(engine, bundle, range(4))
    with pytest.raises(InvariantBroken, match="every backward"):
        stage.update(step=1, learning_rate=0.1, clip_scale=1.0)
    forward(stage, 0)
    with pytest.raises(InvariantBroken, match="in flight"):
        forward(stage, 1, training=False)
    with pytest.raises(InvariantBroken, match="every backward"):
        stage.update(step=1, learning_rate=0.1, clip_scale=1.0)


@pytest.mark.parametrize(
    ("segments", "in_flight"), [(range(0), 1), (range(5), 1), (range(1), 0), (range(0, 4, 2), 1)]
)
def test_stage_refuses_segments_that_are_none(
    engine: Engine, bundle: Bundle, segments: range, in_flight: int
) -> None:
    with pytest.raises(InvariantBroken):
        worker(engine, bundle, segments, in_flight)


def test_stage_first_and_last_need_their_data(engine: Engine, bundle: Bundle) -> None:
    for segments, missing in ((range(1), "data"), (range(3, 4), "labels")):
        with pytest.raises(InvariantBroken, match=missing):
            worker(engine, bundle, segments).forward(
                step=1, microbatch=0, sequence=0, training=True, inputs=None, labels=None,
                loss_weight=1.0,
            )  # fmt: skip


def test_stage_abandoned_step_leaves_no_trace(engine: Engine, bundle: Bundle) -> None:
    contract = contract_for(bundle)
    clean, disturbed = (LocalPipeline.make(engine, bundle, contract, (), TEXT) for _ in range(2))
    stage = disturbed.workers[0]
    forward(stage, 0)
    stage.backward(microbatch=0, sequence=0)
    stage.abandon_step()
    for pipeline in (clean, disturbed):
        pipeline.train(1, 3)
    assert disturbed.losses == clean.losses
    assert disturbed.digest(3) == clean.digest(3)


def test_stage_square_sums_are_those_of_the_gradients_in_manifest_order(
    engine: Engine, bundle: Bundle
) -> None:
    stage = worker(engine, bundle, range(1, 4))
    stage.entry(0)[0][...] = np.random.default_rng(0).standard_normal((2, CONTEXT, WIDTH))
    forward(stage, 0)
    stage.backward(microbatch=0, sequence=0)
    assert stage.tensor_indices == (1, 2, 3, 4, 5)
    names = [bundle.manifest.tensors[index].name for index in stage.tensor_indices]
    gradients = {
        place.tensor.name: memory.gradients[place.start : place.stop].astype(np.float64)
        for memory in stage._memories.values()
        for place in memory.layout.places
    }
    expected = [np.dot(gradients[name], gradients[name]) for name in names]
    np.testing.assert_allclose(stage.square_sums(), expected, rtol=1e-12)
    assert min(expected) > 0


def test_stage_sums_gradients_over_microbatches(engine: Engine, bundle: Bundle) -> None:
    apart = []
    for sequence in (0, 1):
        stage = worker(engine, bundle, range(4))
        forward(stage, sequence)
        stage.backward(microbatch=sequence, sequence=sequence)
        apart.append({i: m.gradients.copy() for i, m in stage._memories.items()})
    stage = worker(engine, bundle, range(4))
    for sequence in (0, 1):
        forward(stage, sequence)
        stage.backward(microbatch=sequence, sequence=sequence)
    for index, memory in stage._memories.items():
        np.testing.assert_array_equal(memory.gradients, apart[0][index] + apart[1][index])


def test_stage_load_refuses_a_state_that_does_not_fit(engine: Engine, bundle: Bundle) -> None:
    stage = worker(engine, bundle, range(4))
    with pytest.raises(CheckpointError, match="other tensors"):
        stage.load(1, stage.state(2, 0))
    state = stage.state(1, 0)
    with pytest.raises(CheckpointError, match="optimizer"):
        stage.load(1, dataclasses.replace(state, state={}))


def test_stage_state_is_a_copy(engine: Engine, bundle: Bundle) -> None:
    stage = worker(engine, bundle, range(4))
    state = stage.state(1, 0)
    before = state.digest()
    forward(stage, 0)
    stage.backward(microbatch=0, sequence=0)
    stage.update(step=1, learning_rate=0.1, clip_scale=1.0)
    assert state.digest() == before != stage.state(1, 1).digest()


def test_stage_refuses_a_contract_the_bundle_cannot_keep(engine: Engine, bundle: Bundle) -> None:
    updates = {"sgd": bundle.manifest.updates["sgd"]}
    adamw = bundle.manifest.updates["adamw"].graph
    graphs = {d: file for d, file in bundle.manifest.graphs.items() if d != adamw}
    manifest = dataclasses.replace(bundle.manifest, updates=updates, graphs=graphs)
    files = {digest: content for digest, content in graph_files(bundle).items() if digest != adamw}
    with pytest.raises(ConfigError, match="no optimizer 'adamw'"):
        worker(engine, bundle_from_parts(manifest.to_bytes(), files), range(1))
    contract = contract_for(bundle)
    with pytest.raises(ConfigError, match="training graphs"):
        StageWorker(
            engine=engine, bundle=bundle, segments=range(1),
            contract=dataclasses.replace(contract, form="training"),
        )  # fmt: skip


def test_stage_refuses_graphs_that_do_not_fit_the_manifest(engine: Engine, bundle: Bundle) -> None:
    kinds = dict(bundle.manifest.kinds)
    block = kinds["block"]
    kinds["block"] = dataclasses.replace(
        block,
        parameters=tuple(
            dataclasses.replace(value, name="weight") if value.name == "w" else value
            for value in block.parameters
        ),
    )
    segments = tuple(
        dataclasses.replace(
            s, parameters={("weight" if n == "w" else n): t for n, t in s.parameters.items()}
        )
        for s in bundle.manifest.segments
    )
    with pytest.raises(GraphError, match=r"'block' do not fit: gradient\.w, gradient\.weight, w"):
        worker(engine, unchecked(bundle, kinds=kinds, segments=segments), range(1, 2))


def test_stage_statistics_count_microbatches_and_updates(engine: Engine, bundle: Bundle) -> None:
    pipeline = LocalPipeline.make(engine, bundle, contract_for(bundle), (), TEXT)
    pipeline.train(1, 2)
    pipeline.evaluate()
    assert pipeline.workers[0].statistics() == StageStatistics(
        forward_count=8,
        evaluation_count=2,
        backward_count=8,
        update_count=2,
        parameter_count=bundle.manifest.parameter_count,
    )


def test_stage_sgd_follows_the_update_rule(engine: Engine, bundle: Bundle) -> None:
    choice = OptimizerChoice(name="sgd", momentum=0.5, weight_decay=0.1, clip_norm=0.0)
    stage = StageWorker(
        engine=engine, bundle=bundle, segments=range(1),
        contract=contract_for(bundle, optimizer=choice),
    )  # fmt: skip
    stage.draw_parameters()
    parameter = stage.state(0, 0).tensors["embed.table"].astype(np.float64)
    momentum = np.zeros_like(parameter)
    for step in (1, 2):
        forward(stage, 0)
        cotangent = stage.exit_cotangent(0)[0]
        cotangent[...] = step
        stage.backward(microbatch=0, sequence=0)
        stage.update(step=step, learning_rate=0.25, clip_scale=0.5)
        gradient = np.zeros_like(parameter)
        np.add.at(gradient, TOKENS, cotangent)
        momentum = 0.5 * momentum + 0.5 * gradient + 0.1 * parameter
        parameter = parameter - 0.25 * momentum
    np.testing.assert_allclose(stage.state(0, 2).tensors["embed.table"], parameter, atol=1e-5)
