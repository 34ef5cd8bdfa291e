"""Records of JSON lines and CSV files: found by their offsets, parsed when they are asked for."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

from p2ptrain import limits
from p2ptrain.data.cache import CacheWriter, cached
from p2ptrain.data.files import SourceFile, digest_of, inspect_file, reading
from p2ptrain.errors import DataError

JSON_SUFFIXES: Final = frozenset({".jsonl", ".ndjson", ".json"})
CSV_SUFFIXES: Final = frozenset({".csv", ".tsv"})
TABLE_SUFFIXES: Final = JSON_SUFFIXES | CSV_SUFFIXES
_FLUSHED_ROWS: Final = 1 << 16
_FIELDS_SHOWN: Final = 8

Row = dict[str, Any]  # Any: JSON values, or the text of a CSV cell


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A file of records. Records and lines count from 0 here and from 1 in messages."""

    file: SourceFile
    header: tuple[str, ...]
    """Columns of a CSV file; empty for JSON lines, where every record names its fields."""
    _content: NDArray[np.uint8]
    _starts: NDArray[np.int64]
    """Where each record starts, and where the last one ends."""
    _lines: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self._lines)

    def row(self, index: int) -> Row:
        """One record by field name; DataError when it is not what the file's name promises."""
        text = self._text(index)
        return self._json(text, index) if not self.header else self._cells(text, index)

    def rows(self) -> Iterator[tuple[int, Row]]:
        """Every record with its index."""
        return ((index, self.row(index)) for index in range(len(self)))

    def field(self, row: Row, name: str, index: int, option: str) -> Any:  # Any: as in Row
        """One field of a record; DataError names those that there are."""
        if name not in row:
            shown = ", ".join(list(row)[:_FIELDS_SHOWN])
            raise self.wrong(
                index,
                f"there is no field {name!r}; it has: {shown}",
                hint=f"name the field with {option}",
            )
        return row[name]

    def text(self, row: Row, name: str, index: int) -> str:
        """A field that holds text and not only spaces; DataError as above."""
        value = self.field(row, name, index, "--text-field")
        if not isinstance(value, str):
            raise self.wrong(index, f"field {name!r} is of type {type(value).__name__}, not text")
        if not value.strip():
            raise self.wrong(index, f"field {name!r} holds no text")
        return value.encode("utf-8", "replace").decode()  # JSON can name half a character

    def wrong(self, index: int, what: str, *, hint: str | None = None) -> DataError:
        """An error that names the file, the line and the record."""
        place = f"{self.file.path}, line {self._lines[index] + 1} (record {index + 1})"
        return DataError(f"{place}: {what}", hint=hint or "correct or remove that record")

    def _text(self, index: int) -> str:
        content = self._content[self._starts[index] : self._starts[index + 1]].tobytes()
        try:
            return content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise self.wrong(
                index,
                f"byte {error.start + 1} of it is not UTF-8",
                hint="save the file as UTF-8",
            ) from error

    def _json(self, text: str, index: int) -> Row:
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise self.wrong(
                index, f"not JSON: {error}", hint="every line holds one JSON object"
            ) from error
        if not isinstance(row, dict):
            raise self.wrong(
                index,
                f"a JSON {type(row).__name__} where an object with fields is expected",
                hint="every line holds one JSON object",
            )
        return row

    def _cells(self, text: str, index: int) -> Row:
        try:
            cells = _csv_cells(text, self.file.path)
        except csv.Error as error:
            raise self.wrong(index, f"not CSV: {error}") from error
        if len(cells) != len(self.header):
            raise self.wrong(
                index, f"it has {len(cells)} columns; the header has {len(self.header)}"
            )
        return dict(zip(self.header, cells, strict=True))


def open_table(path: Path, cache: Path) -> Table:
    """Find the records of a file; their offsets are kept in `cache`.

    Raises:
        DataError: unreadable, empty, without records, with a bad header or an endless line.
    """
    file = inspect_file(path)
    is_csv = path.suffix.lower() in CSV_SUFFIXES
    key = digest_of({"table": 1, "content": file.digest, "csv": is_csv})

    def make(writer: CacheWriter) -> None:
        with reading(path), path.open("rb") as stream:
            _index(stream, path, writer, is_csv=is_csv)

    entry = cached(cache, key, make)
    if "lines" not in entry.arrays:
        raise DataError(f"{path} has no records", hint="give a file with at least two records")
    return Table(
        file=file,
        header=_header(path) if is_csv else (),
        _content=file.mapped(),
        _starts=entry.arrays["starts"],
        _lines=entry.arrays["lines"],
    )


def _index(stream: BinaryIO, path: Path, writer: CacheWriter, *, is_csv: bool) -> None:
    starts: list[int] = []
    lines: list[int] = []
    end = 0
    for number, (start, line, content) in enumerate(_records(stream, path, is_csv=is_csv)):
        end = start + len(content)
        if (number == 0 and is_csv) or not content.strip():
            continue
        starts.append(start)
        lines.append(line)
        if len(starts) == _FLUSHED_ROWS:
            _flush(writer, starts, lines)
    _flush(writer, starts, lines)
    writer.append("starts", np.array([end], np.int64))


def _flush(writer: CacheWriter, starts: list[int], lines: list[int]) -> None:
    if lines:
        writer.append("starts", np.array(starts, np.int64))
        writer.append("lines", np.array(lines, np.int64))
        starts.clear()
        lines.clear()


def _records(stream: BinaryIO, path: Path, *, is_csv: bool) -> Iterator[tuple[int, int, bytes]]:
    """Start, first line and bytes of every record; in CSV an odd quote keeps a record open."""
    start = line = lines = quotes = 0
    content = bytearray()
    while read := stream.readline(limits.DATA_RECORD_BYTES_MAX + 1):
        content += read
        lines += 1
        quotes += read.count(b'"') if is_csv else 0
        if len(content) > limits.DATA_RECORD_BYTES_MAX:
            raise DataError(
                f"{path}, line {line + 1}: a record of over {limits.DATA_RECORD_BYTES_MAX} bytes",
                hint="one record per line; a quote may have been left open",
            )
        if quotes % 2 == 0:
            yield start, line, bytes(content)
            start, line, quotes = start + len(content), lines, 0
            content.clear()
    if content:
        raise DataError(
            f"{path}, line {line + 1}: a quote is never closed", hint="close it, or double it"
        )


def _header(path: Path) -> tuple[str, ...]:
    with reading(path), path.open("rb") as stream:
        _, _, content = next(_records(stream, path, is_csv=True))
    try:
        names = [name.strip() for name in _csv_cells(content.decode("utf-8-sig"), path)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            f"{path}: the header is not CSV in UTF-8", hint="save the file as CSV in UTF-8"
        ) from error
    if len(set(names)) != len(names) or "" in names:
        raise DataError(
            f"{path}: the header has empty or repeated names: {', '.join(names)}",
            hint="the first line names every column once",
        )
    return tuple(names)


def _csv_cells(text: str, path: Path) -> list[str]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    return next(reader, [])
