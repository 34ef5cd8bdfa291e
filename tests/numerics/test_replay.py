"""A lost stage, replayed from a saved state and its neighbours' logs, has the bits it had."""

from __future__ import annotations

import dataclasses
import itertools
import pydoc_data.topics
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np
import pytest

from p2ptrain.engine.contract import Array, Engine
from p2ptrain.engine.onnxruntime_engine import open_engine
from p2ptrain.errors import InvariantBroken, RemoteProtocolError
from p2ptrain.ids import Digest
from p2ptrain.runtime.compute.replay import Replayer
from p2ptrain.runtime.compute.stage import StageWorker
from p2ptrain.store.bundles import Bundle, find_bundle, load_bundle
from p2ptrain.training.contract import OptimizerChoice
from p2ptrain.training.minibatch import read_minibatch
from p2ptrain.training.program import Item
from p2ptrain.training.replay_inputs import (
    StepPlace,
    needed_places,
    place_bytes,
    sent_places,
    step_inputs,
)
from p2ptrain.training.segment_state import SegmentState
from p2ptrain.training.step_record import StepRecord
from p2ptrain.training.step_tensors import PackedTensor, encoded, expected_tensors, pack
from tests.bundles import contract_for, tiny_bundle
from tests.pipelines import LocalPipeline
from tests.varied_bundle import varied_bundle

STEPS = 4
TEXT = np.frombuffer((b"what was sent is what is needed again. " * 40)[:1200], np.uint8)
PLACEMENTS = {1: (), 2: (3,), 3: (2, 5), 4: (1, 2, 6)}
"""Of the varied bundle: segment 0 and 6 are tied, 1 and 2 have running means, 3 is frozen, 4 and 5
drop out."""

FLIPPED = {"labels": (-16, 1), "tied": (-1, 64)}
"""Byte and bit: the last label; the exponent of a gradient that may be 0; else the last value."""


@dataclass(slots=True)
class Log:
    """What stages sent, encoded, by place and step."""

    bundle: Bundle
    pipeline: LocalPipeline | None = None
    kept: dict[tuple[StepPlace, int], list[PackedTensor]] = field(default_factory=dict)

    def __call__(
        self, kind: str, step: int, microbatch: int, segment: int, arrays: tuple[Array, ...]
    ) -> None:
        place = StepPlace(kind, segment)  # type: ignore[arg-type]  # a LogKind
        contract = contract_for(self.bundle)
        expected = expected_tensors(self.bundle.manifest, contract, place.kind, segment)
        indices = [each.index for each in expected if each.microbatch == microbatch]
        for index, array in zip(indices, arrays, strict=True):
            tensor = PackedTensor(microbatch=microbatch, index=index, body=encoded(array))
            self.kept.setdefault((place, step), []).append(tensor)

    def packed(self, place: StepPlace, step: int) -> bytes:
        return pack(self.kept.get((place, step), []))


@dataclass(frozen=True, slots=True)
class Undisturbed:
    """A pipeline that ran to the end, with its log and every segment's state at every step."""

    pipeline: LocalPipeline
    log: Log
    states: list[list[SegmentState]]
    """By step."""

    def digests(self, step: int, segments: range) -> list[Digest]:
        return [self.states[step][index].digest() for index in segments]

    def packed(self, segments: range, step: int) -> dict[StepPlace, bytes]:
        """What a replay of `segments` is given for a step, from logs and from the data."""
        pipeline = self.pipeline
        manifest = pipeline.bundle.manifest
        item = Item(kind="train", step=step)
        read = read_minibatch(pipeline.samples, pipeline.contract, manifest.loss, item)
        return {
            place: read.packed(place.kind)
            if place.kind == "input" or place.kind == "labels"
            else self.log.packed(place, step)
            for place in needed_places(manifest, segments)
        }


@pytest.fixture(scope="module")
def engine() -> Engine:
    return open_engine(threads=1)


