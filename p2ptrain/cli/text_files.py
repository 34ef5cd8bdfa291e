"""Small text files that options name."""

from __future__ import annotations

from pathlib import Path

from p2ptrain.errors import ConfigError, NotFound

FILE_BYTES_MAX = 64 * 1024


def read_text(path: str, option: str) -> str:
    """The text of a file.

    Raises:
        NotFound, ConfigError: it is not there, too large, or no text in UTF-8.
    """
    file = Path(path)
    try:
        if not file.is_file():
            raise NotFound(f"there is no file {path}", hint=f"check the path after {option}")
        if file.stat().st_size > FILE_BYTES_MAX:
            raise ConfigError(
                f"{path} is too large for {option}", hint=f"{FILE_BYTES_MAX} bytes at most"
            )
        return file.read_text(encoding="utf-8-sig")  # some editors begin with a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path} cannot be read: {error}", hint="it should be a text file in UTF-8"
        ) from error
