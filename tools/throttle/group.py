"""A group of real peers, each in a network namespace of its own and below its own limits."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import trio

from p2ptrain import limits
from p2ptrain.demo.group import GROUP_NAME, make_peers, write_invites
from p2ptrain.errors import ConfigError, PeerLost
from tests.e2e.peers import ROOT, Member, PeerProcess, ended_afterwards, wait_all_together
from tools.throttle import cgroups
from tools.throttle.cgroups import Group, Limits
from tools.throttle.wires import wires
from tools.wifi_emulator import namespaces
from tools.wifi_emulator.medium import Air
from tools.wifi_emulator.wifi import wifi

EMULATOR: Final = "emulator"
CORES_MAX: Final = 1.6
"""Of all peers together, so that this machine can give what it has promised."""
START_CORES: Final = 1.0
"""Of each peer until all have enrolled: a quota from the beginning, so that they know of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cable:
    """A switch whose cables carry so much, either way."""

    rate_mbit: float


Network = Cable | Air


class Stations(Protocol):
    """Network namespaces that reach each other."""

    @property
    def addresses(self) -> dict[str, str]:
        """IPv4 address by station."""

    def namespace(self, station: str) -> str:
        """The name of a station's network namespace."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where one peer is to live, and on what."""

    limits: Limits
    memory: int | None = None
    """What it may use for runs (`join --memory`), bytes; None: as it finds out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ThrottledMember(Member):
    """A peer in a namespace and a control group, on the default port of its own network."""

    prefix: tuple[str, ...]

    def command(self, addresses: tuple[str, ...]) -> list[str]:
        """`join`, without discovery: everybody is told where the first one is."""
        line = [*self.prefix, self.python, "-m", "p2ptrain", "join", "--group", GROUP_NAME]
        line += ["--name", self.name, "--threads", "1", "--no-discovery"]
        line += ["--invite", str(self.invite)] if self.invite.exists() else []
        for address in addresses:
            line += ["--peer", address]
        return [*line, *self.options]


@dataclass(frozen=True, slots=True, kw_only=True)
class ThrottledGroup:
    """Running peers below their limits; the first one is the home peer of what is trained."""

    peers: tuple[PeerProcess, ...]
    groups: tuple[Group, ...]
    """By peer."""


def checked(places: Sequence[Place]) -> None:
    """Raise ConfigError where the peers were promised more than the machine can hold them to."""
    cores = [place.limits.cores for place in places]
    wanted = sum(each for each in cores if each is not None)
    if None in cores or wanted > CORES_MAX + 1e-9:
        raise ConfigError(
            f"the peers' quotas come to {wanted:g} cores, {cores.count(None)} have none",
            hint=f"give each one a quota, together at most {CORES_MAX:g} cores",
        )


def require_permitted() -> cgroups.Hierarchy:
    """Raise Unavailable, with the reason, unless namespaces and control groups can be made."""
    namespaces.require_permitted()
    return cgroups.require_permitted()


@contextlib.asynccontextmanager
async def throttled_group(
    directory: Path, places: Sequence[Place], network: Network, *, seed: int = 1
) -> AsyncIterator[ThrottledGroup]:
    """A new group of running peers that see each other; everything is gone afterwards.

    Args:
        directory: Empty; for their homes, `peer-1` and so on, and logs.
        places: One per peer.
        network: That they are on.
        seed: Of the network's losses.

    Raises:
        Unavailable: this machine does not permit it.
        ConfigError: quotas that it cannot keep.
        PeerLost: a peer did not start, or they do not see each other.
    """
    checked(places)
    where = require_permitted()
    names = [f"s{index + 1}" for index in range(len(places))]
    with (
        cgroups.groups([*names, EMULATOR], where) as made,
        _stations(names, network, made[EMULATOR], seed) as stations,
    ):
        own = tuple(made[name] for name in names)
        members = _members(directory, places, own, names, stations)
        peers = tuple(PeerProcess(member) for member in members)
        async with ended_afterwards(peers):
            await _start(peers, own, f"{stations.addresses[names[0]]}:{limits.PEER_PORT_DEFAULT}")
            for group, place in zip(own, places, strict=True):
                group.limit(place.limits)
            yield ThrottledGroup(peers=peers, groups=own)


@contextlib.contextmanager
def _stations(names: list[str], network: Network, group: Group, seed: int) -> Iterator[Stations]:
    """The network; an emulator's process is preferred to other programs, as the peers are."""
    if isinstance(network, Cable):
        with wires(names, rate_mbit=network.rate_mbit) as cables:
            yield cables
        return
    with wifi(names, network, seed=seed) as air:
        group.limit(Limits())
        group.take(air.process)
        yield air


def _members(
    directory: Path,
    places: Sequence[Place],
    own: Sequence[Group],
    names: Sequence[str],
    stations: Stations,
) -> tuple[ThrottledMember, ...]:
    made = make_peers(directory, len(places))
    write_invites(made, f"{stations.addresses[names[0]]}:{limits.PEER_PORT_DEFAULT}")
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
    found = []
    for peer, place, group, name in zip(made, places, own, names, strict=True):
        # nsenter, since `ip netns exec` hides /sys/fs/cgroup from the peer
        inside = ["nsenter", f"--net={namespaces.NAMED / stations.namespace(name)}"]
        found.append(
            ThrottledMember(
                name=peer.name,
                home=peer.home,
                prefix=(*group.prefix, *inside),
                options=() if place.memory is None else ("--memory", f"{place.memory}B"),
                variables={"PYTHONPATH": path},
            )
        )
    return tuple(found)


async def _start(peers: Sequence[PeerProcess], own: Sequence[Group], address: str) -> None:
    for group in own:
        group.limit(Limits(cores=START_CORES))
    await peers[0].start()
    async with trio.open_nursery() as nursery:
        for peer in peers[1:]:
            nursery.start_soon(peer.start, address)
    try:
        await wait_all_together(tuple(peers))
    except AssertionError as error:
        raise PeerLost(str(error), hint="read their logs, printed above") from error
