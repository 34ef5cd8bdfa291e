"""A small labelled corpus: which module of the standard library does a docstring belong to?

    python tools/docstring_corpus.py --out DIR

Writes DIR/train.jsonl and DIR/heldout.jsonl, a JSON object with `text` and `label` a line, and
DIR/classes.txt, the class names in order. The classes are the modules with the most docstrings.
The same files come out on every machine with the same version of Python. Nothing is imported or
run; sources are read with `ast`.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from p2ptrain.demo.corpus import SKIPPED_FOLDERS, file_docstrings, normalise

CLASSES_MAX: Final = 20
WORDS_MIN: Final = 6
HELDOUT_ONE_IN: Final = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A docstring on one line, and the top-level module that it is from."""

    text: str
    label: str

    @property
    def key(self) -> str:
        """Decides the order and the split: a hash of the text, whatever its case."""
        return hashlib.sha256(self.text.lower().encode()).hexdigest()

    @property
    def is_heldout(self) -> bool:
        return int(self.key, 16) % HELDOUT_ONE_IN == 0


def main() -> int:
    """Write the three files and say what is in them."""
    parser = argparse.ArgumentParser(description="make a labelled corpus of docstrings")
    parser.add_argument("--out", type=Path, required=True, help="folder, made if missing")
    parser.add_argument("--classes", type=int, default=CLASSES_MAX, help="modules to tell apart")
    arguments = parser.parse_args()
    examples = make_examples(Path(sysconfig.get_paths()["stdlib"]), classes=arguments.classes)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for line in write_examples(examples, arguments.out):
        print(line)
    return 0


def make_examples(library: Path, *, classes: int) -> list[Example]:
    """Examples of the modules that have the most, in the order of their hashes."""
    examples = unambiguous(library_examples(library))
    counts = collections.Counter(example.label for example in examples)
    ranked = sorted(counts, key=lambda label: (-counts[label], label))
    chosen = set(ranked[:classes])
    kept = (example for example in examples if example.label in chosen)
    return sorted(kept, key=lambda example: example.key)


def library_examples(library: Path) -> Iterator[Example]:
    """Every docstring of a public module that is long enough, by module and place."""
    for path in sorted(library.rglob("*.py")):
        place = path.relative_to(library)
        if SKIPPED_FOLDERS.isdisjoint(place.parts):
            label = place.parts[0].removesuffix(".py")
            for docstring in file_docstrings(path) if not label.startswith("_") else ():
                text = " ".join(normalise(docstring).split())
                if len(text.split()) >= WORDS_MIN:
                    yield Example(text=text, label=label)


def unambiguous(examples: Iterable[Example]) -> list[Example]:
    """One example per text; a text that several modules share belongs to none of them."""
    first: dict[str, Example] = {}
    shared: set[str] = set()
    for example in examples:
        if first.setdefault(example.key, example).label != example.label:
            shared.add(example.key)
    return [example for key, example in first.items() if key not in shared]


def write_examples(examples: Iterable[Example], folder: Path) -> Iterator[str]:
    """Write the files; gives a line about each for people."""
    parts: dict[str, list[Example]] = {"train": [], "heldout": []}
    for example in examples:
        parts["heldout" if example.is_heldout else "train"].append(example)
    labels = sorted({example.label for part in parts.values() for example in part})
    (folder / "classes.txt").write_text("".join(f"{label}\n" for label in labels))
    yield f"{folder / 'classes.txt'}: {len(labels)} classes: {', '.join(labels)}"
    for name, part in parts.items():
        path = folder / f"{name}.jsonl"
        lines = (json.dumps({"text": each.text, "label": each.label}) + "\n" for each in part)
        path.write_text("".join(lines), encoding="utf-8")
        commonest = collections.Counter(each.label for each in part).most_common(1)
        share = commonest[0][1] / len(part) if part else 0.0
        yield f"{path}: {len(part)} texts; always the commonest class is right in {share:.1%}"


if __name__ == "__main__":
    raise SystemExit(main())
