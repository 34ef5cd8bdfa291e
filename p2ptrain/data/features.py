"""Rows of numbers in CSV: every column but the labels is a feature, in the header's order."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p2ptrain.data.arrays import ArrayRecords, NamedArray, records_of
from p2ptrain.data.cache import CacheWriter, cached
from p2ptrain.data.class_names import table_class_names
from p2ptrain.data.files import digest_of
from p2ptrain.data.labels import LabelRule, listed, number
from p2ptrain.data.records import Wanted
from p2ptrain.data.tables import Row, Table, open_table
from p2ptrain.errors import DataError


class FeatureReader:
    """Turns the rows of one table into arrays, kept in the cache."""

    def __init__(self, table: Table, wanted: Wanted) -> None:
        self._table, self._wanted = table, wanted
        self._labels = (wanted.options.label_field or "label").split(",")
        self._features = [name for name in table.header if name not in self._labels]
        self._check_columns()
        names: tuple[str, ...] = ()
        if len(self._labels) == 1:
            values = (row[self._labels[0]] for _, row in table.rows())
            names = table_class_names(table, self._labels[0], values, wanted)
        self._rule = LabelRule(wanted.manifest, names)
        self.class_names = names

    def _check_columns(self) -> None:
        path, header = self._table.file.path, self._table.header
        missing = [name for name in self._labels if name not in header]
        if missing:
            raise DataError(
                f"{path} has no column {listed(missing)}; it has: {listed(header)}",
                hint="name the column of labels with --label-field",
            )
        ports = self._wanted.manifest.data_ports
        shape = self._wanted.manifest.shape(ports[0].value, batch=1)[1:]
        if len(ports) != 1 or int(np.prod(shape)) != len(self._features):
            raise DataError(
                f"{path} has {len(self._features)} feature columns"
                f" ({listed(self._features)}); the model wants {int(np.prod(shape))}",
                hint="leave only features and labels, or name the labels with --label-field",
            )

    def records(self) -> ArrayRecords:
        """Every row, checked; DataError names one that cannot be used."""
        identity = digest_of({
            "features": 1, "table": self._table.file.digest, "header": self._table.header,
            "labels": self._labels, "class_names": self.class_names,
            "port": self._wanted.manifest.labels_port.value.dtype,
            "classes": self._wanted.manifest.data.classes,
        })  # fmt: skip
        arrays = cached(self._wanted.cache, identity, self._write).arrays
        path, port = self._table.file.path, self._wanted.manifest.data_ports[0]
        shape = self._wanted.manifest.shape(port.value, batch=len(self._table))
        return records_of(
            inputs=(NamedArray(place=str(path), array=arrays["features"].reshape(shape)),),
            labels=NamedArray(place=f"{path}, labels", array=arrays["labels"]),
            files=(),
            identity=identity,
            wanted=dataclasses.replace(self._wanted, class_names=self.class_names),
        )

    def _write(self, writer: CacheWriter) -> None:
        for index, row in self._table.rows():
            features = [self._number(row, name, index) for name in self._features]
            writer.append("features", np.array([features], np.float32))
            writer.append("labels", self._label(row, index)[None])

    def _number(self, row: Row, name: str, index: int) -> float:
        try:
            return number(row[name])
        except ValueError as error:
            raise self._table.wrong(index, f"column {name!r}: {error}") from error

    def _label(self, row: Row, index: int) -> NDArray[Any]:  # Any: the labels port's dtype
        values = [row[name] for name in self._labels]
        try:
            return self._rule.sample(values[0] if len(values) == 1 else values)
        except ValueError as error:
            raise self._table.wrong(index, str(error)) from error


def open_features(path: Path, wanted: Wanted) -> ArrayRecords:
    """A CSV file of numbers as records; DataError names the line that cannot be used."""
    return FeatureReader(open_table(path, wanted.cache), wanted).records()
