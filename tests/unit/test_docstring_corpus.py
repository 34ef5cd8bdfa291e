"""The labelled corpus of docstrings: classes, duplicates, split, and the files themselves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from p2ptrain.data.samples import RecordSamples
from tests.data_cases import opened, text_model
from tools.docstring_corpus import make_examples, write_examples


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """Three modules with 40, 30 and 20 docstrings, and texts that they share."""
    folder = tmp_path / "library"
    for module, count in (("ants", 40), ("bees/inner", 30), ("cats", 20)):
        lines = [
            f'def f{n}():\n    """Say what {module} number {n} does for anyone."""\n'
            for n in range(count)
        ]
        lines.append('def same():\n    """A text that every module of these has."""\n')
        lines.append(f'def twice():\n    """SAY what {module}  number 0 does for anyone."""\n')
        lines.append('def short():\n    """Too short."""\n')
        path = folder / f"{module}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(lines))
    (folder / "tests").mkdir()
    (folder / "tests" / "test_a.py").write_text('"""Nothing of a test is taken into it."""')
    (folder / "_private.py").write_text('"""Nothing of a private module is taken into it."""')
    (folder / "broken.py").write_text("def (")
    return folder


def test_largest_modules_are_the_classes(library: Path) -> None:
    examples = make_examples(library, classes=2)
    labels = [example.label for example in examples]
    assert (labels.count("ants"), labels.count("bees"), len(labels)) == (40, 30, 70)


def test_no_text_occurs_twice_or_in_both_parts(library: Path, tmp_path: Path) -> None:
    said = list(write_examples(make_examples(library, classes=20), tmp_path))
    assert said[0].endswith("3 classes: ants, bees, cats")
    assert (tmp_path / "classes.txt").read_text() == "ants\nbees\ncats\n"
    parts = [
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "heldout")
    ]
    texts = [record["text"].lower() for part in parts for record in part]
    assert len(texts) == len(set(texts)) == 90
    assert all(part for part in parts)
    assert not any("every module" in text or "nothing of" in text for text in texts)
    assert f"{len(parts[0])} texts" in said[1]


def test_corpus_is_the_same_again(library: Path) -> None:
    assert make_examples(library, classes=3) == make_examples(library, classes=3)


def test_corpus_is_data_for_a_classifier(library: Path, tmp_path: Path) -> None:
    list(write_examples(make_examples(library, classes=3), tmp_path))
    data = opened(text_model(), tmp_path / "train.jsonl", heldout=tmp_path / "heldout.jsonl")
    assert isinstance(data.samples, RecordSamples)
    assert data.notes == ("classes by name, in order: 0 ants, 1 bees, 2 cats",)
