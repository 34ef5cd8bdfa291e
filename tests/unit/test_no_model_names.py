"""No code knows a model by its name: what a model allows follows from its graphs."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "p2ptrain"
SHOWS_A_MODEL = ("demo",)
FAMILIES = re.compile(
    r"(?<![a-z])(gpt|bert|roberta|llama|mistral|qwen|gemma|phi|vit|resnet|mobilenet)(?![a-z])"
)
EXAMPLE = re.compile(r"onnx_models/\w+\.py")
"""Of a hint: where to look how a module is written."""
FILES = [
    path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.relative_to(PACKAGE).parts[0] not in SHOWS_A_MODEL
]


def words(source: str) -> Iterator[str]:
    """Identifiers and strings of code, without comments and docstrings."""
    nodes = list(ast.walk(ast.parse(source)))
    said = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    for node in nodes:
        match node:
            case ast.Constant(value=str(word)) if id(node) not in said:
                yield word
            case ast.Name(id=word) | ast.Attribute(attr=word) | ast.arg(arg=word):
                yield word
            case ast.FunctionDef(name=word) | ast.ClassDef(name=word):
                yield word


def named(source: str) -> set[str]:
    """The families that code names; most files name none, not even in a comment."""
    if not FAMILIES.search(_apart(source)):
        return set()
    plain = (EXAMPLE.sub("", word) for word in words(source))
    return {found for word in plain for found in FAMILIES.findall(_apart(word))}


def _apart(text: str) -> str:
    """In small letters, with the words of a class's name told apart."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", text).lower()


def test_no_model_is_known_by_its_name() -> None:
    found = {str(path.relative_to(PACKAGE)): named(path.read_text("utf-8")) for path in FILES}
    assert len(found) > 300
    assert not {path: names for path, names in found.items() if names}


@pytest.mark.parametrize(
    "source",
    [
        'if model.name == "gpt-2":\n    pass\n',
        "def split_bert_heads(): ...\n",
        "class LlamaRule: ...\n",
        'TABLE = {"BertLayer": 1}\n',
        'match name:\n    case "vit":\n        pass\n',
    ],
)
def test_names_are_found_where_code_has_them(source: str) -> None:
    assert named(source)


def test_words_around_a_name_and_comments_are_not_it() -> None:
    assert not named('"""As GPT does."""\nmembers = invite("of a member")  # BERT\n')
