"""`p2ptrain group rotate`, `recover` and `leave`: what needs the root's key, and the way out."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from p2ptrain.cli.options import report_options
from p2ptrain.cli.passphrase import read_passphrase
from p2ptrain.cli.speech import print_json, say
from p2ptrain.errors import ConfigError, PeerAlreadyRunning, PeerNotRunning

if TYPE_CHECKING:
    from p2ptrain.store.groups import Group
    from p2ptrain.store.home import Home
    from p2ptrain.trust.rotation import Rotation

RECOVERY_BYTES_MAX: Final = 4 * 1024 * 1024
PEER_ENDS_S: Final = 30.0
_POLL_S: Final = 0.1

_recovery_option = click.option(
    "--recovery-file",
    type=click.Path(path_type=Path),
    required=True,
    help="The sealed root key that group create, or the last rotation, wrote.",
)
_passphrase_option = click.option(
    "--passphrase-file",
    type=click.Path(path_type=Path),
    help="Read its passphrase from here. [default: ask]",
)


@click.command()
@click.argument("name")
@_recovery_option
@_passphrase_option
@click.option(
    "--new-recovery-file",
    type=click.Path(path_type=Path),
    required=True,
    help="Write the new root's sealed key here.",
)
@click.option(
    "--new-passphrase-file",
    type=click.Path(path_type=Path),
    help="Read the new passphrase from here. [default: ask]",
)
@report_options
def rotate(
    name: str,
    recovery_file: Path,
    passphrase_file: Path | None,
    new_recovery_file: Path,
    new_passphrase_file: Path | None,
    as_json: bool,
) -> None:
    """Replace the group's root, because its recovery file was seen, lost or is old.

    The old root names the new one, and members move over by themselves. Both are trusted until all
    known members have moved, at the longest for 30 days. The group keeps its name and id.
    """
    from p2ptrain.store.groups import load_group
    from p2ptrain.store.home import open_home, write_secret
    from p2ptrain.store.recovering import sign_rotation

    if new_recovery_file.exists():
        raise ConfigError(f"{new_recovery_file} exists already", hint="choose another file")
    home = open_home()
    group = load_group(home, name)
    content = _read_recovery(recovery_file)
    old = read_passphrase(passphrase_file, what="old recovery passphrase", is_new=False)
    new = read_passphrase(new_passphrase_file, what="new recovery passphrase")
    made = sign_rotation(group, content, old, new)
    try:
        # Before anybody hears of the new root: without its key the group has no way back.
        write_secret(new_recovery_file, made.recovery)
    except OSError as error:
        raise ConfigError(f"cannot write {new_recovery_file}: {error.strerror}") from error
    told = _spread(home, group, made.rotation)
    if as_json:
        print_json({
            "version": 1, "group": group.id, "rotation": made.rotation.number,
            "recovery_file": str(new_recovery_file), "moved": list(made.moved),
            "peer_running": told is not None, "told": told or 0,
        })  # fmt: skip
        return
    click.echo(f"group {group.name} has root {made.rotation.number + 1}")
    say(f"take {new_recovery_file} to a safe place; the old file opens nothing any more")
    if told is None:
        say("no peer runs here: nobody else knows yet")
        say(f"hint: start it, so that it tells the others: p2ptrain join --group {group.name}")
    else:
        say(f"told {told} members; the old root is trusted until all have moved, 30 days at most")


@click.command()
@click.argument("name")
@_recovery_option
@_passphrase_option
@click.option("--device-name", help="What others call this device. [default: its host name]")
@report_options
def recover(
    name: str,
    recovery_file: Path,
    passphrase_file: Path | None,
    device_name: str | None,
    as_json: bool,
) -> None:
    """Make this device a member with the root's key: when no member is left, or it was revoked.

    It gets fresh keys, certified by the root itself, whatever it was before in this group. A device
    that knows nothing of the group needs the recovery file only.
    """
    from p2ptrain.cli.local import device_name as host_name
    from p2ptrain.store.home import open_home
    from p2ptrain.store.recovering import recover as recover_member

    content = _read_recovery(recovery_file)
    passphrase = read_passphrase(passphrase_file, is_new=False)
    group = recover_member(open_home(), name, content, passphrase, device_name or host_name())
    if as_json:
        print_json({
            "version": 1, "group": group.id, "name": group.name, "device": group.device,
        })  # fmt: skip
        return
    click.echo(f"this device is {group.device_name} ({group.device}) in group {group.name}")
    say(f"hint: start the peer with: p2ptrain join --group {group.name}")


@click.command()
@click.argument("name")
@click.option("--yes", is_flag=True, help="Do not ask.")
@report_options
def leave(name: str, yes: bool, as_json: bool) -> None:
    """Leave a group for good: this device's keys are voided and deleted.

    A running peer hands over its part of a run first, tells the others, and ends. Members that this
    device had admitted stay.
    """
    from p2ptrain.store.groups import find_issuer, load_group
    from p2ptrain.store.home import open_home

    home = open_home()
    group = load_group(home, name)
    if not yes:
        click.confirm(f"delete this device's keys of group {group.name}?", abort=True, err=True)
    may_void = find_issuer(group) is not None
    handed_over, was_running = _end_peer(home, group)
    _forget(home, group)
    is_void = was_running and may_void
    if as_json:
        print_json({
            "version": 1, "group": group.id, "name": group.name, "told": is_void,
            "not_handed_over": handed_over,
        })  # fmt: skip
        return
    click.echo(f"left group {group.name}")
    if handed_over is not None:
        say(f"nothing was handed over: {handed_over}")
    if not is_void:
        say("the members were not told that this device's keys are void")
        say(f"hint: on a member, run: p2ptrain group revoke {group.device_name} --reason left")


def _end_peer(home: Home, group: Group) -> tuple[str | None, bool]:
    """Why nothing was handed over, if so; and whether a peer was running."""
    from p2ptrain.cli.asking import ask
    from p2ptrain.store.home import control_socket_path

    try:
        answer = ask(control_socket_path(home, group.id), "leave_group")
    except PeerNotRunning:
        return None, False
    problem = answer.get("not_handed_over")
    return (None if problem is None else str(problem)), True


def _forget(home: Home, group: Group) -> None:
    """Once the peer's process has ended."""
    from p2ptrain.store.recovering import forget

    until_s = time.monotonic() + PEER_ENDS_S
    while True:
        try:
            forget(home, group)
            return
        except PeerAlreadyRunning:
            if time.monotonic() >= until_s:
                raise
            time.sleep(_POLL_S)


def _spread(home: Home, group: Group, rotation: Rotation) -> int | None:
    """How many members the running peer told; None: it is on disk for the peer that starts."""
    from p2ptrain.cli.asking import ask
    from p2ptrain.store.home import control_socket_path, lock_group
    from p2ptrain.store.trust_log import append_statements
    from p2ptrain.wire.codec import to_plain

    try:
        answer = ask(control_socket_path(home, group.id), "rotate", to_plain(rotation))
        return int(answer["told"])
    except PeerNotRunning:
        with lock_group(home, group.id):
            append_statements(group.folder, [rotation])
        return None


def _read_recovery(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(RECOVERY_BYTES_MAX + 1)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    if len(content) > RECOVERY_BYTES_MAX:
        raise ConfigError(f"{path} is too large for a recovery file")
    return content
