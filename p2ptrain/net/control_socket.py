"""The control socket: how a command on this device talks to the peer of this device.

Lines of JSON over a Unix socket of mode 0600, or, where there are none (Windows), over loopback
TCP with a token that a file of mode 0600 holds. One request per connection:

    -> {"v": 1, "command": "train", "arguments": {...}}
    -> {"v": 1, "command": "stop"}                             optional, while it runs
    <- {"event": "step", "data": {...}}                        any number
    <- {"result": {...}}   or   {"error": {"class", "message", "hint", "exit_code"}}

A client that hangs up cancels its request. Events are hints: a client too slow to read them
loses the oldest ones, never the result.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import secrets
import socket
import stat
from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import trio

from p2ptrain import errors, limits
from p2ptrain.errors import (
    ConfigError,
    InvariantBroken,
    P2PTrainError,
    PeerAlreadyRunning,
    PeerLost,
    PeerNotRunning,
    RemoteProtocolError,
    WireError,
)

CONTROL_VERSION: Final = 1

Document = dict[str, Any]  # Any: JSON values, checked by whoever reads a field
Emit = Callable[[str, Document], None]
Handler = Callable[[str, Document, Emit], Awaitable[Document]]


async def serve_control(
    path: Path, handler: Handler, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """Answer control requests at `path` until cancelled; the socket is then removed.

    Each request runs `await handler(command, arguments, emit)` in its own task, which is
    cancelled when the client hangs up. `stop` on the connection of a running request calls
    `handler("stop", {}, emit)` beside it. A P2PTrainError goes to the client; any other
    exception goes to the client and then, being a bug, on to the caller.

    Raises:
        PeerAlreadyRunning: another peer answers at `path`; this one must not start.
        ConfigError: the socket cannot be made there.
    """
    if await _answers(path):
        raise PeerAlreadyRunning(f"a peer already answers at {path}")
    _remove(path)
    try:
        listening, token = await _listen(path)
    except OSError as error:
        raise ConfigError(f"cannot make the control socket {path}: {error.strerror}") from error
    clients = _Clients(handler, token)
    try:
        async with trio.open_nursery() as nursery:
            listener = trio.SocketListener(listening)
            nursery.start_soon(trio.serve_listeners, clients.serve, [listener])
            task_status.started()
    finally:
        _remove(path)


async def call(
    path: Path,
    command: str,
    arguments: Document,
    on_event: Emit,
    *,
    stop_requested: trio.Event | None = None,
) -> Document:
    """Ask the peer at `path`, hand each event to `on_event`, and give back the result.

    Setting `stop_requested` sends `stop` on the same connection: a run then ends after its
    present step and the result arrives as usual. Cancelling hangs up, which cancels the request.

    Raises:
        PeerNotRunning: nothing listens at `path`.
        PeerLost: the peer went away before it answered.
        P2PTrainError: what the peer reported, as the class that it raised there.
    """
    stream, token = await _connect(path)
    request = {"v": CONTROL_VERSION, "command": command, "arguments": arguments}
    if token is not None:
        request["token"] = token
    async with stream:
        try:
            response = await _converse(stream, request, on_event, stop_requested)
        except (ExceptionGroup, trio.BrokenResourceError) as raised:
            error = errors.unwrap(raised)
            if isinstance(error, trio.BrokenResourceError):
                raise _hung_up() from raised
            raise error from raised
    if "error" in response:
        raise _error_from(response["error"])
    result = response["result"]
    if not isinstance(result, dict):
        raise RemoteProtocolError("the peer's answer is not an object")
    return result


async def _converse(
    stream: trio.SocketStream,
    request: Document,
    on_event: Emit,
    stop_requested: trio.Event | None,
) -> Document:
    reader = _LineReader(stream, limits.CONTROL_RESULT_BYTES_MAX)
    await stream.send_all(_line(request))
    async with trio.open_nursery() as nursery:
        if stop_requested is not None:
            nursery.start_soon(_send_stop, stream, stop_requested)
        response = await _read_response(reader, on_event)
        nursery.cancel_scope.cancel()
    return response


async def _send_stop(stream: trio.SocketStream, stop_requested: trio.Event) -> None:
    await stop_requested.wait()
    await stream.send_all(_line({"v": CONTROL_VERSION, "command": "stop"}))


async def _read_response(reader: _LineReader, on_event: Emit) -> Document:
    while True:
        line = await reader.read_line()
        if line is None:
            raise _hung_up()
        document = _parse(line)
        if "result" in document or "error" in document:
            return document
        name, data = document.get("event"), document.get("data")
        if isinstance(name, str) and isinstance(data, dict):
            on_event(name, data)


def _hung_up() -> PeerLost:
    return PeerLost(
        "the peer of this device went away before it answered",
        hint="see what p2ptrain join printed, and start it again",
    )


class _Clients:
    """The connections being served: bounded, each with one request at a time."""

    def __init__(self, handler: Handler, token: str | None) -> None:
        self._handler = handler
        self._token = token
        self._count = 0

    async def serve(self, stream: trio.SocketStream) -> None:
        """Serve one connection to its end; a client's own failures end here."""
        async with stream:
            if self._count >= limits.CONTROL_CLIENTS_MAX:
                refusal = ConfigError("too many commands talk to this peer", hint="try again")
                with trio.move_on_after(limits.HANDSHAKE_TIMEOUT_S):
                    await _send_quietly(stream, {"error": error_document(refusal)})
                return
            self._count += 1
            try:
                await self._serve_request(stream)
            finally:
                self._count -= 1

    async def _serve_request(self, stream: trio.SocketStream) -> None:
        reader = _LineReader(stream, limits.CONTROL_LINE_BYTES_MAX)
        outbox = _Outbox()
        try:
            with trio.move_on_after(limits.HANDSHAKE_TIMEOUT_S) as waiting:
                line = await reader.read_line()
            if waiting.cancelled_caught or line is None:
                return
            command, arguments = self._checked(_parse(line))
        except P2PTrainError as error:
            await _send_quietly(stream, {"error": error_document(error)})
        except trio.BrokenResourceError:
            return
        else:
            await self._run(stream, reader, outbox, command, arguments)

    async def _run(
        self,
        stream: trio.SocketStream,
        reader: _LineReader,
        outbox: _Outbox,
        command: str,
        arguments: Document,
    ) -> None:
        bug: list[BaseException] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch, reader, outbox, nursery.cancel_scope)
            nursery.start_soon(outbox.drain, stream, nursery.cancel_scope)
            outbox.finish(await self._answer(command, arguments, outbox, bug))
        if bug:
            raise bug[0]

    async def _answer(
        self, command: str, arguments: Document, outbox: _Outbox, bug: list[BaseException]
    ) -> Document:
        try:
            return {"result": await self._handler(command, arguments, outbox.emit)}
        except Exception as raised:
            error = errors.unwrap(raised)
            if not isinstance(error, P2PTrainError):
                bug.append(raised)
            return {"error": error_document(error)}

    async def _watch(self, reader: _LineReader, outbox: _Outbox, scope: trio.CancelScope) -> None:
        """Pass `stop` on; a client that hangs up or breaks the rules ends its request."""
        with contextlib.suppress(P2PTrainError, trio.BrokenResourceError):
            while (line := await reader.read_line()) is not None:
                if _parse(line).get("command") == "stop":
                    with contextlib.suppress(P2PTrainError):  # it may have ended by itself
                        await self._handler("stop", {}, outbox.emit)
        scope.cancel()

    def _checked(self, request: Document) -> tuple[str, Document]:
        version = request.get("v")
        if version != CONTROL_VERSION:
            raise ConfigError(
                f"the running peer speaks control version {CONTROL_VERSION}, not {version!r:.20}",
                hint="restart the peer after an update: p2ptrain join --group NAME",
            )
        token = request.get("token", "")
        if self._token is not None and not (
            isinstance(token, str) and hmac.compare_digest(token.encode(), self._token.encode())
        ):
            raise ConfigError("the control token is wrong", hint="run the command as the same user")
        command, arguments = request.get("command"), request.get("arguments", {})
        if not isinstance(command, str) or not command or not isinstance(arguments, dict):
            raise ConfigError("a request has a command and an object of arguments")
        return command, arguments


