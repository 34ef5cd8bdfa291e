"""The control protocol over a real socket: answers, events, stop, hang-ups, hostile lines."""

from __future__ import annotations

import json
import socket
import stat
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from p2ptrain import limits
from p2ptrain.errors import (
    ConfigError,
    InvariantBroken,
    NumericsError,
    P2PTrainError,
    PeerAlreadyRunning,
    PeerLost,
    PeerNotRunning,
    unwrap,
)
from p2ptrain.net.control_socket import (
    Emit,
    Handler,
    _error_from,
    call,
    error_document,
    serve_control,
)


def ignore(name: str, data: dict[str, Any]) -> None:
    """An event listener that does not care."""


@asynccontextmanager
async def serving(path: Path, handler: Handler) -> AsyncIterator[None]:
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            await nursery.start(serve_control, path, handler)
            yield
            nursery.cancel_scope.cancel()


async def raw(path: Path, line: bytes) -> dict[str, Any]:
    """Send one raw line, give back the last line of the answer."""
    async with await trio.open_unix_socket(path) as stream:
        await stream.send_all(line)
        received = b"".join([chunk async for chunk in stream])
    answer: dict[str, Any] = json.loads(received.splitlines()[-1])
    return answer


async def echo(command: str, arguments: dict[str, Any], emit: Emit) -> dict[str, Any]:
    for index in range(arguments.get("events", 0)):
        emit("step", {"step": index})
    return {"command": command, "arguments": arguments}


async def test_call_gives_events_then_the_result(tmp_path: Path) -> None:
    seen: list[tuple[str, dict[str, Any]]] = []
    async with serving(tmp_path / "s", echo):
        result = await call(tmp_path / "s", "train", {"events": 3}, lambda *e: seen.append(e))
    assert result == {"command": "train", "arguments": {"events": 3}}
    assert seen == [("step", {"step": index}) for index in range(3)]


async def test_socket_is_private_and_removed_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "run" / "s"
    async with serving(path, echo):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert not path.exists()


async def test_second_peer_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    async with serving(tmp_path / "s", echo):
        with pytest.raises(PeerAlreadyRunning):
            await serve_control(tmp_path / "s", echo)
        assert await call(tmp_path / "s", "status", {}, ignore)


async def test_stale_socket_file_is_replaced(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(tmp_path / "s"))
    with pytest.raises(PeerNotRunning):
        await call(tmp_path / "s", "status", {}, ignore)
    async with serving(tmp_path / "s", echo):
        assert await call(tmp_path / "s", "status", {}, ignore)


async def test_nothing_listening_is_peer_not_running(tmp_path: Path) -> None:
    with pytest.raises(PeerNotRunning):
        await call(tmp_path / "absent", "status", {}, ignore)


async def test_error_keeps_class_message_hint_and_exit_code(tmp_path: Path) -> None:
    async def refuse(command: str, arguments: dict[str, Any], emit: Emit) -> dict[str, Any]:
        async with trio.open_nursery():
            raise NumericsError("the loss of step 3 is not finite", hint="try again")

    async with serving(tmp_path / "s", refuse):
        with pytest.raises(NumericsError, match="the loss of step 3") as caught:
            await call(tmp_path / "s", "train", {}, ignore)
    assert (caught.value.hint, caught.value.exit_code) == ("try again", 9)


async def test_bug_reaches_the_client_and_the_peer(tmp_path: Path) -> None:
    async def broken(command: str, arguments: dict[str, Any], emit: Emit) -> dict[str, Any]:
        raise InvariantBroken("two and two is five")

    with pytest.RaisesGroup(InvariantBroken, flatten_subgroups=True):
        async with serving(tmp_path / "s", broken):
            with pytest.raises(P2PTrainError, match="internal error: InvariantBroken: two"):
                await call(tmp_path / "s", "train", {}, ignore)
            await trio.sleep_forever()


