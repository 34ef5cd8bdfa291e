"""`p2ptrain group invite`: a code, an invite file or a QR code for one more device."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from p2ptrain.cli.options import Address, report_options
from p2ptrain.cli.speech import print_json, say
from p2ptrain.errors import ConfigError, PeerNotRunning

if TYPE_CHECKING:
    from p2ptrain.store.groups import Group

FILE_MINUTES: Final = 60
QR_MINUTES: Final = 24 * 60


@click.command()
@click.argument("name")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Write an invite file instead of showing a code; carry it by a way you trust.",
)
@click.option(
    "--qr",
    is_flag=True,
    help="Show a QR code and its URL instead, for a device without a keyboard.",
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
    help="How long a file or QR code is good for. [default: 60, with --qr a day; a code has 10]",
)
@click.option("--no-admit", is_flag=True, help="The new member may not admit others in turn.")
@report_options
def invite(
    name: str,
    out: Path | None,
    qr: bool,
    addresses: tuple[str, ...],
    minutes: int | None,
    no_admit: bool,
    as_json: bool,
) -> None:
    """Invite one device; by default with a code to type there, within ten minutes.

    The peer of this device must be running when the new device joins. A code is good for one
    device and three tries. A file or QR code holds addresses and a secret that works once, and no
    key: whoever sees it can join in your device's stead.
    """
    from p2ptrain.store.groups import load_group
    from p2ptrain.store.home import open_home

    if out is not None and qr:
        raise ConfigError("--out and --qr exclude each other")
    found = load_group(open_home(), name)
    if out is not None or qr:
        _show_secret(found, out, addresses, minutes, admits=not no_admit, as_json=as_json)
    elif minutes is not None:
        raise ConfigError(
            "a code is good for ten minutes", hint="give --minutes with --out or --qr"
        )
    else:
        _show_code(found, addresses, admits=not no_admit, as_json=as_json)


def _show_code(found: Group, addresses: tuple[str, ...], *, admits: bool, as_json: bool) -> None:
    from p2ptrain.trust.code import CODE_LIFE_S, CODE_TRIES

    code, is_running = _open_code(found, admits=admits)
    reachable = addresses or _own_addresses(found)
    if as_json:
        print_json({
            "version": 1, "group": found.id, "code": code, "minutes": CODE_LIFE_S // 60,
            "tries": CODE_TRIES, "addresses": list(reachable), "peer_running": is_running,
        })  # fmt: skip
        return
    click.echo(code)
    say(f"good for one device, {CODE_LIFE_S // 60} minutes and {CODE_TRIES} tries")
    if not is_running:
        say(f"start this device's peer, which lets it in: p2ptrain join --group {found.name}")
    line = f"p2ptrain join --group {found.name} --code {code}"
    say(f"hint: there, run: {line} (and --peer {reachable[0]} if it does not find this device)")


def _open_code(found: Group, *, admits: bool) -> tuple[str, bool]:
    """By the running peer, which then announces it, or on disk for the one that starts."""
    from p2ptrain.cli.asking import ask
    from p2ptrain.cli.local import peer_socket
    from p2ptrain.store.codes import create_code

    try:
        answer = ask(peer_socket(found.id), "invite_code", {"admits": admits})
        return str(answer["code"]), True
    except PeerNotRunning:
        return create_code(found, admits=admits), False


def _show_secret(
    found: Group,
    out: Path | None,
    addresses: tuple[str, ...],
    minutes: int | None,
    *,
    admits: bool,
    as_json: bool,
) -> None:
    from p2ptrain.store.groups import create_invite
    from p2ptrain.trust.invite import invite_url, read_invite

    if out is not None and out.exists():
        raise ConfigError(f"{out} exists already", hint="remove it, or choose another --out")
    reachable = addresses or _own_addresses(found)
    life = minutes or (FILE_MINUTES if out is not None else QR_MINUTES)
    content = create_invite(found, reachable, life * 60.0, admits=admits)
    document: dict[str, object] = {"version": 1, "addresses": list(reachable), "group": found.id}
    document["minutes"] = life
    if out is not None:
        _write_private(out, content)
        document["invite"] = str(out)
        lines, there = [str(out)], f"--invite {out.name}"
    else:
        url = invite_url(read_invite(content))
        document["url"] = url
        lines, there = [*([] if as_json else _qr_lines(url)), url], "--invite 'URL'"
    if as_json:
        print_json(document)
        return
    for line in lines:
        click.echo(line)
    say(f"good for one device and {life} minutes, at {', '.join(reachable)}")
    say(f"hint: there, run: p2ptrain join --group {found.name} {there}")


def _qr_lines(text: str) -> list[str]:
    """A QR code in half-height blocks, dark on light; a remark where it cannot be drawn."""
    try:
        import segno
    except ImportError:
        say("the QR code needs a small package: pip install 'p2ptrain[qr]'; here is its URL")
        return []
    border = 2
    rows = [list(row) for row in segno.make_qr(text, error="l").matrix_iter(border=border)]
    if len(rows) % 2:
        rows.append([0] * len(rows[0]))
    # A terminal is dark as a rule, so what is light in the QR code is drawn.
    blocks = {(0, 0): "\u2588", (0, 1): "\u2580", (1, 0): "\u2584", (1, 1): " "}
    pairs = zip(rows[::2], rows[1::2], strict=True)
    return [
        "".join(blocks[bool(a), bool(b)] for a, b in zip(upper, lower, strict=True))
        for upper, lower in pairs
    ]


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