class _Outbox:
    """Lines on their way to one client: the newest events, then the answer."""

    def __init__(self) -> None:
        self._events: deque[bytes] = deque(maxlen=limits.CONTROL_EVENTS_MAX)
        self._answer: bytes | None = None
        self._changed = trio.Event()

    def emit(self, name: str, data: Document) -> None:
        """Queue an event; when the client is slow the oldest waiting one is dropped."""
        self._events.append(_line({"event": name, "data": data}))
        self._changed.set()

    def finish(self, answer: Document) -> None:
        """Queue the one result or error; nothing follows it."""
        self._answer = _line(answer)
        self._changed.set()

    async def drain(self, stream: trio.SocketStream, scope: trio.CancelScope) -> None:
        """Send until the answer is out, or the client is gone; then end the connection.

        Cancelled: an answer that is there is still sent, because it may be about the peer's end.
        """
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            try:
                while self._answer is None:
                    await self._changed.wait()
                    self._changed = trio.Event()
                    while self._events and self._answer is None:
                        await stream.send_all(self._events.popleft())
                await trio.lowlevel.checkpoint()
            except trio.Cancelled:
                with trio.CancelScope(shield=True):
                    await self._send_answer(stream, limits.LINK_CLOSE_TIMEOUT_S)
                raise
            await self._send_answer(stream, limits.CONTROL_RESULT_TIMEOUT_S)
        scope.cancel()

    async def _send_answer(self, stream: trio.SocketStream, timeout_s: float) -> None:
        if self._answer is not None:
            with trio.move_on_after(timeout_s):
                await stream.send_all(b"".join(self._events) + self._answer)


