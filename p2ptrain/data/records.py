"""What a reader of records gives, and what it is told about the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from p2ptrain.bundle.manifest import Manifest
from p2ptrain.data.options import DataOptions
from p2ptrain.data.tokenizing import Tokenizer
from p2ptrain.ids import Digest
from p2ptrain.training.feed import Feed


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """The model that the data has to fit, and where derived files go."""

    manifest: Manifest
    tokenizer: Tokenizer | None
    cache: Path
    options: DataOptions
    class_names: tuple[str, ...]
    """The bundle's, or for held-out data those found in the training data; may be empty."""


class Records(Protocol):
    """Samples that are drawn one by one, by their index."""

    @property
    def count(self) -> int:
        """How many there are."""
        ...

    @property
    def identity(self) -> Digest:
        """Of everything that decides the records and their order."""
        ...

    @property
    def summary(self) -> str:
        """What a person calls them: `120 texts, 4 classes`."""
        ...

    @property
    def class_names(self) -> tuple[str, ...]:
        """By label; empty: labels are numbers."""
        ...

    def feed(self, indices: Sequence[int]) -> Feed:
        """These records as one microbatch; DataError names one that cannot be read."""
        ...