async def test_stop_runs_beside_the_request(tmp_path: Path) -> None:
    stopped = trio.Event()

    async def train(command: str, arguments: dict[str, Any], emit: Emit) -> dict[str, Any]:
        if command == "stop":
            stopped.set()
            return {}
        emit("note", {"text": "started"})
        await stopped.wait()
        return {"stopped": True}

    async with serving(tmp_path / "s", train):
        wish = trio.Event()
        result = await call(tmp_path / "s", "train", {}, lambda *e: wish.set(), stop_requested=wish)
    assert result == {"stopped": True}


async def test_refused_stop_does_not_end_the_request(tmp_path: Path) -> None:
    refused = trio.Event()

    async def train(command: str, arguments: dict[str, Any], emit: Emit) -> dict[str, Any]:
        if command == "stop":
            refused.set()
            raise ConfigError("nothing to stop")
        emit("note", {})
        await refused.wait()
        return {"done": True}

    async with serving(tmp_path / "s", train):
        wish = trio.Event()
        assert await call(
            tmp_path / "s", "train", {}, lambda *e: wish.set(), stop_requested=wish
        ) == {"done": True}


async def test_hang_up_cancels_the_request(tmp_path: Path) -> None:
    cancelled = trio.Event()

    async def train(command: str, arguments: dict[str, Any], emit: Emit) -> dict[str, Any]:
        emit("note", {})
        try:
            await trio.sleep_forever()
        finally:
            cancelled.set()

    async with serving(tmp_path / "s", train):
        with trio.CancelScope() as scope:
            await call(tmp_path / "s", "train", {}, lambda *e: scope.cancel())
        await cancelled.wait()


async def test_peer_going_away_is_peer_lost(tmp_path: Path) -> None:
    async def train(command: str, arguments: dict[str, Any], emit: Emit) -> dict[str, Any]:
        emit("note", {})
        return await trio.sleep_forever()

    with trio.fail_after(20):
        async with trio.open_nursery() as peer:
            await peer.start(serve_control, tmp_path / "s", train)
            with pytest.raises(PeerLost):
                await call(tmp_path / "s", "train", {}, lambda *e: peer.cancel_scope.cancel())


async def test_slow_client_loses_old_events_but_not_the_result(tmp_path: Path) -> None:
    count = 40 * limits.CONTROL_EVENTS_MAX
    emitted = trio.Event()

    async def flood(command: str, arguments: dict[str, Any], emit: Emit) -> dict[str, Any]:
        for index in range(count):
            emit("step", {"step": index, "padding": "x" * 1000})
            if index % 100 == 0:
                await trio.lowlevel.checkpoint()
        emitted.set()
        return {"done": True}

    async with (
        serving(tmp_path / "s", flood),
        await trio.open_unix_socket(tmp_path / "s") as stream,
    ):
        await stream.send_all(b'{"v":1,"command":"train"}\n')
        await emitted.wait()  # nothing was read until now, and the peer did not block
        received = b"".join([chunk async for chunk in stream]).splitlines()
    steps = [json.loads(line)["data"]["step"] for line in received[:-1]]
    assert json.loads(received[-1]) == {"result": {"done": True}}
    assert len(steps) < count
    assert steps == sorted(steps)
    assert steps[-1] == count - 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"nonsense\n", "not a control message"),
        (b"[1]\n", "is an object"),
        (b'{"v":2,"command":"status"}\n', "control version 1, not 2"),
        (b'{"command":"status"}\n', "control version 1, not None"),
        (b'{"v":1}\n', "has a command"),
        (b'{"v":1,"command":"status","arguments":[]}\n', "object of arguments"),
    ],
)
async def test_bad_request_is_answered_with_an_error(
    tmp_path: Path, line: bytes, message: str
) -> None:
    async with serving(tmp_path / "s", echo):
        answer = await raw(tmp_path / "s", line)
        assert message in answer["error"]["message"]
        assert await call(tmp_path / "s", "status", {}, ignore)


