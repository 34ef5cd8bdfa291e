"""TCP in memory: sockets for whole peers in one trio process under a clock that jumps.

Real sockets need time that passes; with these everything between a peer's links and another's
happens at one instant, so that a test under `autojump_clock` counts only the seconds that the
product itself waits, whatever the machine does meanwhile. TLS runs over them as over the real ones.
Threads would make the clock jump, too: `run_inline` has their work done on the spot.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import trio

Address = tuple[str, int]
_FIRST_PORT = 40_000


class _Pipe:
    """One direction of a connection: bytes that were sent and not read yet."""

    def __init__(self) -> None:
        self.content = bytearray()
        self.ended = False
        """Nothing more will come."""
        self.unread = False
        """Nobody will read."""
        self.changed = trio.Event()

    def tell(self) -> None:
        self.changed.set()
        self.changed = trio.Event()


class MemorySocket(trio.socket.SocketType):
    """What links, the listener and enrolment use of a trio socket."""

    def __init__(self, net: MemoryNet, family: int = socket.AF_INET) -> None:
        self._net = net
        self._family = family
        self._own: Address = ("0.0.0.0", 0)
        self._other: Address | None = None
        self._incoming, self._outgoing = _Pipe(), _Pipe()
        self._backlog: deque[MemorySocket] | None = None
        self._arrived = trio.Event()
        self._closed = False

    @property
    def did_shutdown_SHUT_WR(self) -> bool:  # noqa: N802 trio's name
        return self._outgoing.ended

    @property
    def type(self) -> socket.SocketKind:
        return socket.SOCK_STREAM

    def setsockopt(self, *args: object) -> None:
        """Nothing to be tuned here."""

    def getsockname(self) -> Address:
        return self._own

    def getpeername(self) -> Address:
        if self._other is None:
            raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))
        return self._other

    async def bind(self, address: Address) -> None:
        await trio.lowlevel.checkpoint()
        self._own = self._net.take(address, self)

    def listen(self, backlog: int = 0) -> None:
        self._backlog = deque()

    async def accept(self) -> tuple[MemorySocket, Address]:
        while True:
            self._check_open(errno.EBADF)
            if self._backlog:
                accepted = self._backlog.popleft()
                await trio.lowlevel.checkpoint()
                return accepted, accepted.getpeername()
            await self._arrived.wait()

    async def connect(self, address: Address) -> None:
        await trio.lowlevel.checkpoint()
        listener = self._net.listener(address)
        if listener is None or listener._backlog is None:
            raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
        accepted = MemorySocket(self._net)
        self._own = ("127.0.0.1", self._net.free_port())
        self._other = accepted._own = (address[0], address[1])
        accepted._other = self._own
        accepted._incoming, accepted._outgoing = self._outgoing, self._incoming
        listener._backlog.append(accepted)
        listener._tell_arrival()

    async def send(self, content: Any, flags: int = 0) -> int:  # Any: a buffer
        await trio.lowlevel.checkpoint()
        self._check_open()
        if self._outgoing.unread or self._outgoing.ended:
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
        self._outgoing.content += content
        self._outgoing.tell()
        return len(content)

    async def recv(self, count: int, flags: int = 0) -> bytes:
        taken = await self._wait_content(count)
        if not flags & socket.MSG_PEEK:
            del self._incoming.content[: len(taken)]
        return taken

    async def recv_into(self, target: Any, count: int = 0) -> int:  # Any: a writable buffer
        taken = await self.recv(len(target))
        target[: len(taken)] = taken
        return len(taken)

    def shutdown(self, how: int) -> None:
        self._check_open()
        self._outgoing.ended = True
        self._outgoing.tell()

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._net.give_back(self)
        for waiting in self._backlog or ():
            waiting.close()
        self._outgoing.ended = self._incoming.unread = True
        self._outgoing.tell()
        self._incoming.tell()
        self._tell_arrival()

    async def _wait_content(self, count: int) -> bytes:
        while True:
            self._check_open()
            if self._incoming.content or self._incoming.ended:
                await trio.lowlevel.checkpoint()
                self._check_open()
                return bytes(self._incoming.content[:count])
            await self._incoming.changed.wait()

    def _tell_arrival(self) -> None:
        self._arrived.set()
        self._arrived = trio.Event()

    def _check_open(self, number: int | None = None) -> None:
        if self._closed and number is not None:
            raise OSError(number, os.strerror(number))
        if self._closed:
            raise trio.ClosedResourceError


class MemoryNet(trio.abc.SocketFactory):
    """One host's ports."""

    def __init__(self) -> None:
        self._listeners: dict[int, MemorySocket] = {}
        self._port = _FIRST_PORT

    def socket(self, family: int = 0, type: int = 0, proto: int = 0) -> MemorySocket:  # noqa: A002 trio's name
        return MemorySocket(self, family)

    def free_port(self) -> int:
        self._port += 1
        return self._port

    def take(self, address: Address, by: MemorySocket) -> Address:
        port = address[1] or self.free_port()
        if port in self._listeners:
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
        self._listeners[port] = by
        return address[0], port

    def listener(self, address: Address) -> MemorySocket | None:
        return self._listeners.get(address[1])

    def give_back(self, by: MemorySocket) -> None:
        if self._listeners.get(by.getsockname()[1]) is by:
            del self._listeners[by.getsockname()[1]]


async def run_inline(work: Callable[..., object], *args: object, **how: object) -> object:
    """For `trio.to_thread.run_sync`: the same work, here and now."""
    await trio.lowlevel.checkpoint()
    return work(*args)


@contextlib.contextmanager
def memory_net(monkeypatch: pytest.MonkeyPatch) -> Iterator[MemoryNet]:
    """Every trio socket that is made in the block is one of these; no thread is used."""
    net = MemoryNet()
    monkeypatch.setattr(trio.to_thread, "run_sync", run_inline)
    former = trio.socket.set_custom_socket_factory(net)
    try:
        yield net
    finally:
        trio.socket.set_custom_socket_factory(former)
