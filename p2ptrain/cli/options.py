"""Options that several commands share, and the kinds of value that they take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from p2ptrain.units import parse_bytes

_F = TypeVar("_F", bound=Callable[..., Any])  # Any: commands of every signature


class ByteSize(click.ParamType):  # type: ignore[type-arg] # generic since click 8.2 only
    """A size with a unit: 512MiB, 2GiB."""

    name = "size"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        """Bytes; a usage error when `value` is not a size."""
        if isinstance(value, int):
            return value
        try:
            return parse_bytes(str(value))
        except (ValueError, OverflowError):
            self.fail(f"{value!r} is not a size such as 512MiB or 2GiB", param, ctx)


class Address(click.ParamType):  # type: ignore[type-arg] # as above
    """host:port, with IPv6 hosts in brackets."""

    name = "host:port"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> str:
        """The address as given; a usage error when it is none."""
        text = str(value)
        host, _, port = text.rpartition(":")
        bracketed = host.startswith("[") and host.endswith("]")
        if not host or (":" in host and not bracketed) or not _is_port(port):
            self.fail(f"{text!r} is not host:port", param, ctx)
        return text


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdigit() and 1 <= int(text) <= 65_535


def group_option(command: _F) -> _F:
    """`--group NAME`."""
    return click.option(
        "--group",
        "group_name",
        metavar="NAME",
        required=True,
        help="The group, by the name that this device knows it by.",
    )(command)


def report_options(command: _F) -> _F:
    """`--json` and `--verbose`."""
    with_json = click.option(
        "--json", "as_json", is_flag=True, help="Print one JSON object on stdout."
    )(command)
    return verbose_option(with_json)


def verbose_option(command: _F) -> _F:
    """`--verbose`, which the one place that prints errors looks for."""
    return click.option(
        "--verbose", is_flag=True, expose_value=False, help="Show tracebacks of errors."
    )(command)
