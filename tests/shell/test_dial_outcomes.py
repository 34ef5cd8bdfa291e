"""Whether nobody listens any more at an address where somebody did."""

from __future__ import annotations

import socket
import struct

import trio

from p2ptrain.net.dial_outcomes import is_refused

SECONDS_MAX = 10.0
RESET_AT_CLOSE = struct.pack("ii", 1, 0)


async def listening() -> trio.socket.SocketType:
    sock = trio.socket.socket()
    await sock.bind(("127.0.0.1", 0))
    sock.listen()
    return sock


def address_of(sock: trio.socket.SocketType) -> str:
    host, port = sock.getsockname()
    return f"{host}:{port}"


async def refusal(sock: trio.socket.SocketType, answers: list[bool]) -> None:
    answers.append(await is_refused(address_of(sock)))


async def test_connections_that_are_reset_first_do_not_hide_that_the_process_is_gone() -> None:
    """However many: a dying process may close its links long before it closes what listens."""
    answers: list[bool] = []
    with trio.fail_after(SECONDS_MAX):
        sock = await listening()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(refusal, sock, answers)
            for _ in range(20):
                connection, _ = await sock.accept()
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_AT_CLOSE)
                connection.close()
            sock.close()
    assert answers == [True]


async def test_who_ends_an_empty_connection_in_order_lives() -> None:
    answers: list[bool] = []
    with trio.fail_after(SECONDS_MAX):
        with await listening() as sock:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(refusal, sock, answers)
                connection, _ = await sock.accept()
                with connection:
                    assert await connection.recv(1) == b""
    assert answers == [False]


async def test_who_says_nothing_is_not_gone() -> None:
    with trio.fail_after(SECONDS_MAX):
        with await listening() as sock:
            assert not await is_refused(address_of(sock))
