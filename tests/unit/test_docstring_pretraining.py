"""The text to pretrain on: distinct documents, no held-out text in any of them."""

from __future__ import annotations

import json
from pathlib import Path

from tools.docstring_pretraining import (
    configuration,
    library_lines,
    pretraining_lines,
    read_texts,
    write_tokenizer,
)


def test_a_document_that_holds_a_heldout_text_is_left_out() -> None:
    texts = ["Give the size in bytes.", "Before. give THE size in bytes. After.", "Give the size."]
    assert pretraining_lines(texts, ["Give the size in bytes."]) == ["Give the size."]
    assert len(pretraining_lines(texts, [])) == 3


def test_documents_are_distinct_whatever_their_case_and_in_a_fixed_order() -> None:
    texts = [f"This is document {n}." for n in range(9)]
    lines = pretraining_lines([*texts, *(text.upper() for text in texts)], [])
    assert sorted(line.lower() for line in lines) == sorted(text.lower() for text in texts)
    again = pretraining_lines([*(text.upper() for text in texts), *reversed(texts)], [])
    assert [line.lower() for line in again] == [line.lower() for line in lines]


def test_short_texts_are_left_out() -> None:
    assert pretraining_lines(["Two words", "Now three words"], []) == ["Now three words"]


def test_library_lines_are_docstrings_and_paragraphs_of_topics(tmp_path: Path) -> None:
    (tmp_path / "_inner.py").write_text('"""Say what\n\n    this is for."""\n')
    (tmp_path / "pydoc_data").mkdir()
    topics = {"if": "The if statement\n\nruns   a suite."}
    (tmp_path / "pydoc_data" / "topics.py").write_text(f"topics = {topics!r}\n")
    assert list(library_lines(tmp_path)) == [
        "Say what this is for.",
        "The if statement",
        "runs a suite.",
    ]


def test_texts_are_read_in_order(tmp_path: Path) -> None:
    path = tmp_path / "heldout.jsonl"
    path.write_text('{"text": "b b b", "label": "x"}\n{"text": "a a a", "label": "y"}\n')
    assert read_texts(path) == ["b b b", "a a a"]


def test_a_tokenizer_frames_texts_and_names_its_special_tokens(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    size = write_tokenizer(tmp_path, ["the size of a file", "the name of a file"], vocabulary=40)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokens = tokenizer.encode("The file").tokens
    assert size == tokenizer.get_vocab_size() <= 40
    assert (tokens[0], tokens[-1]) == ("[CLS]", "[SEP]")
    assert "[UNK]" not in tokens
    roles = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert roles["mask_token"] == "[MASK]"
    assert configuration(size, layers=2, width=64, context=16)["pad_token_id"] == (
        tokenizer.token_to_id(roles["pad_token"])
    )
