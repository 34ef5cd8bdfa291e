"""Texts with one label each, from JSON lines or CSV; tokenised when they are drawn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p2ptrain.bundle.manifest import Manifest
from p2ptrain.data.cache import CacheWriter, cached
from p2ptrain.data.class_names import table_class_names
from p2ptrain.data.files import digest_of
from p2ptrain.data.labels import LabelRule
from p2ptrain.data.ports import TokenPorts
from p2ptrain.data.records import Wanted
from p2ptrain.data.tables import Table, open_table
from p2ptrain.data.tokenizing import Tokenizer
from p2ptrain.errors import InvariantBroken
from p2ptrain.ids import Digest
from p2ptrain.training.feed import Feed


class TextRecords:
    """Labelled texts; every record was checked when they were opened."""

    def __init__(
        self,
        *,
        table: Table,
        field: str,
        labels: NDArray[Any],  # Any: the labels port's dtype
        rule: LabelRule,
        identity: Digest,
        manifest: Manifest,
        tokenizer: Tokenizer,
    ) -> None:
        self._table, self._field, self._labels = table, field, labels
        self._ports, self._tokenizer = TokenPorts(manifest), tokenizer
        self.identity = identity
        self.class_names = rule.class_names
        classes = f", {manifest.data.classes} classes" if rule.is_class else ""
        self.summary = f"{len(table)} texts{classes}"

    @property
    def count(self) -> int:
        return len(self._table)

    def feed(self, indices: Sequence[int]) -> Feed:
        """As `Records.feed`."""
        self._table.file.check()
        samples = [self._sample(index) for index in indices]
        labels = np.ascontiguousarray(self._labels[list(indices)])
        return Feed(inputs=self._ports.padded(samples), labels=labels)

    def _sample(self, index: int) -> list[int]:
        text = self._table.text(self._table.row(index), self._field, index)
        ids = self._tokenizer.sample(text)
        if not ids:
            raise self._table.wrong(index, "the tokenizer finds no token in this text")
        return ids


def open_texts(path: Path, wanted: Wanted) -> TextRecords:
    """Check every text and label of a table, once for each content.

    Raises:
        DataError: names the line and the record that cannot be used.
    """
    if wanted.tokenizer is None:
        raise InvariantBroken("text without a tokenizer")
    table = open_table(path, wanted.cache)
    text_field = wanted.options.text_field or "text"
    label_field = wanted.options.label_field or "label"
    values = _values(table, label_field)
    names = table_class_names(table, label_field, values, wanted)
    rule = LabelRule(wanted.manifest, names)
    data = wanted.manifest.data
    identity = digest_of({
        "texts": 1, "table": table.file.digest, "header": table.header, "text": text_field,
        "label": label_field, "tokenizer": data.tokenizer_digest or data.tokenizer,
        "classes": data.classes, "class_names": rule.class_names,
        "labels": wanted.manifest.labels_port.value.dtype,
    })  # fmt: skip

    def make(writer: CacheWriter) -> None:
        for index, row in table.rows():
            table.text(row, text_field, index)
            value = table.field(row, label_field, index, "--label-field")
            writer.append("labels", _label(table, index, rule, value)[None])

    return TextRecords(
        table=table,
        field=text_field,
        labels=cached(wanted.cache, identity, make).arrays["labels"],
        rule=rule,
        identity=identity,
        manifest=wanted.manifest,
        tokenizer=wanted.tokenizer,
    )


def _values(table: Table, field: str) -> Iterator[object]:
    for index, row in table.rows():
        yield table.field(row, field, index, "--label-field")


def _label(table: Table, index: int, rule: LabelRule, value: object) -> NDArray[Any]:
    try:
        return rule.sample(value)
    except ValueError as error:
        hint = "correct that record, or name another field with --label-field"
        raise table.wrong(index, str(error), hint=hint) from error
