"""Ask for the passphrase of a recovery file, or read it from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import click

from p2ptrain.errors import ConfigError

PASSPHRASE_BYTES_MAX: Final = 1024


def read_passphrase(
    path: Path | None, *, what: str = "recovery passphrase", is_new: bool = True
) -> str:
    """The passphrase; a new one is asked for twice.

    Raises:
        ConfigError: the file cannot be read, or does not hold one.
    """
    if path is None:
        answer: str = click.prompt(what, hide_input=True, confirmation_prompt=is_new, err=True)
        return answer
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    if len(content) > PASSPHRASE_BYTES_MAX:
        raise ConfigError(f"{path} is too long for a passphrase")
    try:
        return content.decode().rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not text") from error
