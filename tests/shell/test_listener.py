"""The listening port: sorts by the first byte and bounds what is undecided."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest
import trio
import trio.testing

from p2ptrain import limits
from p2ptrain.net.listener import connect, join_address, listen


class Doors:
    """Counts what came through which door and hangs up."""

    def __init__(self) -> None:
        self.came: list[str] = []

    async def link(self, sock: trio.socket.SocketType) -> None:
        self.came.append("link")
        sock.close()

    async def enrolment(self, sock: trio.socket.SocketType) -> None:
        self.came.append("enrolment")
        sock.close()


@asynccontextmanager
async def open_port(doors: Doors, *, enrols: bool = True) -> AsyncIterator[str]:
    listener = await listen("127.0.0.1", 0)
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:

            async def serve() -> None:
                await listener.serve(
                    nursery,
                    on_link=doors.link,
                    on_enrolment=doors.enrolment if enrols else None,
                )

            nursery.start_soon(serve)
            yield join_address(*listener.address)
            nursery.cancel_scope.cancel()


async def say(address: str, first: bytes) -> bytes:
    sock = await connect(address)
    try:
        await sock.send(first)
        with suppress(ConnectionResetError):
            return await sock.recv(10)
        return b""
    finally:
        sock.close()


@pytest.mark.parametrize(
    ("first", "enrols", "came"),
    [
        (b"\x16\x03\x01", True, ["link"]),
        (b"P2TE", True, ["enrolment"]),
        (b"P2TE", False, []),
        (b"G", True, []),
    ],
)
async def test_first_byte_decides(first: bytes, enrols: bool, came: list[str]) -> None:
    doors = Doors()
    async with open_port(doors, enrols=enrols) as address:
        assert await say(address, first) == b""
    assert doors.came == came


async def test_undecided_connections_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "PENDING_CONNECTIONS_MAX", 2)
    doors = Doors()
    async with open_port(doors) as address:
        silent = [await connect(address) for _ in range(2)]
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert await say(address, b"\x16") == b""
        assert doors.came == []
        for sock in silent:
            sock.close()
        await trio.testing.wait_all_tasks_blocked(0.05)
        await say(address, b"\x16")
    assert doors.came == ["link"]


async def test_dead_address_fails_within_its_time(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(*_: object, **__: object) -> None:
        await trio.sleep_forever()

    monkeypatch.setattr(trio.socket, "getaddrinfo", never)
    begun = trio.current_time()
    with pytest.raises(TimeoutError):
        await connect("slow.example:1")
    assert trio.current_time() - begun == pytest.approx(limits.DIAL_TIMEOUT_S)