def undisturbed(
    engine: Engine, bundle: Bundle, cuts: tuple[int, ...], *, text: Array = TEXT, **choices: object
) -> Undisturbed:
    contract = contract_for(bundle, **{"steps": STEPS, **choices})
    pipeline = LocalPipeline.make(engine, bundle, contract, cuts, text)
    pipeline.on_sent = log = Log(bundle)
    states = [pipeline.states(0)]
    for step in range(1, contract.steps + 1):
        pipeline.train(step, step)
        states.append(pipeline.states(step))
    return Undisturbed(pipeline, log, states)


def worker_over(
    engine: Engine, run: Undisturbed, segments: range, cuts: Collection[int] = ()
) -> StageWorker:
    return StageWorker(
        engine=engine, bundle=run.pipeline.bundle, segments=segments,
        contract=run.pipeline.contract, cuts=cuts,
    )  # fmt: skip


def replayed(
    run: Undisturbed, worker: StageWorker, after: int, *, cuts: Collection[int] = (),
    records: list[StepRecord] | None = None,
    packed: Mapping[int, Mapping[StepPlace, bytes]] | None = None,
) -> tuple[list[Digest], Log]:  # fmt: skip
    """Load what the segments were after a step, run the rest; their digests and what they sent."""
    pipeline, segments = run.pipeline, worker.segments
    manifest, contract = pipeline.bundle.manifest, pipeline.contract
    for index in segments:
        worker.load(index, run.states[after][index])
    log = Log(pipeline.bundle)
    replayer = Replayer(worker, manifest=manifest, contract=contract, on_sent=log, cuts=cuts)
    for record in (records or pipeline.records)[after:]:
        given = (packed or {}).get(record.step) or run.packed(segments, record.step)
        replayer.run_step(step_inputs(manifest, contract, segments, given), record)
    last = contract.steps
    assert worker.applied_step == last
    return [worker.state(index, last).digest() for index in segments], log


def check_every_stage(engine: Engine, run: Undisturbed) -> None:
    """Lose each stage in turn, replay it from every step; its state and what it sent are equal."""
    manifest, last = run.pipeline.bundle.manifest, run.pipeline.contract.steps
    for segments in run.pipeline.segments:
        worker = worker_over(engine, run, segments)
        for after in range(last):
            digests, log = replayed(run, worker, after)
            assert digests == run.digests(last, segments)
            for place in sent_places(manifest, segments):
                for step in range(after + 1, last + 1):
                    assert log.packed(place, step) == run.log.packed(place, step)
        assert set(log.kept) <= set(run.log.kept), "nothing is logged that was never sent"


@pytest.mark.parametrize("rematerialise", [False, True])
@pytest.mark.parametrize("stages", PLACEMENTS)
def test_every_stage_is_replayed_from_every_step(
    engine: Engine, stages: int, rematerialise: bool
) -> None:
    run = undisturbed(
        engine, varied_bundle(dropout=0.2), PLACEMENTS[stages], rematerialise=rematerialise
    )
    scales = [record.clip_scale for record in run.pipeline.records]
    assert any(scale < 1.0 for scale in scales), "clipping is active"
    check_every_stage(engine, run)


@pytest.mark.parametrize("rematerialise", [False, True])
def test_untied_stages_with_sgd_and_heavy_dropout_are_replayed(
    engine: Engine, rematerialise: bool
) -> None:
    choice = OptimizerChoice(name="sgd", weight_decay=0.1, warmup_steps=2, clip_norm=0.1)
    run = undisturbed(
        engine, tiny_bundle(blocks=4, dropout=0.5), (2, 4), optimizer=choice,
        rematerialise=rematerialise,
    )  # fmt: skip
    check_every_stage(engine, run)


