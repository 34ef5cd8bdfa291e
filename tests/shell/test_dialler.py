"""The dialler: backs off, waits while a peer is linked, gives up where dialling is pointless."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from p2ptrain import limits
from p2ptrain.errors import ConfigError
from p2ptrain.ids import DeviceId
from p2ptrain.net.dialler import Attempt, Dialler

THEM = DeviceId("b" * 26)
ADDRESS = "10.0.0.1:7000"


class World:
    """Answers dials as it is told, and remembers when they came."""

    def __init__(self) -> None:
        self.answer = Attempt(failure="no route")
        self.dials: list[tuple[str, float]] = []
        self.linked = False
        self.changed = trio.Event()

    async def attempt(self, address: str) -> Attempt:
        await trio.lowlevel.checkpoint()
        self.dials.append((address, trio.current_time()))
        self.linked = self.answer.device is not None and self.answer.refusal is None
        return self.answer

    async def wait_missing(self, device: DeviceId) -> bool:
        waited = self.linked
        while self.linked:
            await self.changed.wait()
        return waited

    def unlink(self) -> None:
        self.linked = False
        self.changed.set()
        self.changed = trio.Event()


@asynccontextmanager
async def dialling(world: World) -> AsyncIterator[Dialler]:
    dialler = Dialler(attempt=world.attempt, wait_missing=world.wait_missing)
    async with trio.open_nursery() as nursery:
        dialler.start(nursery)
        yield dialler
        nursery.cancel_scope.cancel()


async def test_failing_address_is_dialled_ever_more_seldom(
    autojump_clock: trio.testing.MockClock,
) -> None:
    world = World()
    async with dialling(world) as dialler:
        dialler.add(ADDRESS, None)
        await trio.sleep(60)
        gaps = [b - a for (_, a), (_, b) in zip(world.dials, world.dials[1:], strict=False)]
        assert gaps[0] < 2 * limits.REDIAL_BACKOFF_MIN_S
        assert 0.7 * limits.REDIAL_BACKOFF_MAX_S < gaps[-1] < 1.3 * limits.REDIAL_BACKOFF_MAX_S
        assert len(world.dials) < 20
        assert dialler.failures() == {ADDRESS: "no route"}
        assert dialler.refusals() == {}


async def test_hint_dials_a_waiting_address_at_once(
    autojump_clock: trio.testing.MockClock,
) -> None:
    world = World()
    async with dialling(world) as dialler:
        dialler.add(ADDRESS, None)
        await trio.sleep(60)
        count = len(world.dials)
        dialler.add(ADDRESS, None)
        await trio.testing.wait_all_tasks_blocked()
        assert len(world.dials) == count + 1


async def test_linked_peer_is_left_alone_and_dialled_at_once_when_it_is_lost(
    autojump_clock: trio.testing.MockClock,
) -> None:
    world = World()
    world.answer = Attempt(device=THEM)
    async with dialling(world) as dialler:
        dialler.add(ADDRESS, None)
        await trio.sleep(100)
        dialler.add(ADDRESS, THEM)
        await trio.sleep(100)
        assert len(world.dials) == 1
        assert dialler.knows(THEM)
        world.answer = Attempt(failure="refused")
        world.unlink()
        await trio.testing.wait_all_tasks_blocked()
        assert len(world.dials) == 2


async def test_another_group_is_tried_again_only_when_told_and_later(
    autojump_clock: trio.testing.MockClock,
) -> None:
    world = World()
    world.answer = Attempt(refusal="another group")
    async with dialling(world) as dialler:
        dialler.add(ADDRESS, None)
        await trio.sleep(1)
        dialler.add(ADDRESS, None)
        await trio.sleep(limits.REFUSED_RETRY_S + 1)
        assert len(world.dials) == 1
        assert dialler.refusals() == {ADDRESS: "another group"}
        dialler.add(ADDRESS, None)
        await trio.sleep(1)
        assert len(world.dials) == 2


async def test_refusal_is_told_and_all_that_was_refused_is_dialled_again_when_forgiven(
    autojump_clock: trio.testing.MockClock,
) -> None:
    world = World()
    world.answer = Attempt(refusal="another root")
    told: list[dict[str, str]] = []
    dialler = Dialler(
        attempt=world.attempt, wait_missing=world.wait_missing,
        on_refused=lambda: told.append(dialler.refusals()),
    )  # fmt: skip
    async with trio.open_nursery() as nursery:
        dialler.start(nursery)
        for address in (ADDRESS, "10.0.0.2:7000"):
            dialler.add(address, None)
            await trio.testing.wait_all_tasks_blocked()
        assert told == [
            {ADDRESS: "another root"},
            {ADDRESS: "another root", "10.0.0.2:7000": "another root"},
        ]
        world.answer = Attempt(failure="no route")
        dialler.forgive()
        await trio.testing.wait_all_tasks_blocked()
        assert {address for address, _ in world.dials[2:]} == {ADDRESS, "10.0.0.2:7000"}
        assert dialler.refusals() == {}
        nursery.cancel_scope.cancel()


async def test_our_own_address_is_never_dialled_again(
    autojump_clock: trio.testing.MockClock,
) -> None:
    world = World()
    world.answer = Attempt(refusal="this device itself", is_self=True)
    async with dialling(world) as dialler:
        for _ in range(3):
            dialler.add(ADDRESS, None)
            dialler.forgive()
            await trio.sleep(limits.REFUSED_RETRY_S + 1)
        assert len(world.dials) == 1


async def test_addresses_are_bounded_and_checked(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "DISCOVERED_ADDRESSES_MAX", 2)
    world = World()
    async with dialling(world) as dialler:
        for port in range(1, 5):
            dialler.add(f"10.0.0.1:{port}", None)
        with pytest.raises(ConfigError):
            dialler.add("nowhere", None)
        await trio.testing.wait_all_tasks_blocked()
        assert {address for address, _ in world.dials} == {"10.0.0.1:1", "10.0.0.1:2"}


async def test_addresses_added_before_the_start_are_dialled(
    autojump_clock: trio.testing.MockClock,
) -> None:
    world = World()
    dialler = Dialler(attempt=world.attempt, wait_missing=world.wait_missing)
    dialler.add(ADDRESS, None)
    async with trio.open_nursery() as nursery:
        dialler.start(nursery)
        await trio.testing.wait_all_tasks_blocked()
        assert [address for address, _ in world.dials] == [ADDRESS]
        nursery.cancel_scope.cancel()
