"""Fine-tuning: adapters and frozen parameters from a folder of weights to a folder of weights."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import nn

from onnx_models.gpt import gpt
from onnx_models.llama import llama
from p2ptrain.bundle.manifest import FORMS, Manifest
from p2ptrain.errors import ConfigError
from p2ptrain.graph.export import export
from p2ptrain.graph.fine_tuning import FineTuning, Lora
from p2ptrain.graph.source import LOGITS, Source
from p2ptrain.graph.sources.hugging_face import folder_source
from p2ptrain.graph.sources.requests import Request
from p2ptrain.graph.sources.torch_factory import module_source
from p2ptrain.runtime.home.trained_model import write_trained_model, write_trained_safetensors
from p2ptrain.runtime.home.trained_weights import TrainedRun
from p2ptrain.store.bundles import Bundle, load_bundle
from p2ptrain.training.layout import flat_layout
from tests.export.fine_tuned import train, tuned_bundle
from tools.export_model import main

pytestmark = pytest.mark.export

TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 60,
    "max_position_embeddings": 12,
}


UP_PARTS = ("up.weight", "up.lora_down", "up.lora_up")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model of transformers, what is tuned of it, and where its adapters are."""

    config: transformers.PretrainedConfig
    auto: Any  # Any: one of transformers' factories
    task: str
    tuning: FineTuning
    adapted: int


