"""Words with one tag each, from JSON lines: a label at the first token of every word."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from p2ptrain.data.cache import CacheWriter, cached
from p2ptrain.data.class_names import table_class_names
from p2ptrain.data.files import digest_of
from p2ptrain.data.labels import LabelRule
from p2ptrain.data.ports import TokenPorts, token_labels
from p2ptrain.data.records import Wanted
from p2ptrain.data.tables import Row, Table, open_table
from p2ptrain.data.tokenizing import Tokenizer
from p2ptrain.errors import InvariantBroken
from p2ptrain.training.feed import Feed


class WordRecords:
    """Tagged sentences; every record was checked when they were opened."""

    def __init__(self, table: Table, wanted: Wanted, tokenizer: Tokenizer) -> None:
        self._table, self._manifest, self._tokenizer = table, wanted.manifest, tokenizer
        self._word_field = wanted.options.text_field or "words"
        self._tag_field = wanted.options.label_field or "tags"
        names = table_class_names(table, self._tag_field, self._tags(), wanted)
        self._rule = LabelRule(wanted.manifest, names)
        self._ports = TokenPorts(wanted.manifest)
        data = wanted.manifest.data
        self.class_names = names
        self.summary = f"{len(table)} sentences, {data.classes} classes"
        self.identity = digest_of({
            "words": 1, "table": table.file.digest, "words field": self._word_field,
            "tags field": self._tag_field, "tokenizer": data.tokenizer_digest or data.tokenizer,
            "classes": data.classes, "class_names": names,
        })  # fmt: skip

    @property
    def count(self) -> int:
        return len(self._table)

    def check(self, writer: CacheWriter) -> None:
        """Read every record once; DataError names one that cannot be used."""
        for index, row in self._table.rows():
            self._labels(row, index)
        writer.facts["records"] = len(self._table)

    def feed(self, indices: Sequence[int]) -> Feed:
        """As `Records.feed`."""
        self._table.file.check()
        data, ignored = self._manifest.data, self._manifest.loss.ignore_index
        labels = np.full((len(indices), data.context), ignored, np.int64)
        samples = []
        for place, index in enumerate(indices):
            row = self._table.row(index)
            tags = self._labels(row, index)
            ids, origins = self._tokenizer.words(self._words(row, index))
            samples.append(ids)
            before = None
            for token, origin in enumerate(origins):
                if origin is not None and origin != before:
                    labels[place, token] = tags[origin]
                before = origin if origin is not None else before
        labelled = token_labels(self._manifest, labels)
        return Feed(inputs=self._ports.padded(samples), labels=labelled)

    def _words(self, row: Row, index: int) -> list[str]:
        words = self._list(row, self._word_field, index, "--text-field")
        if not all(isinstance(word, str) and word for word in words):
            raise self._table.wrong(index, f"field {self._word_field!r} is not a list of words")
        return [word.encode("utf-8", "replace").decode() for word in words]

    def _labels(self, row: Row, index: int) -> list[int]:
        words = self._words(row, index)
        tags = self._list(row, self._tag_field, index, "--label-field")
        if len(tags) != len(words):
            raise self._table.wrong(index, f"{len(words)} words have {len(tags)} tags")
        try:
            return [self._rule.class_index(tag) for tag in tags]
        except ValueError as error:
            raise self._table.wrong(index, str(error)) from error

    def _tags(self) -> Iterator[object]:
        for index, row in self._table.rows():
            yield from self._list(row, self._tag_field, index, "--label-field")

    def _list(self, row: Row, field: str, index: int, option: str) -> list[Any]:  # Any: JSON
        value = self._table.field(row, field, index, option)
        if not isinstance(value, list) or not value:
            raise self._table.wrong(
                index, f"field {field!r} is not a list", hint=f"name the field with {option}"
            )
        return value


def open_words(path: Path, wanted: Wanted) -> WordRecords:
    """Check every sentence of a JSON lines file, once for each content.

    Raises:
        DataError: names the line and the record that cannot be used.
    """
    if wanted.tokenizer is None:
        raise InvariantBroken("text without a tokenizer")
    records = WordRecords(open_table(path, wanted.cache), wanted, wanted.tokenizer)
    cached(wanted.cache, records.identity, records.check)
    return records
