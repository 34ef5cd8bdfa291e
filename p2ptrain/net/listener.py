"""One listening port: TLS links and enrolment, told apart by their first byte."""

from __future__ import annotations

import errno
import socket
from collections.abc import Awaitable, Callable
from typing import Final

import trio

from p2ptrain import limits
from p2ptrain.errors import ConfigError, PortInUse
from p2ptrain.net.tls_link import tune_socket

_TLS_HANDSHAKE: Final = b"\x16"
_ENROLMENT: Final = b"P"
_ACCEPT_PAUSE_S: Final = 0.1

Handler = Callable[[trio.socket.SocketType], Awaitable[None]]


class Listener:
    """A bound port. `serve` accepts until it is cancelled."""

    def __init__(self, sock: trio.socket.SocketType, host: str) -> None:
        self._sock = sock
        self._address = host, int(sock.getsockname()[1])  # also known when it is closed
        self._pending = 0

    @property
    def address(self) -> tuple[str, int]:
        """Host as it was given, and the port that was bound."""
        return self._address

    def close(self) -> None:
        """Stop listening."""
        self._sock.close()

    async def serve(
        self, nursery: trio.Nursery, *, on_link: Handler, on_enrolment: Handler | None
    ) -> None:
        """Hand every connection to its handler, in a task of `nursery`.

        The handler owns the socket and never raises for what the other side does. At most
        PENDING_CONNECTIONS_MAX connections may be undecided; more are hung up on.
        """
        try:
            while True:
                await self._accept(nursery, on_link, on_enrolment)
        finally:
            # Before the links close: whoever then dials is refused and knows that we are gone.
            self._sock.close()

    async def _accept(
        self, nursery: trio.Nursery, on_link: Handler, on_enrolment: Handler | None
    ) -> None:
        try:
            connection, _ = await self._sock.accept()
        except OSError as error:
            if error.errno in (errno.EBADF, errno.ENOTSOCK):
                raise
            await trio.sleep(_ACCEPT_PAUSE_S)  # out of descriptors: let some close first
            return
        if self._pending >= limits.PENDING_CONNECTIONS_MAX:
            connection.close()
            return
        self._pending += 1
        nursery.start_soon(self._sort, connection, on_link, on_enrolment)

    async def _sort(
        self, connection: trio.socket.SocketType, on_link: Handler, on_enrolment: Handler | None
    ) -> None:
        first = b""
        try:
            with trio.move_on_after(limits.FIRST_BYTE_TIMEOUT_S):
                tune_socket(connection)
                first = await connection.recv(1, socket.MSG_PEEK)
        except OSError:
            first = b""
        except BaseException:
            connection.close()
            raise
        finally:
            self._pending -= 1
        if first == _TLS_HANDSHAKE:
            await on_link(connection)
        elif first == _ENROLMENT and on_enrolment is not None:
            await on_enrolment(connection)
        else:
            connection.close()


async def listen(host: str, port: int) -> Listener:
    """Bind a TCP port; 0 takes any free one.

    Raises:
        PortInUse: another program has it.
        ConfigError: the host is not an address of this device.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = trio.socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        await sock.bind((host, port))
        sock.listen(limits.PENDING_CONNECTIONS_MAX)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise PortInUse(f"port {port} is already in use") from error
        raise ConfigError(
            f"cannot listen on {host}:{port}: {error.strerror or error}",
            hint="give an address of this device, or 0.0.0.0 for all of them",
        ) from error
    return Listener(sock, host)


async def connect(address: str) -> trio.socket.SocketType:
    """Connect to host:port; OSError when it fails or takes too long."""
    host, port = split_address(address)
    sock: trio.socket.SocketType | None = None
    try:
        with trio.fail_after(limits.DIAL_TIMEOUT_S):
            found = await trio.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            family, kind, protocol, _, target = found[0]
            sock = trio.socket.socket(family, kind, protocol)
            await sock.connect(target)
    except trio.TooSlowError as error:
        if sock is not None:
            sock.close()
        raise TimeoutError(errno.ETIMEDOUT, "no answer") from error
    except BaseException:
        if sock is not None:
            sock.close()
        raise
    tune_socket(sock)
    return sock


def split_address(address: str) -> tuple[str, int]:
    """`host:port` or `[ipv6]:port`; ConfigError on anything else."""
    host, colon, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isascii() or not port.isdigit() or len(port) > 5:
        raise ConfigError(f"{address!r} is not an address", hint="write it as host:port")
    if not 1 <= int(port) <= 65_535:
        raise ConfigError(f"{address!r} has no valid port", hint="write it as host:port")
    return host, int(port)


def join_address(host: str, port: int) -> str:
    """The inverse of `split_address`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
