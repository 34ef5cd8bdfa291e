"""`p2ptrain group`: make a group's trust certificate, invite the next device."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from p2ptrain.cli.invite import invite
from p2ptrain.cli.members import members, revoke
from p2ptrain.cli.options import report_options
from p2ptrain.cli.passphrase import read_passphrase
from p2ptrain.cli.recovering import leave, recover, rotate
from p2ptrain.cli.speech import print_json, say
from p2ptrain.errors import ConfigError

if TYPE_CHECKING:
    from p2ptrain.store.groups import Group


@click.group(invoke_without_command=True)
@click.pass_context
def group(context: click.Context) -> None:
    """Make a group, invite devices into it, and put them out of it."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@group.command()
@click.argument("name")
@click.option(
    "--passphrase-file",
    type=click.Path(path_type=Path),
    help="Read the recovery passphrase from here. [default: ask]",
)
@click.option(
    "--recovery-file",
    type=click.Path(path_type=Path),
    help="Move the sealed root key here. [default: leave it in the group's folder]",
)
@report_options
def create(
    name: str, passphrase_file: Path | None, recovery_file: Path | None, as_json: bool
) -> None:
    """Make the trust certificate of a new group; this device is its first member.

    The root key exists only in the recovery file, sealed under the passphrase: keep it away from
    this device.
    """
    from p2ptrain.cli.local import device_name
    from p2ptrain.store.groups import create_group
    from p2ptrain.store.home import open_home

    if recovery_file is not None and recovery_file.exists():
        raise ConfigError(f"{recovery_file} exists already", hint="choose another --recovery-file")
    passphrase = read_passphrase(passphrase_file)
    made = create_group(open_home(), name, passphrase, device_name())
    kept = _move_recovery(made, recovery_file)
    if as_json:
        print_json({
            "version": 1, "group": made.id, "name": made.name, "device": made.device,
            "recovery_file": str(kept),
        })  # fmt: skip
        return
    click.echo(f"group {made.name} ({made.id}), this device is {made.device_name}")
    say(f"take {kept} to a safe place, away from this device")
    say(f"hint: start the peer with: p2ptrain join --group {made.name}")


def _move_recovery(made: Group, wanted: Path | None) -> Path:
    from p2ptrain.store.home import write_secret

    if wanted is None:
        return made.recovery_file
    try:
        write_secret(wanted, made.recovery_file.read_bytes())
    except OSError as error:
        raise ConfigError(
            f"cannot write {wanted}: {error.strerror}; the group was made",
            hint=f"move {made.recovery_file} to a safe place yourself",
        ) from error
    made.recovery_file.unlink()
    return wanted


for _command in (invite, members, revoke, rotate, recover, leave):
    group.add_command(_command)
