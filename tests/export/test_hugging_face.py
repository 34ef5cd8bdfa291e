"""Hugging Face configurations and folders as sources: traces, weights, tokenizers, errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file

from p2ptrain.errors import ConfigError
from p2ptrain.graph.source import Source
from p2ptrain.graph.sources.hugging_face import folder_source
from p2ptrain.graph.sources.requests import Request
from tests.export.configurations import TEXT, Family, write
from tests.export.sources import assert_traced_as_the_module

pytestmark = pytest.mark.export

CASES = [
    ("gpt2", "language-modelling", 7),
    ("llama", "language-modelling", 0),
    ("bert", "sequence-classification", 8),
    ("bert", "masked-language-modelling", 7),
    ("bert", "token-classification", 8),
    ("bert", "regression", 8),
    ("vit", "image-classification", 0),
    ("mobilenet_v2", "image-classification", 1),
    ("resnet", "image-classification", 0),
]


@pytest.mark.parametrize(("kind", "task", "dropouts"), CASES)
def test_the_trace_is_the_model(kind: str, task: str, dropouts: int, family: Family) -> None:
    source = family(kind, task)
    assert source.task == task
    assert_traced_as_the_module(source, dropouts=dropouts)


@pytest.fixture(scope="module")
def weighted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier with weights, class names and a tokenizer, as transformers saves it."""
    folder = tmp_path_factory.mktemp("bert")
    names = {0: "calm", 1: "loud", 2: "silent"}
    config = transformers.BertConfig(**TEXT, num_labels=3, id2label=names)
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdef"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = {"model": {"type": "WordPiece", "vocab": vocabulary}, "added_tokens": []}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    roles = {"pad_token": "[PAD]", "unk_token": "[UNK]", "mask_token": {"content": "[MASK]"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(roles))
    return folder


@pytest.fixture(scope="module")
def classifier(weighted: Path) -> Source:
    return folder_source(weighted, Request(name="classifier"))


def test_a_folder_says_its_task_weights_names_and_tokens(
    classifier: Source, weighted: Path
) -> None:
    assert classifier.task == "sequence-classification"
    data = classifier.data
    assert (data.kind, data.classes, data.context) == ("texts", 3, 12)
    assert data.class_names == ("calm", "loud", "silent")
    assert data.special_tokens == {"pad": 0, "unknown": 1, "mask": 4}
    assert classifier.files["tokenizer.json"] == (weighted / "tokenizer.json").read_bytes()
    saved = load_file(weighted / "model.safetensors")
    assert set(saved) == set(classifier.weights) == set(classifier.training.parameters)
    for name, value in saved.items():
        assert (classifier.weights[name] == value).all()
    assert classifier.data_inputs == ("input_ids", "attention_mask", "token_type_ids")


def test_half_precision_weights_become_float32(weighted: Path, tmp_path: Path) -> None:
    copied = _copied(weighted, tmp_path)
    halved = {n: v.astype(np.float16) for n, v in load_file(weighted / "model.safetensors").items()}
    save_file(halved, copied / "model.safetensors", metadata={"format": "pt"})
    source = folder_source(copied, Request(name="half"))
    assert {value.dtype for value in source.weights.values()} == {np.dtype(np.float32)}
    for name, value in halved.items():
        assert (source.weights[name] == value.astype(np.float32)).all()


def test_a_new_head_is_drawn_and_the_rest_is_kept(weighted: Path, tmp_path: Path) -> None:
    folder = _copied(weighted, tmp_path)
    values = load_file(folder / "model.safetensors")
    for name in ("classifier.weight", "classifier.bias"):
        del values[name]
    save_file(values, folder / "model.safetensors", metadata={"format": "pt"})
    source = folder_source(folder, Request(name="new"))
    drawn = set(source.training.parameters) - set(source.weights)
    assert drawn == {"classifier.weight", "classifier.bias"}


def test_a_pooler_that_pretraining_never_had_is_drawn(tmp_path: Path) -> None:
    config = transformers.BertConfig(**TEXT)
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path)
    source = folder_source(tmp_path, Request(name="tuned", task="sequence-classification"))
    drawn = set(source.training.parameters) - set(source.weights)
    assert drawn == {
        *(f"bert.pooler.dense.{part}" for part in ("weight", "bias")),
        *(f"classifier.{part}" for part in ("weight", "bias")),
    }
    values = load_file(tmp_path / "model.safetensors")
    del values["bert.encoder.layer.1.output.dense.bias"]
    save_file(values, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"no 'bert.encoder.layer.1.output.dense.bias' \(1 "):
        folder_source(tmp_path, Request(name="lost", task="sequence-classification"))


def test_weights_can_be_left_out(weighted: Path) -> None:
    source = folder_source(weighted, Request(name="drawn", use_weights=False))
    assert source.weights == {}
    assert set(source.training.parameters) <= set(source.initialisers)


def test_tied_weights_are_one_parameter(family: Family) -> None:
    source = family("gpt2", "language-modelling")
    assert "lm_head.weight" not in source.training.parameters
    readers = source.training.graph.readers()["transformer.wte.weight"]
    assert len(readers) == 2


def _copied(folder: Path, target: Path) -> Path:
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def _without_a_tensor(folder: Path) -> None:
    values = load_file(folder / "model.safetensors")
    del values["bert.embeddings.word_embeddings.weight"]
    save_file(values, folder / "model.safetensors", metadata={"format": "pt"})


def _with_another_shape(folder: Path) -> None:
    document = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**document, "vocab_size": 61}))


def _cut_short(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def _broken_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("[")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_without_a_tensor, "no 'bert.embeddings.word_embeddings.weight'"),
        (_with_another_shape, "has shape"),
        (_cut_short, "cannot read the weights"),
        (_broken_tokenizer, "tokenizer.json is not JSON"),
    ],
)
def test_a_spoilt_folder_is_refused(spoil: Any, said: str, weighted: Path, tmp_path: Path) -> None:
    folder = _copied(weighted, tmp_path)
    spoil(folder)
    with pytest.raises(ConfigError, match=said):
        folder_source(folder, Request(name="spoilt"))


@pytest.mark.parametrize(
    ("fields", "request_", "said"),
    [
        ({}, {}, "tells no task"),
        ({}, {"task": "image-classification"}, "no image-classification head"),
        ({"model_type": "nonsense"}, {"task": "regression"}, "no model type 'nonsense'"),
        ({}, {"task": "regression", "context": 99}, "more than the model's 12"),
        ({}, {"task": "regression", "arguments": {"wings": 2}}, "no such field"),
        ({"hidden_size": "wide"}, {"task": "regression"}, "config.json|makes no model"),
    ],
)
def test_a_configuration_that_makes_no_source_is_refused(
    fields: dict[str, Any], request_: dict[str, Any], said: str, tmp_path: Path
) -> None:
    folder = write(tmp_path, "bert", **fields)
    with pytest.raises(ConfigError, match=said):
        folder_source(folder / "config.json", Request(name="bad", **request_))


def test_a_folder_without_a_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        folder_source(tmp_path, Request(name="empty"))
