"""`p2ptrain join`: become a member if invited, then be the peer of this device."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from p2ptrain import limits
from p2ptrain.cli.options import Address, ByteSize, group_option, verbose_option
from p2ptrain.cli.speech import say
from p2ptrain.errors import ConfigError, NotFound

if TYPE_CHECKING:
    from p2ptrain.net.enrol import Enrolled
    from p2ptrain.runtime.config import PeerConfig
    from p2ptrain.runtime.peer import Peer
    from p2ptrain.store.groups import Group
    from p2ptrain.store.home import Home


@click.command()
@group_option
@click.option("--code", help="The code that a member shows; once, on every device but the first.")
@click.option(
    "--invite", metavar="FILE or URL", help="Or the invite file, or the URL of a QR code; once."
)
@click.option(
    "--peer", "peers", type=Address(), multiple=True, help="Where another peer is; repeatable."
)
@click.option(
    "--port",
    type=click.IntRange(0, 65_535),
    default=limits.PEER_PORT_DEFAULT,
    show_default=True,
    help="Where to listen; 0 for any free port.",
)
@click.option(
    "--listen", metavar="HOST", default="0.0.0.0", show_default=True, help="Address to listen at."
)
@click.option(
    "--memory", "memory_bytes", type=ByteSize(), help="The most that runs may use, as 2GiB."
)
@click.option("--threads", type=click.IntRange(min=1), help="The most compute threads to use.")
@click.option(
    "--battery-reserve",
    "battery_reserve_percent",
    metavar="PERCENT",
    type=click.IntRange(0, limits.BATTERY_RESERVE_PERCENT_MAX),
    default=limits.BATTERY_LEAVE_PERCENT,
    show_default=True,
    help="Of a full battery: what runs may not spend; there this device leaves them.",
)
@click.option(
    "--data",
    metavar="PATH",
    help="Data that this device feeds in runs with --own-data; it never leaves the device.",
)
@click.option("--name", help="What others call this device. [default: its host name]")
@click.option(
    "--interface",
    "interfaces",
    metavar="ADDRESS",
    multiple=True,
    help="Look for peers only on the interface with this address; repeatable.",
)
@click.option("--no-discovery", is_flag=True, help="Do not look for peers; use --peer only.")
@verbose_option
def join(
    group_name: str, code: str | None, invite: str | None, **options: Any
) -> None:  # Any: click's values
    """Run the peer of this device, in the foreground, until Ctrl-C.

    It finds the other members, answers the commands of this device and takes part in runs.
    """
    import trio

    if code is not None and invite is not None:
        raise ConfigError("--code and --invite exclude each other")
    options["data"] = _absolute(options["data"])
    trio.run(_join, group_name, code, invite, options)


def _absolute(data: str | None) -> str | None:
    """Where the given data lies, looked at before a one-time code is used up; ConfigError where
    there is nothing."""
    from p2ptrain.runtime.config import given_data

    path = None if data is None else os.path.abspath(data)
    given_data({}, path)
    return path


async def _join(
    group_name: str,
    code: str | None,
    invite: str | None,
    options: dict[str, Any],  # Any: click's values
) -> None:
    import trio

    from p2ptrain.store.home import open_home

    home = open_home()
    group = await _member(home, group_name, code, invite, options)
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:
            await _serve(home, group, options, signals, nursery)
            nursery.cancel_scope.cancel()


async def _member(
    home: Home,
    group_name: str,
    code: str | None,
    invite: str | None,
    options: dict[str, Any],  # Any: click's values
) -> Group:
    """The group of that name; when it is not known yet a code or an invite lets this device in."""
    from p2ptrain.cli.local import device_name
    from p2ptrain.store.groups import load_group

    try:
        return load_group(home, group_name)
    except NotFound as error:
        if code is None and invite is None:
            raise NotFound(
                error.message,
                hint=f"ask a member for a code: p2ptrain group invite {group_name}",
            ) from error
    name = options["name"] or device_name()
    if code is not None:
        enrolled = await _enrol_with_code(home, group_name, code, name, options)
    else:
        enrolled = await _enrol(home, group_name, str(invite), name, options)
    group = enrolled.group
    say(f"became a member of {group.name} as {group.device_name}")
    if enrolled.clock_is_wrong:
        say(_wrong_clock(enrolled.clock_ahead_s))
    return group


async def _enrol(
    home: Home,
    group_name: str,
    invite: str,
    name: str,
    options: dict[str, Any],  # Any: click's values
) -> Enrolled:
    from p2ptrain.net.enrol import enrol
    from p2ptrain.trust.invite import URL_PREFIX, read_invite, read_invite_url

    is_url = invite.startswith(URL_PREFIX.partition("//")[0])
    invitation = read_invite_url(invite) if is_url else read_invite(_read_invite_file(Path(invite)))
    if invitation.group_name != group_name:
        raise ConfigError(
            f"the invite is for group {invitation.group_name!r}, not {group_name!r}",
            hint=f"use --group {invitation.group_name}",
        )
    return await enrol(invitation, home=home, device_name=name, addresses=options["peers"])


async def _enrol_with_code(
    home: Home,
    group_name: str,
    code: str,
    name: str,
    options: dict[str, Any],  # Any: click's values
) -> Enrolled:
    from p2ptrain.net.enrol import enrol_with_code
    from p2ptrain.net.find_sponsors import find_sponsors
    from p2ptrain.trust.code import read_code

    read_code(code)  # before anybody is looked for
    sponsors: tuple[tuple[str, ...], ...] = tuple((address,) for address in options["peers"])
    if not sponsors and not options["no_discovery"]:
        say("looking for the member that shows this code")
        sponsors = await find_sponsors(tuple(options["interfaces"]) or None)
    return await enrol_with_code(
        code, home=home, alias=group_name, device_name=name, sponsors=sponsors
    )


def _wrong_clock(ahead_s: float) -> str:
    from p2ptrain.units import format_span

    relation = "behind" if ahead_s > 0 else "ahead of"
    return (
        f"this device's clock is {format_span(abs(ahead_s))} {relation} its sponsor's, whose "
        "time is used until the clock is set"
    )


def _read_invite_file(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(limits.INVITE_BYTES_MAX + 1)
    except OSError as error:
        raise NotFound(
            f"cannot read the invite {path}: {error.strerror}",
            hint="ask a member for a new one: p2ptrain group invite NAME",
        ) from error


async def _serve(
    home: Home,
    group: Group,
    options: dict[str, Any],  # Any: click's values
    signals: Any,  # Any: trio is not imported
    nursery: Any,  # Any: the same
) -> None:
    import p2ptrain

    async with p2ptrain.open_peer(
        group.id, home=home.path, config=_config(p2ptrain.PeerConfig, options)
    ) as peer:
        status = peer.status()
        say(f"{status.name} joined {status.group_name}, listening at {status.address}")
        say(f"discovery: {status.discovery}")
        nursery.start_soon(_leave_on_signal, signals, nursery, peer)
        await peer.serve()


def _config(make: type[PeerConfig], options: dict[str, Any]) -> PeerConfig:  # Any: click's values
    return make(
        name=options["name"],
        port=options["port"],
        listen_host=options["listen"],
        peers=tuple(options["peers"]),
        memory_bytes=options["memory_bytes"],
        threads=options["threads"],
        battery_reserve_percent=options["battery_reserve_percent"],
        data=options["data"],
        interfaces=tuple(options["interfaces"]) or None,
        discovery=not options["no_discovery"],
    )


async def _leave_on_signal(signals: Any, nursery: Any, peer: Peer) -> None:
    """The first signal leaves gracefully, the second at once."""  # Any: trio is not imported
    leaving = False
    async for number in signals:
        name = signal.Signals(number).name
        if leaving:
            say(f"left at once after a second {name}")
            nursery.cancel_scope.cancel()
            return
        leaving = True
        if peer.status().run is not None:
            say(f"handing over after {name}; once more leaves at once")
        nursery.start_soon(_leave, peer)


async def _leave(peer: Peer) -> None:
    problem = await peer.leave()
    if problem is not None:
        say(f"left without handing over: {problem}")
    say("left; the other peers go on")
