"""Read the small text files of /sys and /proc; what cannot be read is None."""

from __future__ import annotations

from pathlib import Path
from typing import Final

FILE_BYTES_MAX: Final = 1 << 20


def read_text(path: Path) -> str | None:
    """The stripped text of a file; None when it is missing, unreadable or not text."""
    try:
        with path.open("rb") as file:
            return file.read(FILE_BYTES_MAX).decode().strip()
    except (OSError, UnicodeDecodeError):
        return None


def read_integer(path: Path) -> int | None:
    """A file that holds one decimal integer; None when it does not."""
    text = read_text(path)
    try:
        return None if text is None else int(text)
    except ValueError:
        return None


def directories(parent: Path) -> list[Path]:
    """The directories below `parent` by name, links followed; none when it cannot be listed."""
    try:
        return sorted(path for path in parent.iterdir() if path.is_dir())
    except OSError:
        return []
