"""`p2ptrain group`: make a group's trust certificate, invite the next device."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from p2ptrain.cli.members import members, revoke
from p2ptrain.cli.options import Address, report_options
from p2ptrain.cli.speech import print_json, say
from p2ptrain.errors import ConfigError, PeerNotRunning

if TYPE_CHECKING:
    from p2ptrain.store.groups import Group

PASSPHRASE_BYTES_MAX: Final = 1024
INVITE_MINUTES: Final = 60


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
    passphrase = _passphrase(passphrase_file)
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


def _passphrase(path: Path | None) -> str:
    if path is None:
        answer: str = click.prompt(
            "recovery passphrase", hide_input=True, confirmation_prompt=True, err=True
        )
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


@group.command()
@click.argument("name")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="The invite file. [default: NAME.invite in this folder]",
)
@click.option(
    "--address",
    "addresses",
    type=Address(),
    multiple=True,
    help="Where the new device finds this one. [default: as the running peer says]",
)
@click.option(
    "--minutes",
    type=click.IntRange(1, 10_080),
    default=INVITE_MINUTES,
    show_default=True,
    help="How long the invite is good for.",
)
@report_options
def invite(
    name: str, out: Path | None, addresses: tuple[str, ...], minutes: int, as_json: bool
) -> None:
    """Write an invite file for one device; carry it there by a way you trust.

    It holds addresses and a secret that works once, and no key. The peer of this device must be
    running when the new device joins.
    """
    from p2ptrain.store.groups import create_invite, load_group
    from p2ptrain.store.home import open_home

    found = load_group(open_home(), name)
    path = out if out is not None else Path(f"{found.name}.invite")
    if path.exists():
        raise ConfigError(f"{path} exists already", hint="remove it, or choose another --out")
    reachable = addresses or _own_addresses(found)
    content = create_invite(found, reachable, minutes * 60.0)
    _write_private(path, content)
    if as_json:
        document = {"version": 1, "invite": str(path), "addresses": list(reachable)}
        print_json({**document, "group": found.id, "minutes": minutes})
        return
    click.echo(str(path))
    say(f"good for one device and {minutes} minutes, at {', '.join(reachable)}")
    say(f"hint: there, run: p2ptrain join --group {found.name} --invite {path.name}")


def _own_addresses(found: Group) -> tuple[str, ...]:
    """Where the running peer listens, or the best guess when none runs."""
    from p2ptrain import limits
    from p2ptrain.cli.asking import ask
    from p2ptrain.cli.local import guess_address, peer_socket
    from p2ptrain.runtime.reports import PeerStatus
    from p2ptrain.wire.codec import from_plain

    try:
        status = from_plain(PeerStatus, ask(peer_socket(found.id), "status"))
    except PeerNotRunning:
        guess = guess_address(limits.PEER_PORT_DEFAULT)
        say(f"no peer runs here; guessing that it will be at {guess}")
        return (guess,)
    own = [m.addresses for m in status.members if m.device == status.device]
    return own[0] if own and own[0] else (status.address,)


def _write_private(path: Path, content: bytes) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error


for _command in (members, revoke):
    group.add_command(_command)