@pytest.mark.parametrize("form", ["portable", "training"])
def test_stages_of_a_shipped_model_are_replayed_in_both_forms(engine: Engine, form: str) -> None:
    if form == "training" and engine.build.runtime != "onnxruntime-training":
        pytest.skip("stock onnxruntime lacks the training wheel's gradient operators")
    bundle = load_bundle(find_bundle("gpt-nano"))
    text = np.frombuffer("\n".join(pydoc_data.topics.topics.values()).encode(), np.uint8)
    contract = dataclasses.replace(
        contract_for(bundle, steps=2, microbatch_size=1, microbatches=2), form=form
    )
    pipeline = LocalPipeline.make(engine, bundle, contract, (5,), text)
    pipeline.on_sent = log = Log(bundle)
    states = [pipeline.states(0)]
    for step in (1, 2):
        pipeline.train(step, step)
        states.append(pipeline.states(step))
    check_every_stage(engine, Undisturbed(pipeline, log, states))


@pytest.mark.parametrize("rematerialise", [False, True])
@pytest.mark.parametrize("codec", ["bf16", "int8"])
def test_stages_that_exchange_rounded_tensors_are_replayed(
    engine: Engine, codec: str, rematerialise: bool
) -> None:
    bundle = varied_bundle(dropout=0.2)
    run = undisturbed(engine, bundle, PLACEMENTS[3], codec=codec, rematerialise=rematerialise)
    check_every_stage(engine, run)
    exact = undisturbed(engine, bundle, PLACEMENTS[3], rematerialise=rematerialise)
    whole = range(len(bundle.manifest.segments))
    assert run.digests(STEPS, whole) != exact.digests(STEPS, whole)
    assert run.pipeline.losses == pytest.approx(exact.pipeline.losses, rel=0.02)


