"""The exporter on a tiny decoder: what the bundle holds, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from onnx_models.gpt import Gpt, gpt
from p2ptrain.bundle.manifest import FORMS
from p2ptrain.bundle.protobuf import append_initialisers
from p2ptrain.bundle.reading import check_manifest, parse_manifest
from p2ptrain.errors import BundleError, GraphError
from p2ptrain.graph.canonical import canonicalise
from p2ptrain.graph.check import check_masks, check_values, verify
from p2ptrain.graph.check_parts import settle_parts
from p2ptrain.graph.export import Bundle, export
from p2ptrain.graph.measured import gradient_error
from p2ptrain.graph.runner import Runner
from p2ptrain.graph.source import Source
from p2ptrain.graph.sources.requests import Request
from p2ptrain.graph.sources.torch_factory import module_source
from p2ptrain.graph.write import write_bundle
from p2ptrain.training.random import draw_parameter
from tools.export_model import main

pytestmark = pytest.mark.export


def test_equal_layer_norm_weights_are_not_merged(module: Gpt, source: Source) -> None:
    traced = replace(source.training, graph=source.training.graph.copy())
    names = {name for name, _ in module.named_parameters()}
    norms = [name for name in names if name.endswith("norm.weight")]
    assert len(norms) == 5  # all of them ones at this point
    assert set(traced.parameters) == names
    assert names <= set(traced.graph.inputs)
    canonicalise(traced.graph, data="ids")
    readers = traced.graph.readers()
    assert {name: len(readers[name]) for name in names} == dict.fromkeys(names, 1)


def test_segments_are_half_blocks_and_equal_ones_share_their_graphs(bundle: Bundle) -> None:
    manifest = bundle.manifest
    assert [segment.name for segment in manifest.segments] == [
        "embedding",
        "attention_0",
        "mlp_0",
        "attention_1",
        "mlp_1",
        "head",
    ]
    assert list(manifest.kinds) == ["embedding", "attention", "mlp", "head"]
    assert manifest.segments[1].kind == manifest.segments[3].kind == "attention"
    pairs = [pair for kind in manifest.kinds.values() for pair in kind.forms.values()]
    graphs = {digest for pair in pairs for digest in pair.graphs}
    rest = {*(rule.graph for rule in manifest.updates.values()), manifest.inference.graph}
    shared = {graph for mode in manifest.sharding.values() for graph in mode.graphs}
    assert set(bundle.files) == graphs | rest | shared == set(manifest.graphs)


def test_ports_masks_and_roles_follow_the_contract(bundle: Bundle) -> None:
    kinds = bundle.manifest.kinds
    assert [(p.value.name, p.role, p.differentiable) for p in kinds["embedding"].inputs] == [
        ("ids", "data", False)
    ]
    assert [(p.value.name, p.role) for p in kinds["head"].inputs] == [
        ("x", "boundary"),
        ("labels", "labels"),
        ("loss_weight", "loss_weight"),
    ]
    assert [(p.value.name, p.role, p.value.shape) for p in kinds["head"].outputs] == [
        ("loss", "loss", ())
    ]
    site = kinds["mlp"].masks[0]
    assert (site.value.shape, site.probability) == (("batch", "sequence", "30"), 0.25)


def test_shard_groups_name_heads_and_columns(bundle: Bundle) -> None:
    groups = {t.name.removeprefix("blocks.0."): t.shard for t in bundle.manifest.tensors}
    found = {n: (g.symbol, g.axis, g.block) for n, g in groups.items() if g and "blocks" not in n}
    assert found == {
        "attention.query.weight": ("heads", 0, 6),
        "attention.query.bias": ("heads", 0, 6),
        "attention.key.weight": ("heads", 0, 6),
        "attention.key.bias": ("heads", 0, 6),
        "attention.value.weight": ("heads", 0, 6),
        "attention.value.bias": ("heads", 0, 6),
        "attention.projection.weight": ("heads", 1, 6),
        "mlp.up.weight": ("columns", 0, 1),
        "mlp.up.bias": ("columns", 0, 1),
        "mlp.down.weight": ("columns", 1, 1),
    }


def test_flops_are_those_of_the_matrix_products(bundle: Bundle) -> None:
    mlp = bundle.manifest.kinds["mlp"]
    assert mlp.forward_flops == 2 * 16 * 30 * 120 * 2
    assert mlp.backward_flops == 2 * mlp.forward_flops
    attention = bundle.manifest.kinds["attention"]
    assert attention.forward_flops == 2 * 16 * 30 * 30 * 4 + 2 * 2 * 16 * 16 * 30
    assert attention.backward_flops == 2 * attention.forward_flops


def test_every_graph_is_valid_and_the_portable_form_is_standard(bundle: Bundle) -> None:
    portable = {
        digest
        for kind in bundle.manifest.kinds.values()
        for digest in kind.forms["portable"].graphs
    }
    portable |= {rule.graph for rule in bundle.manifest.updates.values()}
    portable.add(bundle.manifest.inference.graph)
    for digest, content in bundle.files.items():
        if digest == bundle.manifest.inference.graph:  # valid once it has its weights
            drawn = (
                (tensor.name, draw_parameter(0, tensor, index))
                for index, tensor in enumerate(bundle.manifest.tensors)
            )
            content = b"".join(append_initialisers(content, drawn))
        model = onnx.load_model_from_string(content)
        assert model.ir_version == 8
        assert {e.domain: e.version for e in model.opset_import}[""] == 18
        if digest in portable:
            assert {node.domain for node in model.graph.node} == {""}
            onnx.checker.check_model(model, full_check=True)


def test_no_size_that_sharding_changes_is_frozen(bundle: Bundle) -> None:
    for name in ("attention", "mlp"):
        pair = bundle.manifest.kinds[name].forms["portable"]
        for digest in pair.graphs:
            graph = onnx.load_model_from_string(bundle.files[digest]).graph
            for tensor in graph.initializer:
                if tensor.data_type == onnx.TensorProto.INT64:
                    values = set(onnx.numpy_helper.to_array(tensor).ravel().tolist())
                    assert not values & {5, 16, 30, 120}  # heads, sequence, width, columns


def test_verify_passes_and_a_spoilt_gradient_is_caught(source: Source, bundle: Bundle) -> None:
    rows = verify(source, bundle)
    assert len(rows) == 4 * 2 + 4
    assert max(row.error for row in rows) < 1e-5
    pair = bundle.manifest.kinds["mlp"].forms["portable"]
    model = onnx.load_model_from_string(bundle.files[pair.backward])
    spoilt = next(node for node in model.graph.node if node.op_type == "ReduceMean")
    spoilt.op_type = "ReduceMax"
    files = {**bundle.files, pair.backward: model.SerializeToString()}
    with pytest.raises(GraphError, match=r"gradients \(portable, open masks\)"):
        verify(source, Bundle(manifest=bundle.manifest, files=files))


def test_parts_of_a_backward_stay_only_where_their_bits_are_the_whole_ones(
    source: Source, bundle: Bundle
) -> None:
    assert settle_parts(source, bundle) is bundle
    parts = bundle.manifest.kinds["mlp"].forms["portable"].parts
    assert parts is not None
    model = onnx.load_model_from_string(bundle.files[parts.gradients])
    spoilt = next(node for node in model.graph.node if node.op_type == "ReduceSum")
    spoilt.op_type = "ReduceMax"
    files = {**bundle.files, parts.gradients: model.SerializeToString()}
    without = settle_parts(source, replace(bundle, files=files))
    pairs = [pair for kind in without.manifest.kinds.values() for pair in kind.forms.values()]
    assert all(pair.parts is None for pair in pairs)
    assert set(without.manifest.graphs) == set(without.files)
    assert len(without.files) == len(bundle.files) - 3 * 2  # none of the embedding
    check_manifest(without.manifest)


def test_a_shorter_sequence_runs_through_the_same_graphs(source: Source, bundle: Bundle) -> None:
    manifest = bundle.manifest
    short = replace(manifest, symbols=dict(manifest.symbols))
    short.symbols["sequence"] = replace(short.symbols["sequence"], size=7)
    inputs = {n: v[:, :7].copy() if v.ndim == 2 else v for n, v in source.example.items()}
    masks = check_masks(short, inputs, masked=True)
    values = check_values(source, short)
    runner = Runner(manifest=short, files=bundle.files)
    found = runner.step(form="portable", parameters=values, inputs=inputs, masks=masks)
    flat = [mask for segment in masks for mask in segment.values()]
    reference = source.reference.step(values, inputs, flat)
    assert abs(float(found.loss) - reference.loss) < 1e-6 * reference.loss
    assert gradient_error(found.gradients, reference.gradients)[0] < 1e-5


def test_microbatch_losses_and_gradients_add_up_to_the_minibatch(
    source: Source, bundle: Bundle
) -> None:
    manifest = bundle.manifest
    runner = Runner(manifest=manifest, files=bundle.files)
    parameters = {t.name: draw_parameter(1, t, i) for i, t in enumerate(manifest.tensors)}
    inputs = source.example
    masks = check_masks(manifest, inputs, masked=True)
    whole = runner.step(form="portable", parameters=parameters, inputs=inputs, masks=masks)
    loss, total = 0.0, {name: np.zeros_like(value) for name, value in whole.gradients.items()}
    for sample in range(3):
        part = slice(sample, sample + 1)
        alone = {n: v[part] if v.ndim else v for n, v in inputs.items()}
        held = [{n: m[part] for n, m in site.items()} for site in masks]
        one = runner.step(form="portable", parameters=parameters, inputs=alone, masks=held)
        loss += float(one.loss)
        total = {name: total[name] + value for name, value in one.gradients.items()}
    assert abs(loss - float(whole.loss)) < 1e-6
    exact = {n: v.astype(float) for n, v in whole.gradients.items()}
    assert gradient_error(total, exact)[0] < 1e-5


def test_without_dropout_there_are_no_masks() -> None:
    module = gpt(layers=1, width=16, heads=2, vocabulary=20, context=8, dropout=0.0)
    source = module_source(module, Request(name="dry"))
    bundle = export(source)
    assert all(not kind.masks for kind in bundle.manifest.kinds.values())
    assert max(row.error for row in verify(source, bundle)) < 1e-5


def test_tied_weights_become_a_copy_with_one_gradient() -> None:
    module = gpt(layers=2, width=16, heads=2, vocabulary=20, context=8)
    module.head.projection.weight = module.embedding.token.weight
    source = module_source(module, Request(name="tied"))
    assert "head.projection.weight" not in source.training.parameters
    bundle = export(source)
    owner = bundle.manifest.tensor("embedding.token.weight")
    copy = bundle.manifest.tensor("embedding.token.weight@head")
    assert (copy.tied_to, owner.tied_to) == (owner.name, None)
    assert copy.initialiser == owner.initialiser
    assert copy.shape == owner.shape
    assert max(row.error for row in verify(source, bundle)) < 1e-5


def test_bundle_that_a_peer_would_refuse_is_not_written(bundle: Bundle, tmp_path: Path) -> None:
    digest = bundle.manifest.inference.graph
    with pytest.raises(BundleError, match="inference graph: the graph's model has no graph"):
        write_bundle(tmp_path, replace(bundle, files={**bundle.files, digest: b""}), ())
    assert list(tmp_path.iterdir()) == []


def test_export_is_deterministic_and_written_whole(
    source: Source, bundle: Bundle, tmp_path: Path
) -> None:
    manifest = write_bundle(tmp_path, bundle, ())
    assert parse_manifest((tmp_path / "manifest.json").read_bytes()).digest == manifest.digest
    stray = tmp_path / "graphs" / f"{'0' * 64}.onnx"
    stray.write_bytes(b"old")
    write_bundle(tmp_path, bundle, ())
    assert {path.stem for path in (tmp_path / "graphs").iterdir()} == set(bundle.files)
    assert export(source).manifest == bundle.manifest


def test_the_tool_writes_a_bundle_and_reports_it(tmp_path: Path) -> None:
    arguments = ["--model", "onnx_models.gpt:gpt", "--name", "mini", "--json"]
    sizes = {"layers": 1, "width": 16, "heads": 2, "vocabulary": 20, "context": 8}
    for name, value in sizes.items():
        arguments += ["--arg", f"{name}={value}"]
    result = CliRunner().invoke(main, [*arguments, "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    manifest = parse_manifest((tmp_path / "manifest.json").read_bytes())
    assert report["digest"] == manifest.digest
    assert set(manifest.kinds["mlp"].forms) == set(FORMS)
    assert 0 < max(manifest.checks.values()) < 1e-5


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("onnx_models.gpt", "is not MODULE:FUNCTION"),
        ("onnx_models.gpt:nothing", "nothing"),
        ("no_such_module:gpt", "no_such_module"),
    ],
)
def test_the_tool_refuses_what_it_cannot_import(model: str, said: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = CliRunner().invoke(main, ["--model", model, "--name", "x", "--out", str(out)])
    assert result.exit_code == 2
    assert said in result.stderr
    assert "hint" in result.stderr
    assert not out.exists()
