"""The committed gpt-nano bundle takes weights, is causal and runs on this runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from p2ptrain.bundle.manifest import Manifest
from p2ptrain.bundle.protobuf import append_initialisers
from p2ptrain.bundle.reading import parse_manifest
from p2ptrain.training.random import draw_parameter

DIRECTORY = Path(__file__).resolve().parents[2] / "onnx_models" / "gpt-nano"


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    return parse_manifest((DIRECTORY / "manifest.json").read_bytes())


def test_its_inference_graph_takes_weights_and_is_causal(manifest: Manifest) -> None:
    check = pytest.importorskip("p2ptrain.graph.check")
    content = (DIRECTORY / "graphs" / f"{manifest.inference.graph}.onnx").read_bytes()
    drawn = ((t.name, draw_parameter(3, t, i)) for i, t in enumerate(manifest.tensors))
    session = check.session_of(b"".join(append_initialisers(content, drawn)))
    ids = np.arange(2 * 20, dtype=np.int64).reshape(2, 20)
    longer = session.run(["logits"], {"ids": ids})[0]
    shorter = session.run(["logits"], {"ids": ids[:, :9]})[0]
    assert longer.shape == (2, 20, 256)
    assert np.abs(longer[:, :9] - shorter).max() < 1e-5


def test_both_forms_give_the_same_first_loss(manifest: Manifest) -> None:
    check = pytest.importorskip("p2ptrain.graph.check")
    runners = pytest.importorskip("p2ptrain.graph.runner")
    measured = pytest.importorskip("p2ptrain.graph.measured")
    onnxruntime = pytest.importorskip("onnxruntime")
    files = {
        digest: (DIRECTORY / "graphs" / f"{digest}.onnx").read_bytes() for digest in manifest.graphs
    }
    runner = runners.Runner(manifest=manifest, files=files)
    generator = np.random.Generator(np.random.Philox(12))
    inputs = {n: generator.integers(0, 256, (3, 128)) for n in ("ids", "labels")}
    inputs["loss_weight"] = np.array(1.0 / (3 * 128), np.float32)
    masks = check.check_masks(manifest, inputs, masked=True)
    parameters = {t.name: draw_parameter(0, t, i) for i, t in enumerate(manifest.tensors)}
    forms = ["portable"]
    if onnxruntime.__version__.startswith("1.19"):
        forms.append("training")
    found = {
        form: runner.step(form=form, parameters=parameters, inputs=inputs, masks=masks)
        for form in forms
    }
    assert abs(float(found["portable"].loss) - np.log(256)) < 0.1
    reference = found["portable"].gradients
    for ran in found.values():
        assert abs(float(ran.loss) - float(found["portable"].loss)) < 1e-5
        exact = {name: value.astype(np.float64) for name, value in reference.items()}
        weights = {n: v for n, v in exact.items() if not n.endswith("key.bias")}
        assert measured.gradient_error(ran.gradients, weights)[0] < 1e-5
