"""Whole models through the exporter: every family exports, agrees with its source, and trains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from p2ptrain.graph.check import verify
from p2ptrain.graph.export import export
from p2ptrain.graph.sources.hugging_face import folder_source
from p2ptrain.graph.sources.requests import Request
from p2ptrain.graph.sources.torch_factory import factory_source

pytestmark = pytest.mark.export

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
TEXT = {**SMALL, "vocab_size": 60, "max_position_embeddings": 12}
IMAGES = "image-classification"
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": (
        "language-modelling",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 60, "n_positions": 12},
    ),
    "llama": ("language-modelling", {**TEXT, "num_key_value_heads": 2}),
    "bert": ("sequence-classification", {**TEXT, "num_labels": 5}),
    "vit": (IMAGES, {**SMALL, "image_size": 16, "patch_size": 4, "num_labels": 5}),
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_family_exports_and_agrees_with_its_model(kind: str, tmp_path: Path) -> None:
    task, fields = MODELS[kind]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, **fields}))
    source = folder_source(tmp_path, Request(name=kind, task=task))
    bundle = export(source)
    rows = {row.name: row.error for row in verify(source, bundle)}
    assert rows["adamw, 3 steps"] < 1e-5
    assert max(rows.values()) < 1e-5
    assert len(bundle.manifest.segments) >= 2


def test_an_encoder_of_bytes_exports_with_its_special_tokens() -> None:
    arguments = {"layers": 2, "width": 32, "heads": 4, "context": 12, "classes": 3}
    request = Request(name="encoder", task="sequence-classification", arguments=arguments)
    source = factory_source("onnx_models.bert:bert", request)
    bundle = export(source)
    assert max(row.error for row in verify(source, bundle)) < 1e-5
    manifest = bundle.manifest
    assert manifest.data.special_tokens == {"pad": 256, "cls": 257, "sep": 258}
