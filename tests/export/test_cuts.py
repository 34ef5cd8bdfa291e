"""Where models of different shapes are cut, and that the chain still equals the module."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from p2ptrain.bundle.manifest import Port
from p2ptrain.errors import ConfigError
from p2ptrain.graph.check import verify
from p2ptrain.graph.export import Bundle, export
from p2ptrain.graph.source import Source
from p2ptrain.graph.sources.requests import Request

pytestmark = pytest.mark.export
torch = pytest.importorskip("torch")


@cache
def source_of(name: str) -> Source:
    """A traced model, once for all tests."""
    from onnx_models import mlp, mobilenet, vit
    from p2ptrain.graph.sources.torch_factory import module_source
    from tests.export import models

    modules = {
        "mlp": lambda: mlp.mlp(input_shape=(1, 8, 8), widths=(48, 32, 24)),
        "vit": lambda: vit.vit(layers=2, width=24, heads=3, side=8),
        "mobilenet": lambda: mobilenet.mobilenet(side=8, width=0.25),
        "rotary": lambda: models.Rotary(layers=3, width=32, heads=4, groups=2),
        "resnet": models.ResNet,
        "lstm": lambda: models.Recurrent("LSTM"),
        "gru": lambda: models.Recurrent("GRU"),
        "encoder-decoder": models.EncoderDecoder,
    }
    images = {"mlp", "vit", "mobilenet", "resnet"}
    torch.manual_seed(0)
    task = "image-classification" if name in images else None
    return module_source(modules[name](), Request(name=name, task=task))


@cache
def bert_source() -> Source:
    """The encoder with its mask and token types."""
    from onnx_models.bert import bert
    from p2ptrain.graph.sources.inputs import Input
    from p2ptrain.graph.sources.tasks import Text, choose_task
    from p2ptrain.graph.sources.torch_model import TorchModel
    from p2ptrain.graph.sources.torch_source import About, torch_source

    names = {"input_ids": 40, "attention_mask": 2, "token_type_ids": 2}
    inputs = {
        name: Input(
            name=name,
            dtype="int64",
            axes=("batch", "sequence"),
            high=high,
            is_padding_mask=name == "attention_mask",
        )
        for name, high in names.items()
    }
    torch.manual_seed(0)
    module = bert(layers=3, width=24, heads=3, vocabulary=40, context=12)
    task = choose_task("sequence-classification", loss=None, label_smoothing=0.0)
    model = TorchModel(module=module, inputs=inputs)
    return torch_source(
        model, task, Request(name="bert"), About(text=Text(vocabulary=40, context=12))
    )


def kinds_of(bundle: Bundle) -> list[str]:
    return [segment.kind for segment in bundle.manifest.segments]


def alike(bundle: Bundle) -> list[int]:
    """Each segment as the number of its kind, by first appearance."""
    kinds = kinds_of(bundle)
    seen = list(dict.fromkeys(kinds))
    return [seen.index(kind) for kind in kinds]


def assert_equals_torch(source: Source, bundle: Bundle) -> None:
    rows = verify(source, bundle)
    assert max(row.error for row in rows if row.name.startswith("gradients")) < 1e-5


CHAINS = {
    "mlp": [0, 1, 2, 3],
    "vit": [0, 1, 2, 1, 2, 3],
    "rotary": [0, 1, 2, 1, 2, 1, 2, 3],
    "resnet": [0, 1, 1, 1, 2, 3, 3, 4],
    "lstm": [0, 1, 2, 3],
    "gru": [0, 1, 2, 3],
}


@pytest.mark.parametrize("name", CHAINS)
def test_chain_has_the_expected_kinds_and_equals_torch(name: str) -> None:
    source = source_of(name)
    bundle = export(source)
    assert alike(bundle) == CHAINS[name]
    assert all(len(row.values) == 1 for row in bundle.cuts.rows[:-1])
    assert_equals_torch(source, bundle)


def test_inverted_bottlenecks_are_cut_where_they_are_narrow() -> None:
    bundle = export(source_of("mobilenet"))
    crossing = [bundle.manifest.boundary(i) for i in range(len(bundle.manifest.segments) - 1)]
    narrow = {8, 16, 24, 40, 80, 1280}  # no expanded one
    assert {int(values[0].shape[1]) for values in crossing} <= narrow
    assert 10 < len(bundle.manifest.segments) < 22
    assert any("bytes cross it" in note for note in bundle.cuts.notes)


def test_data_for_masks_travels_without_a_cotangent() -> None:
    source = bert_source()
    bundle = export(source)
    assert alike(bundle) == [0, 1, 2, 1, 2, 1, 2, 3]
    kinds = bundle.manifest.kinds

    def told(ports: tuple[Port, ...]) -> list[tuple[str, str, bool]]:
        return [(p.value.name, p.value.dtype, p.differentiable) for p in ports]

    both = [("x", "float32", True), ("x1", "int64", False)]
    assert told(kinds["attention"].inputs) == told(kinds["mlp"].inputs) == both
    assert told(kinds["embedding"].outputs) == [("y", "float32", True), ("y1", "int64", False)]
    assert [p.value.name for p in kinds["embedding"].inputs] == list(source.data_inputs)
    assert_equals_torch(source, bundle)


def test_frozen_layers_have_no_gradients_and_ask_for_no_cotangents() -> None:
    source = bert_source()
    below = ("embedding.", "blocks.0.", "blocks.1.attention.")
    frozen = frozenset(n for n in source.training.parameters if n.startswith(below))
    bundle = export(source, frozen=frozen)
    manifest = bundle.manifest
    assert {t.name for t in manifest.tensors if t.binding == "frozen"} == frozen
    trained = [
        any(manifest.tensor(name).binding == "trainable" for name in segment.parameters.values())
        for segment in manifest.segments
    ]
    assert trained == [False] * 4 + [True] * 4
    flows = [manifest.kinds[s.kind].inputs[0].differentiable for s in manifest.segments]
    assert flows == [False] * 5 + [True] * 3  # the first trained segment needs none either
    assert alike(bundle) == [0, 1, 2, 1, 3, 4, 5, 6]
    assert_equals_torch(source, bundle)


def test_running_values_are_state_and_evaluation_has_its_own_graph() -> None:
    bundle = export(source_of("resnet"))
    manifest = bundle.manifest
    running = {t.name: t.initialiser.kind for t in manifest.tensors if t.binding == "running"}
    assert running["stem.1.running_mean"] == "zeros"
    assert running["stem.1.running_var"] == "ones"
    assert len(running) == 2 * (1 + 2 * 6)
    has = {name: kind.evaluation is not None for name, kind in manifest.kinds.items()}
    assert has == {name: bool(kind.running) for name, kind in manifest.kinds.items()}
    assert has["head"] is False


def test_tied_weights_cross_and_grouped_heads_have_no_shards() -> None:
    manifest = export(source_of("rotary")).manifest
    copies = [t for t in manifest.tensors if t.tied_to]
    assert [(t.name, t.tied_to) for t in copies] == [("embedding.weight@head", "embedding.weight")]
    assert "heads" not in manifest.symbols


def test_memory_that_every_block_reads_crosses_every_cut() -> None:
    source = source_of("encoder-decoder")
    bundle = export(source)
    inner = [row for row in bundle.cuts.rows if len(row.values) == 2]
    assert len(inner) >= 2
    assert_equals_torch(source, bundle)


def test_named_cuts_are_made_there_and_nowhere_else() -> None:
    source = source_of("vit")
    bundle = export(source, cuts=("blocks.0.mlp.activation", "blocks.1.attention.query"))
    rows = bundle.cuts.rows
    assert [len(row.values) for row in rows] == [2, 3, 0]
    assert rows[0].reason == "asked for as 'blocks.0.mlp.activation'"
    assert [p.value.name for p in bundle.manifest.kinds[rows[1].kind].outputs] == ["y", "y1", "y2"]
    assert_equals_torch(source, bundle)


@pytest.mark.parametrize(("count", "made"), [(1, 1), (3, 3), (11, 11)])
def test_segments_are_as_many_as_asked_for_and_even(count: int, made: int) -> None:
    source = source_of("vit")
    bundle = export(source, segments=count)
    assert len(bundle.manifest.segments) == made
    work = [row.flops for row in bundle.cuts.rows]
    assert max(work) <= 2.5 * sum(work) / made
    if count == 11:
        assert_equals_torch(source, bundle)


@pytest.mark.parametrize("name", ["blocks.9", "head.classifier"])
def test_cut_that_cannot_be_made_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        export(source_of("vit"), cuts=(name, "blocks.0"))


def test_cuts_and_segments_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="--segments"):
        export(source_of("vit"), cuts=("blocks.0",), segments=2)


def test_freezing_what_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="no parameter 'nothing'"):
        export(source_of("vit"), frozen=frozenset({"nothing"}))


def test_report_counts_the_bytes_that_cross() -> None:
    bundle = export(source_of("vit"))
    manifest = bundle.manifest
    for index, row in enumerate(bundle.cuts.rows[:-1]):
        assert row.bytes == manifest.boundary_bytes(index, batch=1)
        assert row.flops == manifest.kinds[row.kind].forward_flops
    tokens = 2 * 2 + 1
    assert np.unique([row.bytes for row in bundle.cuts.rows[:-1]]).tolist() == [4 * tokens * 24]
