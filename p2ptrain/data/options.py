"""What a person says about data beyond where it lies."""

from __future__ import annotations

from dataclasses import dataclass


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
