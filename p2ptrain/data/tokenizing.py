"""Text to token ids: bytes as they are, or a bundle's tokenizer by the `tokenizers` library."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from p2ptrain.bundle.manifest import Manifest
from p2ptrain.errors import DataError
from p2ptrain.store.bundles import read_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer as LibraryTokenizer


class WordTokens(NamedTuple):
    """Ids of one sample, and for each the word that it comes from; None: none."""

    ids: list[int]
    words: list[int | None]


class Tokenizer(Protocol):
    """What the readers of text need."""

    def plain(self, blocks: Sequence[bytes]) -> list[list[int]]:
        """Ids of each block without special tokens; bytes that are not UTF-8 are replaced."""
        ...

    def sample(self, text: str) -> list[int]:
        """Ids of one text with its special tokens, at most the context."""
        ...

    def words(self, words: Sequence[str]) -> WordTokens:
        """Ids of a text that comes in words, as above."""
        ...


def open_tokenizer(manifest: Manifest, directory: Path) -> Tokenizer:
    """The tokenizer that a manifest names.

    Raises:
        BundleError: `tokenizer.json` is missing or damaged.
        DataError: the extra is not installed, or the file is not a tokenizer of this model.
    """
    data = manifest.data
    content = read_tokenizer(directory, manifest)
    if content is None:
        return ByteTokenizer(context=data.context, special_tokens=data.special_tokens)
    return _open_library(content, context=data.context, vocabulary=data.vocabulary)


class ByteTokenizer:
    """One token per byte, between the special tokens that the bundle has."""

    def __init__(self, *, context: int, special_tokens: Mapping[str, int]) -> None:
        self._before = [special_tokens["cls"]] if "cls" in special_tokens else []
        self._after = [special_tokens["sep"]] if "sep" in special_tokens else []
        self._room = context - len(self._before) - len(self._after)

    def plain(self, blocks: Sequence[bytes]) -> list[list[int]]:
        return [list(block) for block in blocks]

    def sample(self, text: str) -> list[int]:
        return [*self._before, *text.encode()[: self._room], *self._after]

    def words(self, words: Sequence[str]) -> WordTokens:
        ids: list[int] = []
        origins: list[int | None] = []
        for index, word in enumerate(words):
            encoded = word.encode()
            if index > 0:
                ids.append(ord(" "))
                origins.append(None)
            ids += encoded
            origins += [index] * len(encoded)
        before: list[int | None] = [None for _ in self._before]
        after: list[int | None] = [None for _ in self._after]
        return WordTokens(
            [*self._before, *ids[: self._room], *self._after],
            [*before, *origins[: self._room], *after],
        )


class FileTokenizer:
    """A `tokenizer.json`; what it says about truncation and padding does not count."""

    def __init__(self, tokenizer: LibraryTokenizer, *, context: int) -> None:
        self._plain, self._sample = tokenizer, type(tokenizer).from_str(tokenizer.to_str())
        for each in (self._plain, self._sample):
            each.no_padding()
        self._plain.no_truncation()
        self._sample.enable_truncation(context)

    def plain(self, blocks: Sequence[bytes]) -> list[list[int]]:
        texts = [block.decode("utf-8", "replace") for block in blocks]
        with _encoding():
            encoded = self._plain.encode_batch(texts, add_special_tokens=False)
        return [list(each.ids) for each in encoded]

    def sample(self, text: str) -> list[int]:
        with _encoding():
            return list(self._sample.encode(text).ids)

    def words(self, words: Sequence[str]) -> WordTokens:
        with _encoding():
            encoded = self._sample.encode(list(words), is_pretokenized=True)
        return WordTokens(list(encoded.ids), list(encoded.word_ids))


@contextlib.contextmanager
def _encoding() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the library raises bare Exceptions
        raise DataError(
            f"the bundle's tokenizer cannot encode this text: {error}",
            hint="export the model with a tokenizer that knows an unknown token",
        ) from error


def _open_library(content: bytes, *, context: int, vocabulary: int) -> FileTokenizer:
    try:
        from tokenizers import Tokenizer as Library
    except ImportError as error:
        raise DataError(
            "this model's text needs the tokenizers library, which is not installed",
            hint="pip install 'p2ptrain[text]' on the device that holds the data",
        ) from error
    try:
        tokenizer = Library.from_buffer(content)
    except Exception as error:  # the library raises bare Exceptions
        raise DataError(
            f"the bundle's tokenizer.json cannot be used: {error}",
            hint="export the model again with its tokenizer",
        ) from error
    size = tokenizer.get_vocab_size()
    if size > vocabulary:
        raise DataError(
            f"the bundle's tokenizer has {size} tokens, the model knows {vocabulary}",
            hint="export the model with its own tokenizer",
        )
    return FileTokenizer(tokenizer, context=context)
