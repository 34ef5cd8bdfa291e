"""Real English that every Python installation carries, split into training and held-out text.

Sources: the topics of `pydoc_data` and the docstrings of the standard library, read with `ast`
so that nothing is imported or run. Duplicates are removed before the split, by document and by
paragraph, so that no held-out paragraph occurs in the training text.
"""

from __future__ import annotations

import ast
import hashlib
import os
import re
import sysconfig
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

DOCUMENT_CHARACTERS_MIN: Final = 80
SKIPPED_FOLDERS: Final = frozenset({
    "site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "lib2to3",
    "turtledemo", "__pycache__", "encodings", "pydoc_data",
})  # fmt: skip
HELDOUT_ONE_IN: Final = 16

_BLANK_LINES = re.compile(r"\n[ \t]*\n+")
_UNPRINTABLE = re.compile(r"[^\n -~]+")
_DOCUMENTING = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
_BODIES: Final = ("body", "handlers", "orelse", "finalbody", "cases")
"""Where statements have others in them, in the order in which `ast` names them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Disjoint texts, in a fixed order."""

    train: str
    heldout: str
    documents: int


def standard_corpus() -> Corpus:
    """The corpus of the running Python; the same one on every machine with this version."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    return make_corpus([*pydoc_topics(folder), *library_docstrings(folder)])


def write_corpus(corpus: Corpus, directory: Path) -> tuple[Path, Path]:
    """Write train.txt and heldout.txt into `directory`; gives their paths."""
    train, heldout = directory / "train.txt", directory / "heldout.txt"
    train.write_text(corpus.train, encoding="utf-8")
    heldout.write_text(corpus.heldout, encoding="utf-8")
    return train, heldout


def make_corpus(texts: Iterable[str]) -> Corpus:
    """Normalise, remove duplicates, split by the hash of each document, in order of that hash.

    The order of `texts` decides only which of two documents keeps a paragraph they share.
    """
    seen: set[str] = set()
    parts: dict[bool, list[tuple[str, str]]] = {True: [], False: []}
    for text in texts:
        document = "\n\n".join(_fresh_paragraphs(normalise(text), seen))
        if len(document) < DOCUMENT_CHARACTERS_MIN:
            continue
        digest = hashlib.sha256(document.encode()).hexdigest()
        heldout = int(digest, 16) % HELDOUT_ONE_IN == 0
        parts[heldout].append((digest, document))
    train, held = (
        "\n\n\n".join(document for _, document in sorted(parts[heldout]))
        for heldout in (False, True)
    )
    return Corpus(train=train, heldout=held, documents=sum(map(len, parts.values())))


def normalise(text: str) -> str:
    """Plain printable ASCII with single-spaced words, lines kept, blank lines collapsed."""
    plain = _UNPRINTABLE.sub("", text.expandtabs(4))
    lines = (re.sub(r"(?<=\S) {2,}", " ", line).rstrip() for line in plain.split("\n"))
    kept = (line for line in lines if not re.fullmatch(r"[\s*=~^\-+#.|_]+", line))
    return "\n".join(kept).strip("\n")


def _fresh_paragraphs(document: str, seen: set[str]) -> Iterator[str]:
    for paragraph in _BLANK_LINES.split(document):
        key = " ".join(paragraph.split()).lower()
        if key and key not in seen:
            seen.add(key)
            yield paragraph


def pydoc_topics(folder: Path) -> Iterator[str]:
    """The language reference as `help()` shows it, topic by topic; nothing when absent."""
    tree = _parse(folder / "pydoc_data" / "topics.py")
    for node in ast.walk(tree) if tree is not None else ():
        if isinstance(node, ast.Dict):
            for value in node.values:
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    yield value.value


def library_docstrings(folder: Path) -> Iterator[str]:
    """Every docstring of the sources below `folder`, by folder, file and place."""
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(set(folders) - SKIPPED_FOLDERS)
        for name in sorted(files):
            if name.endswith(".py"):
                yield from file_docstrings(Path(root, name))


def file_docstrings(path: Path) -> Iterator[str]:
    """The docstrings of one source, the module's first; nothing when it is not Python."""
    tree = _parse(path)
    for node in _statements(tree) if tree is not None else ():
        if isinstance(node, _DOCUMENTING):
            text = ast.get_docstring(node)
            if text is not None:
                yield text


def _statements(tree: ast.Module) -> Iterator[ast.AST]:
    """Level by level, as `ast.walk` does, but not into expressions: nothing there has a docstring,
    and they are most of a tree."""
    waiting: deque[ast.AST] = deque([tree])
    while waiting:
        node = waiting.popleft()
        for name in _BODIES:
            waiting.extend(getattr(node, name, ()))
        yield node


def _parse(path: Path) -> ast.Module | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in other people's sources
            return ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return None
