"""A device that joins by a code finds who shows one, and peers announce that they do."""

from __future__ import annotations

import time
from functools import partial

import pytest
import trio

from p2ptrain import limits
from p2ptrain.ids import GroupId
from p2ptrain.net.discovery import DiscoveryState, discover
from p2ptrain.net.find_sponsors import find_sponsors, sponsor_of
from p2ptrain.net.inviting import Inviting, nobody_invited
from tests.shell.test_discovery import BOUND_S, NOWHERE, txt
from tests.sim.plans import device


def test_member_that_shows_a_code_is_a_sponsor_of_whatever_group() -> None:
    found = sponsor_of(txt(inv="1", g="zzzzzzzz"), ["192.0.2.7", "fe80::1"], 4001)
    assert found == (device(1), ("192.0.2.7:4001", "[fe80::1]:4001"))


@pytest.mark.parametrize(
    ("changes", "addresses", "port"),
    [
        ({"inv": "0"}, ["192.0.2.7"], 4001),
        ({"inv": None}, ["192.0.2.7"], 4001),
        ({"v": "2", "inv": "1"}, ["192.0.2.7"], 4001),
        ({"id": "x", "inv": "1"}, ["192.0.2.7"], 4001),
        ({"id": None, "inv": "1"}, ["192.0.2.7"], 4001),
        ({"inv": "1"}, [], 4001),
        ({"inv": "1"}, ["192.0.2.7"], None),
        ({"inv": "1"}, ["192.0.2.7"], 70_000),
    ],
)
def test_others_are_no_sponsors(
    changes: dict[str, str | None], addresses: list[str], port: int | None
) -> None:
    assert sponsor_of(txt(**changes), addresses, port) is None


async def test_without_multicast_nobody_is_found_and_nothing_breaks() -> None:
    with trio.fail_after(BOUND_S):
        assert await find_sponsors(NOWHERE) == ()


async def test_announcement_follows_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Found while a code is open, and not any more once it is used up."""
    until: list[float | None] = [None]
    inviting = Inviting(lambda: until[0])
    send, _ = trio.open_memory_channel[str](16)
    state = DiscoveryState()
    run = partial(
        discover, group=GroupId("q" * 16), device=device(3), port=4003,
        interfaces=("127.0.0.1",), found=send, state=state, inviting=inviting,
    )  # fmt: skip

    async def ours() -> bool:
        return ("127.0.0.1:4003",) in await find_sponsors(["127.0.0.1"])

    with trio.fail_after(4 * BOUND_S):
        async with trio.open_nursery() as nursery:
            await nursery.start(run)
            if not state.working:
                pytest.skip(f"zeroconf on loopback: {state.text}")
            until[0] = time.time() + 60
            inviting.look()
            while not await ours():
                pass
            until[0] = None
            inviting.look()
            monkeypatch.setattr(limits, "SPONSOR_SEARCH_S", 1.0)
            while await ours():
                pass
            nursery.cancel_scope.cancel()


async def test_code_that_ends_by_itself_is_noticed(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    began_s = time.time()

    class Clock:
        @staticmethod
        def time() -> float:
            return began_s + trio.current_time()

    monkeypatch.setattr("p2ptrain.net.inviting.time", Clock)
    end_s = began_s + trio.current_time() + 600

    def ends() -> float | None:
        return end_s if Clock.time() < end_s else None

    inviting = Inviting(ends)
    assert not inviting.is_open
    inviting.look()
    assert inviting.is_open
    await inviting.wait_changed()
    assert not inviting.is_open
    assert Clock.time() >= end_s
    assert not nobody_invited().is_open
