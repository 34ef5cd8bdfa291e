"""How a group gets to its new root: whole peers over TLS in memory, under a clock that jumps.

Seconds here are those that the product waits; how long the machine computes does not count.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence

import pytest
import trio
import trio.testing

from p2ptrain import limits
from p2ptrain.runtime.credentials.trust_reports import read_known
from p2ptrain.runtime.peer import Peer
from p2ptrain.store.groups import Group, first_member, load_group, store_member
from p2ptrain.store.home import Home, open_home
from p2ptrain.store.trust_log import append_statements
from p2ptrain.trust import certificates as certs
from p2ptrain.trust.rotation import OldRoot, Rotation, rotate
from tests.memory_net import memory_net
from tests.shell.test_peer import quiet

AT_ONCE_S = 1.0
HOUR_S = 3600.0


class Household:
    """Members whose issuers hang below one root, and the root's key still at hand."""

    def __init__(self, make_home: Callable[[str], Home], count: int) -> None:
        self.made = certs.create_group("rooted", now=time.time())
        groups = [
            store_member(make_home(name), "rooted", first_member(self.made, name, now=time.time()))
            for name in (f"peer-{index}" for index in range(count))
        ]
        self.groups = sorted(groups, key=lambda group: group.device)

    def rotation(self, by: Group, *, behind_s: float = 0.0) -> Rotation:
        """The root names a successor: by the hand of one member, its clock, and whom it knows."""
        now = time.time() - behind_s
        return rotate(
            OldRoot(key=self.made.root_key, certificate=self.made.root),
            certs.create_group("rooted again", now=now),
            gid=self.made.id,
            number=1,
            issuers=[c.issuers[-1] for c in read_known(again(by)).roster.chains],
            now=now,
        )


HouseholdOf = Callable[[int], Household]


@pytest.fixture
async def household(
    make_home: Callable[[str], Home], monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[HouseholdOf]:
    """Give households whose peers talk in memory."""
    with memory_net(monkeypatch):
        yield lambda count: Household(make_home, count)


def again(group: Group) -> Group:
    return load_group(open_home(group.folder.parents[1]), group.id)


@contextlib.asynccontextmanager
async def running(group: Group, *known: Peer) -> AsyncIterator[Peer]:
    """The peer of a member that is given the addresses of others."""
    addresses = tuple(peer.addresses()[0] for peer in known)
    home = open_home(group.folder.parents[1])
    peer = Peer(home=home, group=again(group), config=quiet(peers=addresses))
    async with trio.open_nursery() as nursery:
        await nursery.start(peer.run)
        yield peer
        nursery.cancel_scope.cancel()


@contextlib.asynccontextmanager
async def together(groups: Sequence[Group]) -> AsyncIterator[list[Peer]]:
    """Peers that are all linked and know each other's certificates, also on disk."""
    async with contextlib.AsyncExitStack() as stack:
        peers: list[Peer] = []
        for group in groups:
            peers.append(await stack.enter_async_context(running(group, *peers)))
        await until(lambda: all(len(p.links.devices()) == len(groups) - 1 for p in peers))
        await until(lambda: all(roster_size(group) >= len(groups) for group in groups))
        yield peers


async def until(condition: Callable[[], bool], *, within_s: float = AT_ONCE_S) -> None:
    """Let virtual time pass; TooSlowError when the condition takes longer."""
    with trio.fail_after(within_s):
        while not condition():  # noqa: ASYNC110 the clock is virtual
            await trio.sleep(0.01)


def roster_size(group: Group) -> int:
    return len(read_known(again(group)).roster.chains)


def trust_only(root: certs.x509.Certificate, *peers: Peer) -> bool:
    return all(peer.trust.group.trusted == (root,) for peer in peers)


@pytest.mark.parametrize("behind_s", [0.0, HOUR_S])
async def test_running_group_of_five_is_below_its_new_root_at_once(
    household: HouseholdOf, autojump_clock: trio.testing.MockClock, behind_s: float
) -> None:
    """Whatever the clock of the device that rotates shows, compared with those of the others."""
    home = household(5)
    async with together(home.groups) as peers:
        rotation = home.rotation(home.groups[0], behind_s=behind_s)
        assert await peers[0].trust.rotate(rotation) == 4
        await until(lambda: trust_only(rotation.new_root, *peers))
        assert {len(peer.links.devices()) for peer in peers} == {4}
        assert all(peer.links.statistics().refused_count == 0 for peer in peers)


async def test_rotation_moves_running_members_and_ends_with_one_trusted_root(
    household: HouseholdOf, autojump_clock: trio.testing.MockClock
) -> None:
    home = household(3)
    one, two, three = home.groups
    async with together(home.groups):
        pass
    async with together([one, two]) as (first, second):
        rotation = home.rotation(one)
        assert await first.trust.rotate(rotation) == 1
        both = (rotation.new_root, home.made.root)
        await until(lambda: first.trust.group.trusted == second.trust.group.trusted == both)
        await trio.sleep(2 * limits.TRUST_SYNC_INTERVAL_S)
        assert first.links.devices() == (two.device,)
        # The third was away: both roots are trusted until it shows that it has moved.
        assert first.trust.group.trusted == second.trust.group.trusted == both
        async with running(three, first) as third:
            await until(lambda: trust_only(rotation.new_root, first, second, third))
            await until(lambda: len(third.links.devices()) == 2)
    async with together(home.groups) as peers:
        assert {peer.trust.group.id for peer in peers} == {home.made.id}


async def test_member_that_missed_a_rotation_learns_it_from_who_refuses_it(
    household: HouseholdOf, autojump_clock: trio.testing.MockClock
) -> None:
    """Nobody remembers the third member, so nobody trusts the old root for its sake."""
    home = household(3)
    one, two, three = home.groups
    async with together([one, two]) as (first, second):
        rotation = home.rotation(one)
        await first.trust.rotate(rotation)
        await until(lambda: trust_only(rotation.new_root, first, second))
        async with running(three, first, second) as third:
            await until(lambda: len(third.links.devices()) == 2)
            await until(lambda: trust_only(rotation.new_root, third))


async def test_member_that_heard_of_a_rotation_but_was_not_moved_is_moved_when_it_is_refused(
    household: HouseholdOf, autojump_clock: trio.testing.MockClock
) -> None:
    home = household(3)
    one, two, three = home.groups
    async with together([one, two]) as (first, second):
        rotation = home.rotation(one)
        await first.trust.rotate(rotation)
        await until(lambda: trust_only(rotation.new_root, first, second))
        append_statements(three.folder, [rotation])
        assert again(three).trusted == (rotation.new_root, home.made.root)
        async with running(three, first) as third:
            await until(lambda: len(third.links.devices()) == 2)
            await until(lambda: trust_only(rotation.new_root, third))


async def test_linked_member_that_the_rotation_did_not_know_is_moved_by_another(
    household: HouseholdOf, autojump_clock: trio.testing.MockClock
) -> None:
    home = household(3)
    one, two, _ = home.groups
    async with together([one, two]):
        rotation = home.rotation(one)
    async with together(home.groups) as (first, second, third):
        await first.trust.rotate(rotation)
        await until(lambda: trust_only(rotation.new_root, first, second, third),
                    within_s=2 * limits.RENEW_RETRY_SOON_S)  # fmt: skip
        assert {len(peer.links.devices()) for peer in (first, second, third)} == {2}
