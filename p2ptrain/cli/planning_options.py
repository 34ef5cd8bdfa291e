"""Options that `plan` and `train` share: what is best, how much work there is, and how it is done.

Choices are spelled here once; a test holds them against the cores', which a quick `--help` does not
load.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final, TypeVar

import click

from p2ptrain import limits

_F = TypeVar("_F", bound=Callable[..., Any])  # Any: commands of every signature

GOALS: Final = ("time", "energy")
SCHEDULES: Final = ("1f1b", "gpipe", "zb-h1", "eager-1f1b", "eager-zb-h1")
CODECS: Final = ("fp32", "bf16", "int8")
PARALLELISMS: Final = ("pipeline", "auto", "data", "tensor", "sequence", "hybrid")
AUTO: Final = "auto"
COUNT: Final = click.IntRange(min=1)
_STEPS: Final = click.IntRange(min=1, max=limits.STEPS_MAX)
_MICROBATCHES: Final = click.IntRange(min=1, max=limits.MICROBATCHES_MAX)
_SIZES: Final = click.IntRange(min=1, max=limits.MICROBATCH_SIZE_MAX)


class _Limit(click.ParamType):  # type: ignore[type-arg] # generic since click 8.2 only
    """Seconds or joules: more than nothing, and not more than a run could ever take."""

    name = "float"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """The number; a usage error when it is none, or out of range."""
        try:
            number = float(str(value))
        except ValueError:
            number = math.nan
        if not 0 < number <= limits.OBJECTIVE_MAX:
            self.fail(
                f"{value!r:.40} is not a number above 0, at most {limits.OBJECTIVE_MAX:g}",
                param, ctx,
            )  # fmt: skip
        return number


def objective_options(command: _F) -> _F:
    """`--objective`, `--deadline` and `--joules`."""
    options = (
        click.option(
            "--objective",
            type=click.Choice(GOALS),
            default="time",
            show_default=True,
            help="What is least: seconds, or joules of all devices that take part.",
        ),
        click.option("--deadline", type=_Limit(), help="Seconds for all steps."),
        click.option("--joules", type=_Limit(), help="Joules for all steps."),
    )
    return _with(command, options)


class _CountOrAuto(click.ParamType):  # type: ignore[type-arg] # generic since click 8.2 only
    """A number, or `auto`."""

    name = "number or auto"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | str:
        """The number, or `auto`; a usage error when it is none of the two."""
        text = str(value)
        if text == AUTO:
            return text
        most, digits = limits.MICROBATCH_SIZE_MAX, text.isascii() and text.isdigit()
        if not digits or len(text) > len(str(most)) or not 1 <= int(text) <= most:
            self.fail(f"{text!r:.40} is not a number from 1 to {most}, or auto", param, ctx)
        return int(text)


def work_options(*, choosable: bool) -> Callable[[_F], _F]:
    """`--steps`, `--microbatches` and `--microbatch-size`.

    Args:
        choosable: The size may be left to the planner.
    """
    also = "; auto: so that a step is shortest" if choosable else ""
    options: tuple[Callable[[_F], _F], ...] = (
        click.option(
            "--steps", type=_STEPS, default=100, show_default=True, help="Optimizer updates."
        ),
        click.option(
            "--microbatches", type=_MICROBATCHES, default=8, show_default=True,
            help="Microbatches per step.",
        ),
        click.option(
            "--microbatch-size", type=_CountOrAuto() if choosable else _SIZES, default=4,
            show_default=True, help=f"Samples in each{also}.",
        ),
    )  # fmt: skip
    return lambda command: _with(command, options)


def way_options(*, choosable: bool) -> Callable[[_F], _F]:
    """`--schedule`, `--codec` and `--rematerialise`.

    Args:
        choosable: The codec may be left to the planner, too.
    """
    auto = (AUTO,) if choosable else ()
    also = "; auto: where a step is shorter for it" if choosable else ""
    again = "Save memory: compute the forward again for the backward. Same bits, a third slower"
    options: tuple[Callable[[_F], _F], ...] = (
        click.option(
            "--schedule",
            type=click.Choice([AUTO, *SCHEDULES]),
            default=AUTO,
            show_default=True,
            help="The order of the passes, which changes no bit; auto: the shortest step that "
            "memory allows. zb-h1 computes weights' gradients where 1f1b would idle, eager ones "
            "give tensors more time on their way for more memory. Stages that several devices "
            "share run without zb-h1.",
        ),
        click.option(
            "--codec",
            type=click.Choice([*CODECS, *auto]),
            default="fp32",
            show_default=True,
            help="How tensors go between devices: exact, in half, or in a quarter of the bytes"
            f"{also}.",
        ),
        click.option("--rematerialise", is_flag=True, help=f"{again}."),
    )  # fmt: skip
    return lambda command: _with(command, options)


def _with(command: _F, options: tuple[Callable[[_F], _F], ...]) -> _F:
    for option in reversed(options):
        command = option(command)
    return command
