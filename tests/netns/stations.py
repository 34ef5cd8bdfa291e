"""Real peers at the stations of an emulated network, as `p2ptrain join` starts them."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import trio

from p2ptrain import limits
from p2ptrain.demo.group import GROUP_NAME, make_peers, write_invites
from tests.e2e.peers import Member, PeerProcess, ended_afterwards, wait_all_together
from tools.wifi_emulator.wifi import Wifi


@dataclass(frozen=True, slots=True, kw_only=True)
class StationMember(Member):
    """A peer in a station's namespace, with the options a person would give: next to none."""

    prefix: tuple[str, ...]

    def command(self, addresses: tuple[str, ...]) -> list[str]:
        """`join` on the default port of its own network, with discovery on."""
        line = [*self.prefix, self.python, "-m", "p2ptrain", "join", "--group", GROUP_NAME]
        line += ["--name", self.name, "--threads", "1"]
        line += ["--invite", str(self.invite)] if self.invite.exists() else []
        for address in addresses:
            line += ["--peer", address]
        return [*line, *self.options]


def address(air: Wifi, station: str) -> str:
    """host:port of the peer at a station."""
    return f"{air.addresses[station]}:{limits.PEER_PORT_DEFAULT}"


def members(
    air: Wifi, directory: Path, options: Mapping[str, tuple[str, ...]] | None = None
) -> tuple[StationMember, ...]:
    """Homes of a new group, one at each station; the first station's peer is the founder.

    Further ones have an invite to be redeemed at the founder's address.
    """
    made = make_peers(directory, len(air.stations))
    write_invites(made, address(air, air.stations[0]))
    return tuple(
        StationMember(
            name=peer.name,
            home=peer.home,
            prefix=tuple(air.command_prefix(station)),
            options=(options or {}).get(station, ()),
        )
        for peer, station in zip(made, air.stations, strict=True)
    )


@contextlib.asynccontextmanager
async def running_peers(
    air: Wifi, directory: Path, options: Mapping[str, tuple[str, ...]] | None = None
) -> AsyncIterator[tuple[PeerProcess, ...]]:
    """One running peer per station of a new group; nobody was told where the others are."""
    peers = tuple(PeerProcess(member) for member in members(air, directory, options))
    async with ended_afterwards(peers):
        await peers[0].start()
        async with trio.open_nursery() as nursery:
            for peer in peers[1:]:
                nursery.start_soon(peer.start)
        yield peers


async def wait_found(peers: tuple[PeerProcess, ...]) -> None:
    """Wait until everybody sees everybody."""
    await wait_all_together(peers)