@pytest.mark.parametrize("codec", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("stages", [3, 4])
def test_two_neighbours_are_replayed_as_one_range(engine: Engine, stages: int, codec: str) -> None:
    run = undisturbed(engine, varied_bundle(), PLACEMENTS[stages], codec=codec)
    manifest = run.pipeline.bundle.manifest
    for one, other in itertools.pairwise(run.pipeline.segments):
        merged, cuts = range(one.start, other.stop), {one[-1]}
        worker = worker_over(engine, run, merged, cuts)
        digests, log = replayed(run, worker, 1, cuts=cuts)
        assert digests == run.digests(STEPS, merged)
        places = {*sent_places(manifest, one), *sent_places(manifest, other)}
        assert places == set(sent_places(manifest, merged, cuts))
        for place in places:
            for step in range(2, STEPS + 1):
                assert log.packed(place, step) == run.log.packed(place, step)
        uncut, _ = replayed(run, worker_over(engine, run, merged), 1)
        assert (uncut == digests) == (codec == "fp32"), "a lossy codec must round there again"


@pytest.mark.parametrize("codec", ["fp32", "bf16", "int8"])
def test_packed_steps_have_the_size_that_the_contract_predicts(engine: Engine, codec: str) -> None:
    run = undisturbed(engine, varied_bundle(), PLACEMENTS[3], codec=codec)
    manifest, contract = run.pipeline.bundle.manifest, run.pipeline.contract
    for segments in run.pipeline.segments:
        for place, content in run.packed(segments, 2).items():
            assert len(content) == place_bytes(manifest, contract, place)


def test_wrong_clip_scale_is_seen_in_the_digest(engine: Engine) -> None:
    run = undisturbed(engine, varied_bundle(), PLACEMENTS[3])
    records = list(run.pipeline.records)
    scale = np.nextafter(np.float32(records[1].clip_scale), np.float32(0))
    records[1] = dataclasses.replace(records[1], clip_scale=float(scale))
    for segments in run.pipeline.segments:
        digests, _ = replayed(run, worker_over(engine, run, segments), 0, records=records)
        assert all(a != b for a, b in zip(digests, run.digests(STEPS, segments), strict=True))


@pytest.mark.parametrize("kind", ["activation", "cotangent", "tied", "input", "labels"])
def test_wrong_log_is_seen_in_the_digest(engine: Engine, kind: str) -> None:
    run = undisturbed(engine, varied_bundle(), PLACEMENTS[3])
    for segments in run.pipeline.segments:
        packed = run.packed(segments, 2)
        for place in [each for each in packed if each.kind == kind]:
            content = bytearray(packed[place])
            position, bit = FLIPPED.get(kind, (-1, 1))
            content[position] ^= bit
            wrong = {2: {**packed, place: bytes(content)}}
            digests, _ = replayed(run, worker_over(engine, run, segments), 1, packed=wrong)
            assert digests != run.digests(STEPS, segments)


@pytest.mark.parametrize("rematerialise", [False, True])
def test_load_and_draw_after_a_partial_step_leave_no_trace(
    engine: Engine, rematerialise: bool
) -> None:
    run = undisturbed(engine, varied_bundle(), (), rematerialise=rematerialise)
    segments = run.pipeline.segments[0]
    feed = run.pipeline._feed(1, 0)
    worker = worker_over(engine, run, segments)
    worker.draw_parameters()

    def half_a_step() -> None:
        for sequence in (0, 1):
            worker.forward(
                step=1, microbatch=sequence, sequence=sequence, training=True,
                inputs=feed.inputs, labels=feed.labels, loss_weight=0.5,
            )  # fmt: skip
            if sequence == 0:
                worker.backward(microbatch=0, sequence=0)

    half_a_step()
    assert replayed(run, worker, 2)[0] == run.digests(STEPS, segments)
    half_a_step()
    worker.draw_parameters()
    assert [worker.state(i, 0).digest() for i in segments] == run.digests(0, segments)
    half_a_step()
    worker.abandon_step()
    assert replayed(run, worker, 0)[0] == run.digests(STEPS, segments)


def test_worker_says_which_step_it_is_at(engine: Engine) -> None:
    run = undisturbed(engine, varied_bundle(), PLACEMENTS[2])
    segments = run.pipeline.segments[0]
    worker = worker_over(engine, run, segments)
    assert worker.applied_step is None
    worker.draw_parameters()
    assert worker.applied_step == 0
    worker.load(segments[0], run.states[3][segments[0]])
    assert worker.applied_step is None, "segments of different steps"
    for index in segments[1:]:
        worker.load(index, run.states[3][index])
    assert worker.applied_step == 3
    assert not worker.gradients_complete


def test_gradients_are_complete_once_ties_are_summed(engine: Engine) -> None:
    run = undisturbed(engine, varied_bundle(), PLACEMENTS[2], steps=1)
    pipeline = run.pipeline
    pipeline._microbatches(1)
    assert not any(worker.gradients_complete for worker in pipeline.workers)
    pipeline.sum_ties()
    assert all(worker.gradients_complete for worker in pipeline.workers)
    for worker in pipeline.workers:
        worker.update(step=2, learning_rate=0.1, clip_scale=1.0)
        assert not worker.gradients_complete
        assert worker.applied_step == 2


def test_replay_refuses_steps_out_of_turn_and_missing_inputs(engine: Engine) -> None:
    run = undisturbed(engine, varied_bundle(), PLACEMENTS[3])
    manifest, contract = run.pipeline.bundle.manifest, run.pipeline.contract
    segments = run.pipeline.segments[1]
    with pytest.raises(InvariantBroken, match="replay of step 3 after step 1"):
        replayed(run, worker_over(engine, run, segments), 1, records=run.pipeline.records[1:])
    given = run.packed(segments, 1)
    with pytest.raises(RemoteProtocolError, match="lacks"):
        step_inputs(manifest, contract, segments, dict(list(given.items())[1:]))
    inputs = step_inputs(manifest, contract, segments, given)
    worker = worker_over(engine, run, segments)
    worker.draw_parameters()
    replayer = Replayer(
        worker, manifest=manifest, contract=contract, on_sent=Log(run.pipeline.bundle)
    )
    short = dataclasses.replace(inputs, cotangents=inputs.cotangents[:-1])
    with pytest.raises(InvariantBroken, match="lacks what crossed"):
        replayer.run_step(short, run.pipeline.records[0])
    replayer.run_step(inputs, run.pipeline.records[0])
    assert [worker.state(i, 1).digest() for i in segments] == run.digests(1, segments)
