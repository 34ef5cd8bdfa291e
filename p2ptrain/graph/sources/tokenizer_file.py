"""Read what a `tokenizer.json` says of its special tokens, without the tokenizers library."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from p2ptrain.errors import ConfigError

TOKENIZER: Final = "tokenizer.json"
_SIDE_FILES: Final = ("special_tokens_map.json", "tokenizer_config.json")
_ROLES: Final = {
    "pad": "pad_token",
    "mask": "mask_token",
    "cls": "cls_token",
    "sep": "sep_token",
    "unknown": "unk_token",
}


def special_tokens(directory: Path, content: bytes) -> dict[str, int]:
    """Ids of pad, mask, cls, sep and unknown, as far as the tokenizer has them.

    Args:
        directory: Holds the files that say which token has which role.
        content: Of `tokenizer.json`.

    Raises:
        ConfigError: a file is not what it should be.
    """
    ids = _ids(content)
    spelled: dict[str, str] = {}
    for name in _SIDE_FILES:
        if (directory / name).is_file():
            spelled |= _spelled(_document((directory / name).read_bytes(), name))
    return {role: ids[token] for role, token in spelled.items() if token in ids}


def _spelled(document: Mapping[str, Any]) -> dict[str, str]:  # Any: JSON
    found = {}
    for role, key in _ROLES.items():
        token = document.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            found[role] = token
    return found


def _ids(content: bytes) -> dict[str, int]:
    """Token -> id, of the added tokens and of the vocabulary where it is a mapping."""
    document = _document(content, TOKENIZER)
    model = document.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    ids = dict(vocabulary) if isinstance(vocabulary, dict) else {}
    for token in document.get("added_tokens") or ():
        ids[token["content"]] = int(token["id"])
    return ids


def _document(content: bytes, name: str) -> dict[str, Any]:  # Any: JSON
    try:
        document = json.loads(content)
    except ValueError as error:
        raise ConfigError(f"{name} is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise ConfigError(f"{name} is not a JSON object")
    return document
