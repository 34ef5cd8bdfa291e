"""The demonstration's text: real, deterministic, and split without overlap."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from p2ptrain.demo.corpus import (
    Corpus,
    library_docstrings,
    make_corpus,
    normalise,
    pydoc_topics,
    standard_corpus,
    write_corpus,
)


@functools.cache
def corpus() -> Corpus:
    return standard_corpus()


def paragraphs(text: str) -> set[str]:
    return {" ".join(part.split()).lower() for part in text.split("\n\n")} - {""}


def test_corpus_is_large_enough_to_train_on() -> None:
    assert len(corpus().train) > 1_000_000
    assert len(corpus().heldout) > 30_000
    assert corpus().documents > 3_000


def test_corpus_is_english() -> None:
    words = corpus().train.lower().split()
    assert 0.03 < words.count("the") / len(words) < 0.10


def test_heldout_paragraphs_do_not_occur_in_the_training_text() -> None:
    assert paragraphs(corpus().heldout).isdisjoint(paragraphs(corpus().train))


def test_no_paragraph_occurs_twice() -> None:
    parts = [" ".join(part.split()).lower() for part in corpus().train.split("\n\n")]
    filled = [part for part in parts if part]
    assert len(filled) == len(set(filled))


def test_corpus_is_printable_ascii() -> None:
    assert set(corpus().train + corpus().heldout) <= {"\n", *map(chr, range(32, 127))}


def test_order_depends_on_the_documents_alone() -> None:
    texts = [f"document number {index} says something long enough. " * 3 for index in range(60)]
    assert make_corpus(texts) == make_corpus(reversed(texts))


def test_duplicates_and_scraps_are_dropped() -> None:
    text = "The same words in a document that is long enough to be kept in the corpus, twice over."
    assert make_corpus([text, text, "  " + text, "scrap"]).documents == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a  b\t c", "a b c"),
        ("  indented   line  ", "  indented line"),
        ("Title\n=====\ntext", "Title\ntext"),
        ("caf\u00e9 \u2014 ok", "caf ok"),
        ("a\x00b\x1b[1m\x0cc\r\nd", "ab[1mc\nd"),
        ("", ""),
    ],
)
def test_normalise_keeps_words_and_drops_decoration(text: str, expected: str) -> None:
    assert normalise(text) == expected


def test_sources_are_parsed_and_never_run(tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text('"""Module."""\ndef f():\n    """F."""\nraise SystemExit\n')
    (tmp_path / "broken.py").write_text("def (")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "skipped.py").write_text('"""Skipped."""')
    assert list(library_docstrings(tmp_path)) == ["Module.", "F."]


def test_topics_are_read_and_may_be_absent(tmp_path: Path) -> None:
    assert list(pydoc_topics(tmp_path)) == []
    (tmp_path / "pydoc_data").mkdir()
    (tmp_path / "pydoc_data" / "topics.py").write_text("topics = {'if': 'The if', 'n': 1}")
    assert list(pydoc_topics(tmp_path)) == ["The if"]


def test_written_files_hold_the_texts(tmp_path: Path) -> None:
    small = Corpus(train="train\n", heldout="held\n", documents=2)
    train, heldout = write_corpus(small, tmp_path)
    assert (train.read_bytes(), heldout.read_bytes()) == (b"train\n", b"held\n")
