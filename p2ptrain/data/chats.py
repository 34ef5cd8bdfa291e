"""Conversations for language modelling: only what the assistant says is learnt.

Each line is `{"messages": [{"role": ..., "content": ...}, ...]}`. A message is rendered as

    <|im_start|>ROLE
    CONTENT<|im_end|>

with a line end after it. Tokenizers that know these marks make one token of each; for others they
are text like any other. An assistant's content and its closing mark are labels, all else is
ignored. A conversation longer than the context gives several samples, one after the other;
those without anything to learn are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from p2ptrain.data.cache import CacheEntry, CacheWriter, cached
from p2ptrain.data.files import digest_of
from p2ptrain.data.ports import TokenPorts, token_labels
from p2ptrain.data.records import Wanted
from p2ptrain.data.tables import Table, open_table
from p2ptrain.data.tokenizing import Tokenizer
from p2ptrain.errors import DataError, InvariantBroken
from p2ptrain.ids import Digest
from p2ptrain.training.feed import Feed

FIELD: Final = "messages"
LEARNT_ROLE: Final = "assistant"


class Piece(NamedTuple):
    """Part of a rendered conversation."""

    text: str
    is_learnt: bool


class ChatRecords:
    """Samples of at most `context` + 1 tokens, tokenised once."""

    def __init__(self, entry: CacheEntry, identity: Digest, wanted: Wanted) -> None:
        self._entry, self._manifest = entry, wanted.manifest
        self._ports = TokenPorts(wanted.manifest)
        self.identity = identity
        self.class_names: tuple[str, ...] = ()
        tokens = len(entry.arrays["tokens"])
        self.summary = f"{entry.facts['conversations']} conversations, {tokens} tokens"

    @property
    def count(self) -> int:
        return len(self._entry.arrays["spans"])

    def feed(self, indices: Sequence[int]) -> Feed:
        """As `Records.feed`."""
        arrays, data = self._entry.arrays, self._manifest.data
        labels = np.full((len(indices), data.context), self._manifest.loss.ignore_index, np.int64)
        samples = []
        for place, index in enumerate(indices):
            start, stop = arrays["spans"][index]
            samples.append(arrays["tokens"][start : stop - 1].tolist())
            learnt = arrays["learnt"][start + 1 : stop] > 0
            labels[place, : len(learnt)][learnt] = arrays["tokens"][start + 1 : stop][learnt]
        labelled = token_labels(self._manifest, labels)
        return Feed(inputs=self._ports.padded(samples), labels=labelled)


def is_chat(table: Table) -> bool:
    """Whether the first record is a conversation; all must be alike."""
    return not table.header and FIELD in table.row(0)


def open_chats(path: Path, wanted: Wanted) -> ChatRecords:
    """Tokenise every conversation, once for each content.

    Raises:
        DataError: names the line and the record that is not a conversation.
    """
    tokenizer = wanted.tokenizer
    if tokenizer is None:
        raise InvariantBroken("text without a tokenizer")
    table, data = open_table(path, wanted.cache), wanted.manifest.data
    identity = digest_of({
        "chats": 1, "table": table.file.digest, "context": data.context,
        "tokenizer": data.tokenizer_digest or data.tokenizer,
    })  # fmt: skip

    def make(writer: CacheWriter) -> None:
        begin = 0
        for index, row in table.rows():
            pieces = list(_pieces(table, index, row))
            begin = _append(writer, pieces, begin, data.context, tokenizer)
        writer.append("spans", np.empty((0, 2), np.int64))
        writer.facts["conversations"] = len(table)

    entry = cached(wanted.cache, identity, make)
    if not len(entry.arrays["spans"]):
        raise DataError(
            f"{path}: no {LEARNT_ROLE} says anything",
            hint=f'what is learnt are messages of role "{LEARNT_ROLE}"',
        )
    return ChatRecords(entry, identity, wanted)


def _append(
    writer: CacheWriter, pieces: list[Piece], begin: int, context: int, tokenizer: Tokenizer
) -> int:
    """Write one conversation's tokens and samples; gives where the next one begins."""
    ids = tokenizer.plain([piece.text.encode() for piece in pieces])
    counts = [len(each) for each in ids]
    learnt = np.repeat(np.array([piece.is_learnt for piece in pieces], np.uint8), counts)
    writer.append("tokens", np.array([i for each in ids for i in each], np.uint32))
    writer.append("learnt", learnt)
    for start in range(0, max(len(learnt) - 1, 0), context):
        stop = min(start + context + 1, len(learnt))
        if learnt[start + 1 : stop].any():
            writer.append("spans", np.array([[begin + start, begin + stop]], np.int64))
    return begin + len(learnt)


def _pieces(table: Table, index: int, row: dict[str, Any]) -> Iterator[Piece]:  # Any: JSON
    messages = row.get(FIELD)
    if not isinstance(messages, list) or not messages:
        raise _not_a_chat(table, index, f"there is no list {FIELD!r}")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise _not_a_chat(table, index, f"message {number} is not an object")
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not isinstance(content, str):
            raise _not_a_chat(table, index, f"message {number} lacks the text of a role or content")
        is_learnt = role == LEARNT_ROLE
        yield Piece(_plain(f"<|im_start|>{role}\n"), False)
        yield Piece(_plain(f"{content}<|im_end|>"), is_learnt)
        yield Piece("\n", False)


def _plain(text: str) -> str:
    return text.encode("utf-8", "replace").decode()  # JSON can name half a character


def _not_a_chat(table: Table, index: int, what: str) -> DataError:
    hint = 'a line is {"messages": [{"role": "user", "content": "..."}, ...]}'
    return table.wrong(index, what, hint=hint)
