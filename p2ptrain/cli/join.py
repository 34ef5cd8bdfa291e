"""`p2ptrain join`: become a member if invited, then be the peer of this device."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from p2ptrain import limits
from p2ptrain.cli.options import Address, ByteSize, group_option, verbose_option
from p2ptrain.cli.speech import say
from p2ptrain.errors import ConfigError, NotFound

if TYPE_CHECKING:
    from p2ptrain.runtime.config import PeerConfig
    from p2ptrain.store.groups import Group
    from p2ptrain.store.home import Home


@click.command()
@group_option
@click.option(
    "--invite",
    type=click.Path(path_type=Path),
    help="The invite file, needed once on every device but the first.",
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
def join(group_name: str, invite: Path | None, **options: Any) -> None:  # Any: click's values
    """Run the peer of this device, in the foreground, until Ctrl-C.

    It finds the other members, answers the commands of this device and takes part in runs.
    """
    import trio

    trio.run(_join, group_name, invite, options)


async def _join(
    group_name: str,
    invite: Path | None,
    options: dict[str, Any],  # Any: click's values
) -> None:
    import trio

    from p2ptrain.store.home import open_home

    home = open_home()
    group = await _member(home, group_name, invite, options)
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_leave_on_signal, signals, nursery.cancel_scope)
            await _serve(home, group, options)
            nursery.cancel_scope.cancel()


async def _member(
    home: Home,
    group_name: str,
    invite: Path | None,
    options: dict[str, Any],  # Any: click's values
) -> Group:
    """The group of that name; when it is not known yet the invite lets this device in."""
    from p2ptrain.cli.local import device_name
    from p2ptrain.store.groups import load_group

    try:
        return load_group(home, group_name)
    except NotFound as error:
        if invite is None:
            raise NotFound(
                error.message,
                hint=f"ask a member for an invite: p2ptrain group invite {group_name}",
            ) from error
    from p2ptrain.trust.invite import read_invite

    invitation = read_invite(_read_invite_file(invite))
    if invitation.group_name != group_name:
        raise ConfigError(
            f"the invite is for group {invitation.group_name!r}, not {group_name!r}",
            hint=f"use --group {invitation.group_name}",
        )
    from p2ptrain.net.enrol import enrol

    name = options["name"] or device_name()
    group = await enrol(invitation, home=home, device_name=name, addresses=options["peers"])
    say(f"became a member of {group.name} as {group.device_name}")
    return group


def _read_invite_file(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(limits.INVITE_BYTES_MAX + 1)
    except OSError as error:
        raise NotFound(
            f"cannot read the invite {path}: {error.strerror}",
            hint="ask a member for a new one: p2ptrain group invite NAME",
        ) from error


async def _serve(home: Home, group: Group, options: dict[str, Any]) -> None:  # Any: click's values
    import p2ptrain

    async with p2ptrain.open_peer(
        group.id, home=home.path, config=_config(p2ptrain.PeerConfig, options)
    ) as peer:
        status = peer.status()
        say(f"{status.name} joined {status.group_name}, listening at {status.address}")
        say(f"discovery: {status.discovery}")
        await peer.serve()


def _config(make: type[PeerConfig], options: dict[str, Any]) -> PeerConfig:  # Any: click's values
    return make(
        name=options["name"],
        port=options["port"],
        listen_host=options["listen"],
        peers=tuple(options["peers"]),
        memory_bytes=options["memory_bytes"],
        threads=options["threads"],
        interfaces=tuple(options["interfaces"]) or None,
        discovery=not options["no_discovery"],
    )


async def _leave_on_signal(signals: Any, scope: Any) -> None:  # Any: trio is not imported
    async for number in signals:
        say(f"leaving after {signal.Signals(number).name}; other peers go on")
        scope.cancel()
