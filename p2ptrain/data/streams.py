"""Text as one long row of tokens: files as they are, or tokenised once into the cache."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from p2ptrain.data.cache import CacheWriter, cached
from p2ptrain.data.files import (
    SourceFile,
    digest_of,
    digest_of_files,
    inspect_file,
    reading,
    walk,
)
from p2ptrain.data.records import Wanted
from p2ptrain.data.tables import TABLE_SUFFIXES, Table, open_table
from p2ptrain.errors import DataError, InvariantBroken
from p2ptrain.ids import Digest

TEXT_SUFFIXES: Final = frozenset({
    ".txt", ".text", ".md", ".rst", ".tex", ".org", ".html", ".xml", ".log", ".py", ".c", ".h",
    ".cc", ".cpp", ".hpp", ".rs", ".go", ".java", ".js", ".ts", ".sh", ".sql",
})  # fmt: skip
"""Which files of a folder are its text."""
BLOCK_BYTES: Final = 1 << 16
"""Longest piece of a text that is tokenised at once; pieces end with a line where they can."""
_BLOCKS_AT_ONCE: Final = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenStream:
    """Tokens in mapped memory, and the files whose content they are."""

    tokens: NDArray[Any]  # Any: uint8, uint16 or uint32
    files: tuple[SourceFile, ...]
    """Mapped directly, so they must not change."""
    identity: Digest


def open_stream(path: Path, wanted: Wanted) -> TokenStream:
    """The tokens of a text file, of every text file in a folder, or of a table's text field.

    Files of a folder follow each other by name; every record of a table ends with a line end.

    Raises:
        DataError: unreadable, empty, a folder without text, a table without the field.
    """
    if path.is_dir():
        files = _text_files(path)
        names = [str(file.path.relative_to(path)) for file in files]
        content = digest_of_files(zip(names, (file.digest for file in files), strict=True))
        return _tokenised(_file_blocks(files), {"folder": content}, wanted)
    if path.suffix.lower() in TABLE_SUFFIXES:
        table = open_table(path, wanted.cache)
        field = wanted.options.text_field or "text"
        source = {"table": table.file.digest, "header": table.header, "field": field}
        return _tokenised(_field_blocks(table, field), source, wanted)
    file = inspect_file(path)
    if wanted.manifest.data.tokenizer == "bytes":
        identity = digest_of({"bytes": file.digest})
        return TokenStream(tokens=file.mapped(), files=(file,), identity=identity)
    return _tokenised(_file_blocks([file]), {"file": file.digest}, wanted)


def text_paths(folder: Path) -> Iterator[Path]:
    """The text files of a folder at any depth, in the order in which they are read."""
    return (path for path in walk(folder) if path.suffix.lower() in TEXT_SUFFIXES)


def _text_files(folder: Path) -> list[SourceFile]:
    files = [inspect_file(path) for path in text_paths(folder) if path.stat().st_size]
    if not files:
        raise DataError(
            f"{folder} holds no text files",
            hint=f"text files of a folder end in one of: {' '.join(sorted(TEXT_SUFFIXES))}",
        )
    return files


def _tokenised(
    blocks: Iterator[bytes], source: Mapping[str, object], wanted: Wanted
) -> TokenStream:
    data, tokenizer = wanted.manifest.data, wanted.tokenizer
    if tokenizer is None:
        raise InvariantBroken("text without a tokenizer")
    described = data.tokenizer_digest or data.tokenizer
    identity = digest_of({"stream": 1, "tokenizer": described, **source})

    def make(writer: CacheWriter) -> None:
        dtype = np.min_scalar_type(max(data.vocabulary - 1, 255))
        while several := list(itertools.islice(blocks, _BLOCKS_AT_ONCE)):
            for ids in tokenizer.plain(several):
                writer.append("tokens", np.array(ids, dtype))

    entry = cached(wanted.cache, identity, make)
    return TokenStream(tokens=entry.arrays["tokens"], files=(), identity=identity)


def _file_blocks(files: Iterable[SourceFile]) -> Iterator[bytes]:
    for file in files:
        left = b""
        with reading(file.path), file.path.open("rb") as stream:
            while read := stream.read(BLOCK_BYTES - len(left)):
                block = left + read
                cut = _cut(block) if len(block) == BLOCK_BYTES else len(block)
                yield block[:cut]
                left = block[cut:]
        if left:
            yield left


def _cut(block: bytes) -> int:
    """After the last line end; without one, before a character that may not be whole."""
    line_end = block.rfind(b"\n") + 1
    if line_end:
        return line_end
    cut = len(block) - 1
    while cut > len(block) - 4 and block[cut] & 0xC0 == 0x80:
        cut -= 1
    return cut


def _field_blocks(table: Table, field: str) -> Iterator[bytes]:
    for index, row in table.rows():
        yield (table.text(row, field, index) + "\n").encode()