async def test_endless_line_is_refused(tmp_path: Path) -> None:
    async with serving(tmp_path / "s", echo):
        answer = await raw(tmp_path / "s", b"x" * (limits.CONTROL_LINE_BYTES_MAX + 1))
    assert "too long" in answer["error"]["message"]


async def test_too_many_clients_are_refused(tmp_path: Path) -> None:
    waiting = trio.Semaphore(0)

    async def hold(command: str, arguments: dict[str, Any], emit: Emit) -> dict[str, Any]:
        waiting.release()
        return await trio.sleep_forever()

    async with serving(tmp_path / "s", hold), trio.open_nursery() as nursery:
        for _ in range(limits.CONTROL_CLIENTS_MAX):
            nursery.start_soon(call, tmp_path / "s", "train", {}, ignore)
        for _ in range(limits.CONTROL_CLIENTS_MAX):
            await waiting.acquire()
        with pytest.raises(ConfigError, match="too many"):
            await call(tmp_path / "s", "train", {}, ignore)
        nursery.cancel_scope.cancel()


async def test_loopback_with_token_where_unix_sockets_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(socket, "AF_UNIX")
    path = tmp_path / "s"
    async with serving(path, echo):
        assert stat.S_ISREG(path.stat().st_mode)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert await call(path, "status", {}, ignore)
        path.write_text(json.dumps({**json.loads(path.read_text()), "token": "guess"}))
        with pytest.raises(ConfigError, match="token"):
            await call(path, "status", {}, ignore)
    assert not path.exists()


@pytest.mark.parametrize("content", ["", "[]", '{"port": 1}', '{"port": "x", "token": ""}'])
async def test_damaged_token_file_is_peer_not_running(tmp_path: Path, content: str) -> None:
    (tmp_path / "s").write_text(content)
    with pytest.raises(PeerNotRunning):
        await call(tmp_path / "s", "status", {}, ignore)


def test_unknown_error_class_keeps_its_exit_code() -> None:
    error = _error_from({"class": "FromTheFuture", "message": "m", "hint": "h", "exit_code": 42})
    assert type(error) is P2PTrainError
    assert (error.message, error.hint, error.exit_code) == ("m", "h", 42)


@pytest.mark.parametrize("name", ["Iterator", "unwrap", "InvariantBroken", "__builtins__"])
def test_error_class_is_only_ever_one_of_ours(name: str) -> None:
    assert type(_error_from({"class": name})) is P2PTrainError


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (NumericsError("n"), "NumericsError"),
        (ValueError("v"), "P2PTrainError"),
    ],
)
def test_error_document_names_the_class(raised: Exception, expected: str) -> None:
    assert error_document(raised)["class"] == expected


def _nested(*inner: Exception) -> BaseException:
    return ExceptionGroup("outer", [ExceptionGroup("inner", list(inner))])


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: _nested(ValueError(), NumericsError()), NumericsError),
        (lambda: _nested(NumericsError(), InvariantBroken()), InvariantBroken),
        (lambda: KeyboardInterrupt(), KeyboardInterrupt),
        (lambda: _nested(OSError(), ValueError()), OSError),
    ],
)
def test_unwrap_finds_the_error_to_read(
    make: Callable[[], BaseException], expected: type[BaseException]
) -> None:
    assert type(unwrap(make())) is expected


async def test_answer_to_a_command_that_ends_the_peer_is_still_sent(tmp_path: Path) -> None:
    async def leave(command: str, arguments: dict[str, Any], emit: Emit) -> dict[str, Any]:
        nursery.cancel_scope.cancel()
        return {"left": True}

    answers: list[dict[str, Any]] = []

    async def ask() -> None:
        answers.append(await call(tmp_path / "s", "leave", {}, ignore))

    with trio.fail_after(20):
        async with trio.open_nursery() as outer, trio.open_nursery() as nursery:
            await nursery.start(serve_control, tmp_path / "s", leave)
            outer.start_soon(ask)
    assert answers == [{"left": True}]
