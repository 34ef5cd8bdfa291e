"""What the command says: data on stdout, all else on stderr after `p2ptrain:`."""

from __future__ import annotations

import json

import click

from p2ptrain.errors import P2PTrainError


def say(text: str) -> None:
    """One line about what happens, on stderr."""
    click.echo(f"p2ptrain: {text}", err=True)


def say_error(error: P2PTrainError) -> int:
    """The sentence and the next move, on stderr; gives the exit code."""
    message = _printable(error.message)
    starts_a_sentence = message[1:2].islower() or message[1:2] == " "
    say(message[:1].lower() + message[1:] if starts_a_sentence else message)
    if error.hint:
        say(f"hint: {_printable(error.hint)}")
    return error.exit_code


def _printable(text: str) -> str:
    """One line without control characters: parts of it may come from other devices."""
    return "".join(c if c.isprintable() else " " for c in text)


def print_json(document: object) -> None:
    """One JSON object on stdout."""
    click.echo(json.dumps(document, indent=None))
