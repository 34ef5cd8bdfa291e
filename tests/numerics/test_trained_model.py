"""`trained.onnx` holds what a run ends with: trained, running, frozen and tied tensors."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from p2ptrain.bundle.manifest import Inference
from p2ptrain.engine.onnxruntime_engine import open_engine
from p2ptrain.errors import BundleError, CheckpointError, ConfigError
from p2ptrain.ids import Digest
from p2ptrain.runtime.home.trained_model import write_trained_model
from p2ptrain.runtime.home.trained_weights import final_tensors
from p2ptrain.store.bundles import Bundle, bundle_from_parts
from p2ptrain.store.weights import open_weights
from p2ptrain.training.contract import Contract
from p2ptrain.training.random import draw_tensor
from tests.bundles import (
    PROBABILITIES,
    TABLE,
    TOKENS,
    GraphBuilder,
    W,
    contract_for,
    graph_files,
    tiny_bundle,
)
from tests.pipelines import LocalPipeline
from tests.stored_runs import store_run
from tests.varied_bundle import MEAN, varied_bundle
from tests.weights import some_weights, write_weighted

TEXT = np.frombuffer((b"peers train together, bit for bit. " * 40)[:1200], np.uint8)
STEPS = 3
READ = {"start.table": TABLE, "mix1.mean": MEAN, "fixed.w": W}


def inference_graph() -> bytes:
    """logits = ((table[tokens] - mean) w) table^T: a trained, a running and a frozen tensor."""
    graph = GraphBuilder()
    x = graph.op("Sub", graph.op("Gather", "start.table", "tokens"), "mix1.mean")
    mixed = graph.op("MatMul", x, "fixed.w")
    graph.op("MatMul", mixed, graph.op("Transpose", "start.table", perm=[1, 0]), out="logits")
    frozen = tuple(dataclasses.replace(value, name=name) for name, value in READ.items())
    logits = dataclasses.replace(PROBABILITIES, name="logits")
    return graph.build([TOKENS], [logits], frozen=frozen)


def reading_bundle() -> Bundle:
    """The varied bundle with an inference graph that reads every sort of tensor."""
    made = varied_bundle()
    content = inference_graph()
    digest = Digest(hashlib.sha256(content).hexdigest())
    old = made.manifest.inference
    graphs = {d: file for d, file in graph_files(made).items() if d != old.graph}
    files = {d: file for d, file in made.manifest.graphs.items() if d != old.graph}
    files[digest] = dataclasses.replace(made.manifest.graphs[old.graph], bytes=len(content))
    inference = Inference(graph=digest, inputs=old.inputs, output=old.output)
    manifest = dataclasses.replace(made.manifest, graphs=files, inference=inference)
    return bundle_from_parts(manifest.to_bytes(), {**graphs, digest: content})


class Trained:
    """Three steps in one process, written down as a run's checkpoint."""

    def __init__(self, path: Path, bundle: Bundle) -> None:
        self.bundle, weights = bundle, open_weights(bundle)
        self.contract: Contract = contract_for(bundle, steps=STEPS)
        engine = open_engine(threads=1)
        self.pipeline = LocalPipeline.make(engine, bundle, self.contract, (), TEXT, weights=weights)
        self.pipeline.train(1, STEPS)
        self.run = store_run(path, bundle, self.contract, self.pipeline.states(STEPS))

    def tensors(self) -> dict[str, np.ndarray]:
        return dict(final_tensors(self.run))

    def write(self, path: Path) -> None:
        write_trained_model(path, self.run)


def initialisers(path: Path) -> dict[str, np.ndarray]:
    model = onnx.load(path)
    return {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}


def test_model_holds_exactly_the_tensors_that_it_reads(tmp_path: Path) -> None:
    trained = Trained(tmp_path, reading_bundle())
    trained.write(tmp_path / "trained.onnx")
    held = initialisers(tmp_path / "trained.onnx")
    assert set(READ) <= set(held)
    assert not set(held) & ({t.name for t in trained.bundle.manifest.tensors} - set(READ))
    states = trained.pipeline.states(STEPS)
    np.testing.assert_array_equal(held["start.table"], states[0].tensors["start.table"])
    np.testing.assert_array_equal(held["mix1.mean"], states[2].running["mix1.mean"])
    assert np.abs(held["mix1.mean"]).max() > 0, "the running mean has moved"
    index = [t.name for t in trained.bundle.manifest.tensors].index("fixed.w")
    drawn = draw_tensor(trained.bundle.manifest, trained.contract.seed, index)
    np.testing.assert_array_equal(held["fixed.w"], drawn)


def test_runtime_computes_with_it(tmp_path: Path) -> None:
    trained = Trained(tmp_path, reading_bundle())
    path = tmp_path / "trained.onnx"
    trained.write(path)
    held = initialisers(path)
    tokens = np.arange(16, dtype=np.int64).reshape(2, 8)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"tokens": tokens})
    x = (held["start.table"][tokens] - held["mix1.mean"]) @ held["fixed.w"]
    np.testing.assert_allclose(logits, x @ held["start.table"].T, rtol=1e-4, atol=1e-5)


def test_frozen_tensor_comes_from_the_weights(tmp_path: Path) -> None:
    plain = reading_bundle()
    given = some_weights(plain, ("fixed.w",))
    trained = Trained(tmp_path, write_weighted(tmp_path / "weighted", plain, given))
    np.testing.assert_array_equal(trained.tensors()["fixed.w"], given["fixed.w"])
    trained.write(tmp_path / "trained.onnx")
    held = initialisers(tmp_path / "trained.onnx")
    np.testing.assert_array_equal(held["fixed.w"], given["fixed.w"])


def test_every_tensor_is_there_once_and_copies_are_equal(tmp_path: Path) -> None:
    trained = Trained(tmp_path, varied_bundle())
    names = [name for name, _ in final_tensors(trained.run)]
    assert sorted(names) == sorted(t.name for t in trained.bundle.manifest.tensors)
    tensors = trained.tensors()
    np.testing.assert_array_equal(tensors["start.table"], tensors["head.table"])


def test_damaged_sources_write_no_model(tmp_path: Path) -> None:
    plain = reading_bundle()
    bundle = write_weighted(tmp_path / "weighted", plain, some_weights(plain, ("fixed.w",)))
    trained = Trained(tmp_path, bundle)
    assert bundle.directory is not None
    path = bundle.directory / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x99")
    trained.run = dataclasses.replace(trained.run, weights=open_weights(bundle))
    with pytest.raises(BundleError, match="damaged"):
        trained.write(tmp_path / "trained.onnx")
    segment = (
        trained.run.directory.path / f"checkpoints/step-0000000{STEPS}/segment-0001.safetensors"
    )
    segment.write_bytes(segment.read_bytes()[:-1] + b"\x99")
    with pytest.raises(CheckpointError, match="damaged"):
        trained.write(tmp_path / "trained.onnx")
    assert not (tmp_path / "trained.onnx").exists()


def test_place_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    trained = Trained(tmp_path, tiny_bundle())
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match="cannot be written"):
        trained.write(tmp_path / "file" / "trained.onnx")
