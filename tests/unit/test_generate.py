"""Choosing bytes from logits, and writing with a real ONNX file on the real engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from p2ptrain.bundle.manifest import DataSection, Inference, Loss, Manifest, Symbol, Value
from p2ptrain.demo.generate import Sampling, pick, write_text
from p2ptrain.errors import EngineError, NotFound, NumericsError
from p2ptrain.ids import Digest

CONTEXT = 4


def manifest() -> Manifest:
    """Only what writing needs: the shapes of inference and the context."""
    return Manifest(
        name="successor",
        task="language-modelling",
        description="",
        symbols={"batch": Symbol(kind="batch", size=None)},
        graphs={},
        kinds={},
        segments=(),
        tensors=(),
        updates={},
        inference=Inference(
            graph=Digest("0" * 64),
            inputs=(Value(name="tokens", shape=("batch", str(CONTEXT)), dtype="int64"),),
            output=Value(name="logits", shape=("batch", str(CONTEXT), "256"), dtype="float32"),
        ),
        data=DataSection(
            kind="windows", tokenizer="bytes", vocabulary=256, context=CONTEXT,
            sampling="philox-1",
        ),
        loss=Loss(kind="cross-entropy"),
        golden_parameters=Digest("0" * 64),
    )  # fmt: skip


def successor_model(path: Path, *, strength: float = 100.0) -> Path:
    """A model whose next byte always is the present one plus one."""
    table = np.roll(np.eye(256, dtype=np.float32) * np.float32(strength), 1, axis=1)
    graph = helper.make_graph(
        [helper.make_node("Gather", ["table", "tokens"], ["logits"])],
        "successor",
        [helper.make_tensor_value_info("tokens", TensorProto.INT64, ["batch", CONTEXT])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", CONTEXT, 256])],
        [numpy_helper.from_array(table, "table")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.save(model, path)
    return path


def test_written_text_follows_the_model_beyond_its_context(tmp_path: Path) -> None:
    model = successor_model(tmp_path / "m.onnx")
    sampling = Sampling(prompt=b"ab", count=10)
    assert write_text(model, manifest(), sampling) == "abcdefghijkl"


def test_written_text_repeats_with_its_seed(tmp_path: Path) -> None:
    model = successor_model(tmp_path / "m.onnx", strength=1.0)
    texts = [
        write_text(model, manifest(), Sampling(prompt=b"a", count=20, seed=seed))
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]
    assert all(c.isprintable() or c == "\n" for c in texts[2])


@pytest.mark.parametrize(
    ("draw", "expected"), [(0.0, 0), (0.2499, 0), (0.2501, 1), (0.9999, 3), (1.0, 3)]
)
def test_pick_splits_the_unit_interval_by_probability(draw: float, expected: int) -> None:
    logits_V = np.zeros(4, dtype=np.float32)
    assert pick(logits_V, draw, temperature=1.0) == expected


def test_low_temperature_picks_the_largest() -> None:
    logits_V = np.array([0.0, 1.0, 0.5], dtype=np.float32)
    assert {pick(logits_V, draw, 1e-3) for draw in (0.0, 0.5, 0.999)} == {1}


def test_pick_refuses_logits_that_are_not_finite() -> None:
    with pytest.raises(NumericsError):
        pick(np.array([0.0, np.nan], dtype=np.float32), 0.5, 1.0)


def test_missing_and_damaged_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        write_text(tmp_path / "absent", manifest(), Sampling(prompt=b"a", count=1))
    (tmp_path / "damaged").write_bytes(b"not onnx")
    with pytest.raises(EngineError):
        write_text(tmp_path / "damaged", manifest(), Sampling(prompt=b"a", count=1))


@pytest.mark.parametrize("change", [{"prompt": b""}, {"count": -1}, {"temperature": 0.0}])
def test_sampling_is_valid_by_construction(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="sampling needs"):
        Sampling(**{"prompt": b"a", "count": 1, **change})  # type: ignore[arg-type] # bad on purpose