class _LineReader:
    """Split a byte stream into lines of bounded length."""

    def __init__(self, stream: trio.SocketStream, bytes_max: int) -> None:
        self._stream = stream
        self._bytes_max = bytes_max
        self._buffer = bytearray()

    async def read_line(self) -> bytes | None:
        """The next line, or None at the end; RemoteProtocolError when it is too long."""
        while (end := self._buffer.find(b"\n")) < 0:
            if len(self._buffer) > self._bytes_max:
                raise RemoteProtocolError("a control line is too long")
            chunk = await self._stream.receive_some(65_536)
            if not chunk:
                return None
            self._buffer += chunk
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return line


def error_document(error: BaseException) -> Document:
    """An error as the client needs it: class, sentence, next move, exit code."""
    if isinstance(error, P2PTrainError):
        return {
            "class": type(error).__name__,
            "message": error.message,
            "hint": error.hint,
            "exit_code": error.exit_code,
        }
    return {
        "class": "P2PTrainError",
        "message": f"the peer met an internal error: {type(error).__name__}: {error}",
        "hint": P2PTrainError.hint,
        "exit_code": P2PTrainError.exit_code,
    }


def _error_from(document: object) -> P2PTrainError:
    if not isinstance(document, dict):
        return RemoteProtocolError("the peer reported an error without saying which")
    cls = getattr(errors, str(document.get("class")), None)
    if not (isinstance(cls, type) and issubclass(cls, P2PTrainError)):
        cls = P2PTrainError
    error = cls(str(document.get("message", "")), hint=str(document.get("hint", cls.hint)))
    exit_code = document.get("exit_code")
    if isinstance(exit_code, int) and 1 <= exit_code <= 255:
        error.exit_code = exit_code
    return error


def _line(document: Document) -> bytes:
    line = json.dumps(document, separators=(",", ":")).encode() + b"\n"
    if len(line) > limits.CONTROL_RESULT_BYTES_MAX:
        raise InvariantBroken(f"a control line of {len(line)} bytes is over the limit")
    return line


def _parse(line: bytes) -> Document:
    try:
        document = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RemoteProtocolError(f"not a control message: {error}") from error
    if not isinstance(document, dict):
        raise RemoteProtocolError("a control message is an object")
    return document


async def _send_quietly(stream: trio.SocketStream, document: Document) -> None:
    with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        await stream.send_all(_line(document))


async def _listen(path: Path) -> tuple[trio.socket.SocketType, str | None]:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if hasattr(socket, "AF_UNIX"):
        return await _listen_unix(path), None
    return await _listen_loopback(path)


async def _listen_unix(path: Path) -> trio.socket.SocketType:
    listening = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        await listening.bind(str(path))
        # Nobody can connect before listen(), so the mode is never wider than 0600 in effect.
        os.chmod(path, 0o600)
        listening.listen(limits.CONTROL_CLIENTS_MAX)
    except BaseException:
        listening.close()
        raise
    return listening


async def _listen_loopback(path: Path) -> tuple[trio.socket.SocketType, str]:
    listening = trio.socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    await listening.bind(("127.0.0.1", 0))
    listening.listen(limits.CONTROL_CLIENTS_MAX)
    token = secrets.token_hex(32)
    content = json.dumps({"port": listening.getsockname()[1], "token": token})
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(content)
    return listening, token


async def _connect(path: Path) -> tuple[trio.SocketStream, str | None]:
    try:
        with trio.fail_after(limits.DIAL_TIMEOUT_S):
            address = _read_address(path)
            if address is None:
                return await trio.open_unix_socket(path), None
            stream = await trio.open_tcp_stream("127.0.0.1", int(address["port"]))
            return stream, str(address["token"])
    except PermissionError as error:
        raise ConfigError(
            f"the control socket {path} belongs to another user",
            hint="run the command as the user who runs the peer",
        ) from error
    except (OSError, ValueError, KeyError, RuntimeError, WireError, trio.TooSlowError) as error:
        raise PeerNotRunning from error


async def _answers(path: Path) -> bool:
    try:
        stream, _ = await _connect(path)
    except PeerNotRunning:
        return False
    await stream.aclose()
    return True


def _read_address(path: Path) -> Document | None:
    """What a token file holds, or None when `path` is a Unix socket itself."""
    if stat.S_ISSOCK(path.stat().st_mode):
        return None
    return _parse(path.read_bytes())


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)
