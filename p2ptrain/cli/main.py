"""The `p2ptrain` command: its subcommands, and the one place where errors become exit codes."""

from __future__ import annotations

import os
import sys
import traceback
from typing import NoReturn

import click

from p2ptrain.cli.bundle import bundle
from p2ptrain.cli.demonstrate import demo
from p2ptrain.cli.doctor import doctor
from p2ptrain.cli.group import group
from p2ptrain.cli.join import join
from p2ptrain.cli.leave import leave
from p2ptrain.cli.plan import plan
from p2ptrain.cli.speech import say, say_error
from p2ptrain.cli.status import energy, status
from p2ptrain.cli.train import train
from p2ptrain.errors import ConfigError, Interrupted, InvariantBroken, P2PTrainError, unwrap


def _print_version(context: click.Context, _parameter: click.Parameter, wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        click.echo(f"p2ptrain {version('p2ptrain')}")
        context.exit()


@click.group(
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option(
    "--version",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_print_version,
    help="Print the version and exit.",
)
@click.option("--verbose", is_flag=True, expose_value=False, help="Show tracebacks of errors.")
@click.pass_context
def cli(context: click.Context) -> None:
    """Train one model together on the devices you already own, without a cloud.

    On the first device: p2ptrain group create home, then p2ptrain join --group home. See
    README.md for the rest; P2PTRAIN_HOME names the folder that holds keys and checkpoints.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


for _command in (group, join, leave, train, plan, status, energy, doctor, bundle, demo):
    cli.add_command(_command)


def main() -> NoReturn:
    """Run the command of this process and exit with its code."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command line; every failure is printed as a sentence and a next move.

    Returns:
        The exit code, by the table in `errors.py`.
    """
    try:
        # Not cli.main(): it prints its own words for Ctrl-C.
        with cli.make_context("p2ptrain", list(arguments)) as context:
            cli.invoke(context)
        sys.stdout.flush()
        return 0
    except click.exceptions.Exit as asked:
        return asked.exit_code
    except click.ClickException as error:
        return say_error(_usage_error(error))
    except (click.Abort, KeyboardInterrupt):
        return say_error(Interrupted("stopped", hint="run the command again"))
    except BrokenPipeError:
        # Whoever read our output has enough of it; keep the interpreter from flushing again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except BaseException as raised:
        if isinstance(raised, SystemExit | GeneratorExit):
            raise
        return _failed(raised, verbose="--verbose" in arguments)


def _usage_error(error: click.ClickException) -> P2PTrainError:
    context = getattr(error, "ctx", None)
    path = context.command_path if isinstance(context, click.Context) else "p2ptrain COMMAND"
    message = error.format_message().rstrip(".")
    return ConfigError(message[:1].lower() + message[1:], hint=f"see {path} --help")


def _failed(raised: BaseException, *, verbose: bool) -> int:
    if verbose:
        traceback.print_exception(raised)
    error = unwrap(raised)
    if isinstance(error, P2PTrainError):
        return say_error(error)
    if isinstance(error, KeyboardInterrupt):
        return say_error(Interrupted("stopped", hint="run the command again"))
    kind = (
        "a rule of p2ptrain itself is broken"
        if isinstance(error, InvariantBroken)
        else (f"unexpected {type(error).__name__}")
    )
    say(f"{kind}: {' '.join(str(error).split())}")
    say("hint: --verbose shows the traceback; please report it")
    return 1