CASES = {
    "bert": Case(
        config=transformers.BertConfig(**TEXT, num_labels=3),
        auto=transformers.AutoModelForSequenceClassification,
        task="sequence-classification",
        tuning=FineTuning(
            lora=Lora(rank=2, alpha=4.0, targets=("query", "value")), train=("classifier",)
        ),
        adapted=6,
    ),
    "gpt2": Case(
        config=transformers.GPT2Config(
            n_embd=32, n_layer=3, n_head=4, vocab_size=60, n_positions=12
        ),
        auto=transformers.AutoModelForCausalLM,
        task="language-modelling",
        tuning=FineTuning(lora=Lora(rank=3, alpha=3.0, targets=("all",))),
        adapted=12,
    ),
    "llama": Case(
        config=transformers.LlamaConfig(**TEXT, num_key_value_heads=2),
        auto=transformers.AutoModelForCausalLM,
        task="language-modelling",
        tuning=FineTuning(
            lora=Lora(rank=4, alpha=8.0, targets=("q_proj", "v_proj", "down_proj")),
            train=("*layernorm*",),
        ),
        adapted=9,
    ),
    "bert-frozen": Case(
        config=transformers.BertConfig(**TEXT, num_labels=3),
        auto=transformers.AutoModelForSequenceClassification,
        task="sequence-classification",
        tuning=FineTuning(freeze=("embeddings", "layer.0")),
        adapted=0,
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """A case after export, five steps and writing what came out."""

    case: Case
    folder: Path
    source: Source
    bundle: Bundle
    errors: dict[str, float]
    run: TrainedRun
    losses: list[float]


@pytest.fixture(scope="module", params=list(CASES))
def tuned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    case, path = CASES[request.param], tmp_path_factory.mktemp(request.param)
    torch.manual_seed(4)
    folder = path / "model"
    case.auto.from_config(case.config).save_pretrained(folder)
    source = folder_source(folder, Request(name="tuned", task=case.task))
    bundle, rows = tuned_bundle(path / "bundle", source, case.tuning)
    run, losses = train(path / "run", bundle, source)
    return Tuned(
        case=case, folder=folder, source=source, bundle=bundle,
        errors={row.name: row.error for row in rows}, run=run, losses=losses,
    )  # fmt: skip


def logits_of(session_file: Path, source: Source) -> np.ndarray:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(session_file), providers=["CPUExecutionProvider"])
    feeds = {entry.name: source.example[entry.name] for entry in session.get_inputs()}
    found: np.ndarray = session.run([LOGITS], feeds)[0]
    return found


def trainable(manifest: Manifest) -> set[str]:
    return {t.name for t in manifest.tensors if t.binding == "trainable"}


def test_the_bundle_matches_its_model(tuned: Tuned) -> None:
    assert max(tuned.errors.values()) < 1e-5
    adapters = [t.adapter for t in tuned.bundle.manifest.tensors if t.adapter is not None]
    assert len(adapters) == tuned.case.adapted
    assert {a.transposed for a in adapters} <= {tuned.case.config.model_type == "gpt2"}


def test_only_what_is_trained_has_gradients_state_and_traffic(tuned: Tuned) -> None:
    manifest = tuned.bundle.manifest
    frozen = {t.name for t in manifest.tensors if t.binding == "frozen"}
    assert frozen >= set(tuned.case.tuning.frozen(tuned.source.training.parameters))
    for kind in manifest.kinds.values():
        segment = next(s for s in manifest.segments if s.kind == kind.name)
        for form in FORMS:
            model = onnx.load_model_from_string(tuned.bundle.graph(kind.forms[form].backward))
            made = {v.name for v in model.graph.output if v.name.startswith("gradient.")}
            wanted = {n for n, tensor in segment.parameters.items() if tensor not in frozen}
            assert made == {f"gradient.{name}" for name in wanted}
    places = [
        place.tensor.name
        for index in range(len(manifest.segments))
        for place in flat_layout(manifest, index).places
    ]
    assert set(places) == trainable(manifest)
    saved = [tuned.run.directory.read_segment(5, s) for s in tuned.run.checkpoint.segments]
    elements = sum(manifest.tensor(name).elements for name in places)
    assert sum(map(len, saved)) < 3 * 4 * elements + 4096 * len(saved)
    assert elements < manifest.parameter_count


def test_blocks_still_share_their_graphs(tuned: Tuned) -> None:
    manifest = tuned.bundle.manifest
    assert len(manifest.kinds) < len(manifest.segments)


def test_five_steps_lower_the_loss_and_leave_the_frozen(tuned: Tuned) -> None:
    assert tuned.losses[-1] < tuned.losses[0]
    path = tuned.folder.parent / "after.safetensors"
    write_trained_safetensors(path, tuned.run)
    before, after = load_file(tuned.folder / "model.safetensors"), load_file(path)
    assert set(after) == set(before)
    manifest = tuned.bundle.manifest
    moved = trainable(manifest) | {t.name for t in manifest.tensors if t.adapter is not None}
    for name, value in before.items():
        assert torch.equal(after[name], value) == (name not in moved), name


def test_transformers_loads_what_was_trained(tuned: Tuned, tmp_path: Path) -> None:
    shutil.copy(tuned.folder / "config.json", tmp_path / "config.json")
    write_trained_safetensors(tmp_path / "model.safetensors", tuned.run)
    write_trained_model(tmp_path / "trained.onnx", tuned.run)
    model, found = tuned.case.auto.from_pretrained(
        tmp_path, local_files_only=True, output_loading_info=True
    )
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    given = {n: torch.from_numpy(tuned.source.example[n]) for n in tuned.source.data_inputs}
    with torch.no_grad():
        wanted = model.eval()(**given).logits.numpy()
    found_logits = logits_of(tmp_path / "trained.onnx", tuned.source)
    assert np.abs(found_logits - wanted).max() < 1e-5 * max(1.0, np.abs(wanted).max())


def test_torch_loads_the_file_strictly(tmp_path: Path) -> None:
    module = gpt(layers=2, width=16, heads=2, vocabulary=20, context=8, dropout=0.1)
    source = module_source(module, Request(name="small"))
    tuning = FineTuning(freeze=("embedding",))
    bundle, _ = tuned_bundle(tmp_path / "bundle", source, tuning)
    run, losses = train(tmp_path / "run", bundle, source)
    assert losses[-1] < losses[0]
    write_trained_safetensors(tmp_path / "model.safetensors", run)
    write_trained_model(tmp_path / "trained.onnx", run)
    module.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    with torch.no_grad():
        wanted = module.eval()(torch.from_numpy(source.example["ids"])).numpy()
    found = logits_of(tmp_path / "trained.onnx", source)
    assert np.abs(found - wanted).max() < 1e-5 * max(1.0, np.abs(wanted).max())


def test_an_embedding_tied_to_the_head_is_refused() -> None:
    config = CASES["gpt2"].config
    module = transformers.GPT2LMHeadModel._from_config(config, attn_implementation="eager")
    assert module.lm_head.weight is module.transformer.wte.weight
    small = gpt(layers=1, width=16, heads=2, vocabulary=20, context=8)
    small.head.projection.weight = small.embedding.token.weight
    source = module_source(small, Request(name="tied"))
    names = frozenset(source.training.parameters)
    with pytest.raises(ConfigError, match="is tied: Gather reads it as well as a linear"):
        export(source, frozen=names, lora=Lora(rank=2, alpha=2.0, targets=("token",)))


def test_a_matrix_of_two_blocks_has_one_adapter(tmp_path: Path) -> None:
    module = gpt(layers=2, width=16, heads=2, vocabulary=20, context=8, dropout=0.1)
    module.blocks[1].mlp.up.weight = module.blocks[0].mlp.up.weight
    source = module_source(module, Request(name="shared"))
    tuning = FineTuning(lora=Lora(rank=2, alpha=4.0, targets=("up",)))
    bundle, rows = tuned_bundle(tmp_path / "bundle", source, tuning)
    assert max(row.error for row in rows) < 1e-5
    tied = {t.name: t.tied_to for t in bundle.manifest.tensors if t.tied_to is not None}
    assert set(tied.values()) == {f"blocks.0.mlp.{name}" for name in UP_PARTS}
    run, losses = train(tmp_path / "run", bundle, source)
    assert losses[-1] < losses[0]
    write_trained_safetensors(tmp_path / "model.safetensors", run)
    write_trained_model(tmp_path / "trained.onnx", run)
    after = load_file(tmp_path / "model.safetensors")
    assert set(after) == set(dict(module.named_parameters()))
    module.load_state_dict({**after, "blocks.1.mlp.up.weight": after["blocks.0.mlp.up.weight"]})
    with torch.no_grad():
        wanted = module.eval()(torch.from_numpy(source.example["ids"])).numpy()
    found = logits_of(tmp_path / "trained.onnx", source)
    assert np.abs(found - wanted).max() < 1e-5 * max(1.0, np.abs(wanted).max())


@pytest.mark.parametrize("make", [gpt, llama])
def test_one_block_with_adapters_everywhere_is_cut_as_without(
    make: Callable[..., nn.Module], tmp_path: Path
) -> None:
    source, tuning = small(make), FineTuning(lora=Lora(rank=2, alpha=4.0, targets=("all",)))
    plain = export(source).manifest
    bundle, rows = tuned_bundle(tmp_path / "bundle", source, tuning)
    assert [s.name for s in bundle.manifest.segments] == [s.name for s in plain.segments]
    assert max(row.error for row in rows) < 1e-5


@pytest.mark.parametrize("make", [gpt, llama])
def test_an_adapter_stays_beside_its_matrix_however_fine_the_cuts(
    make: Callable[..., nn.Module],
) -> None:
    source, tuning = small(make), FineTuning(lora=Lora(rank=2, alpha=4.0, targets=("all",)))
    frozen = frozenset(tuning.frozen(source.training.parameters))
    bundle = export(source, frozen=frozen, lora=tuning.lora, segments=30)
    manifest = bundle.manifest
    assert len(manifest.segments) > 6
    places = {name: s.name for s in manifest.segments for name in s.parameters.values()}
    adapted = {t.name: t.adapter for t in manifest.tensors if t.adapter is not None}
    assert len(adapted) >= 7
    for name, adapter in adapted.items():
        assert places[name] == places[adapter.down] == places[adapter.up]


@functools.cache
def small(make: Callable[..., nn.Module]) -> Source:
    """A decoder of one block, traced once for all tests."""
    more = {"groups": 3, "columns": 32} if make is llama else {"dropout": 0.0}
    torch.manual_seed(5)
    module = make(layers=1, width=24, heads=6, vocabulary=40, context=12, **more)
    return module_source(module, Request(name="small"))


def tool(folder: Path, out: Path, *options: str) -> Any:  # Any: click's result
    line = ["--model", str(folder), "--name", "tuned", "--out", str(out), "--json", *options]
    return CliRunner().invoke(main, line)


def test_the_tool_tunes_a_folder(tmp_path: Path) -> None:
    case, folder = CASES["bert"], tmp_path / "model"
    case.auto.from_config(case.config).save_pretrained(folder)
    lora = ("--lora", "r=2,alpha=4,targets=query,value", "--train", "classifier")
    result = tool(folder, tmp_path / "out", "--task", case.task, *lora)
    assert result.exit_code == 0, result.output
    manifest = load_bundle(tmp_path / "out").manifest
    report = json.loads(result.stdout)
    wanted = sum(t.elements for t in manifest.tensors if t.binding == "trainable")
    assert report["trained"] == wanted < report["parameters"]
    assert (tmp_path / "out" / "weights.safetensors").is_file()
    assert {t.name.rpartition(".")[2] for t in manifest.tensors if t.binding == "trainable"} == {
        "lora_down",
        "lora_up",
        "weight",
        "bias",
    }


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--freeze", "nothing.like.it"), "--freeze: no parameter's name fits"),
        (("--lora", "r=2"), "--lora needs r and targets"),
        (("--lora", "r=2,targets=word_embeddings"), "is read by Gather, not by a linear"),
    ],
)
def test_the_tool_refuses_what_cannot_be_tuned(
    options: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    case, folder = CASES["bert"], tmp_path / "model"
    case.auto.from_config(case.config).save_pretrained(folder)
    result = tool(folder, tmp_path / "out", "--task", case.task, *options)
    assert result.exit_code == 2
    assert said in result.stderr
    assert not (tmp_path / "out").exists()
