"""What a person says about data beyond where it lies."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class DataOptions:
    """Names of fields and files; None: the default that the README gives."""

    text_field: str | None = None
    """JSONL field or CSV column of the text."""
    label_field: str | None = None
    """JSONL field or CSV column of the label; several columns are joined by commas."""
    labels: str | None = None
    """`.npy` file of labels beside a single `.npy` array of data."""
    heldout_labels: str | None = None
    """The same for the held-out array."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenData:
    """The data that a peer gives to runs whose peers feed their own; paths are absolute."""

    path: str
    heldout: str | None = None
    """Data to evaluate on; None: a fixed part of the data is kept apart."""
    options: DataOptions = field(default_factory=DataOptions)
