"""The shell around the hub: TAP devices, commands on stdin and a Unix socket, the clock."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import select
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tools.wifi_emulator.commands import Command, CommandError, Counts, Stop, parse_command
from tools.wifi_emulator.hub import Hub

Event = dict[str, Any]  # Any: JSON values
_FRAME_BYTES_MAX: Final = 65_536
_FRAMES_AT_ONCE: Final = 64
_LINE_BYTES_MAX: Final = 4096
_SLEEP_MAX_S: Final = 1.0


@dataclass(slots=True)
class _Client:
    """Whoever gives commands: stdin, or one connection of the control socket."""

    descriptor: int
    answer: Callable[[Event], None]
    close: Callable[[], None]
    ends_everything: bool = False
    unread: bytes = field(default=b"")


class AccessPoint:
    """Move frames between TAP devices until told to stop, or until time is up."""

    def __init__(
        self,
        hub: Hub,
        taps: Mapping[str, int],
        *,
        script: Sequence[tuple[float, Command]] = (),
        say: Callable[[Event], None],
    ) -> None:
        self._hub = hub
        self._taps = dict(taps)
        self._station_of = {descriptor: station for station, descriptor in taps.items()}
        self._began_s = time.monotonic()
        self._script = list(script)
        self._say = say
        self._clients: dict[int, _Client] = {}
        self._listener: socket.socket | None = None
        self._stopped = False

    def follow_stdin(self, *, until_its_end: bool) -> None:
        """Take commands from standard input, whose end may be the end of the emulator."""
        self._clients[0] = _Client(0, self._say, lambda: None, ends_everything=until_its_end)

    @contextlib.contextmanager
    def control_socket(self, path: Path) -> Iterator[None]:
        """Take commands at a Unix socket while the block runs."""
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(os.fspath(path))
            path.chmod(0o600)
            listener.listen()
            self._listener = listener
            try:
                yield
            finally:
                self._listener = None
                path.unlink(missing_ok=True)

    def stop(self) -> None:
        """Let `run` return soon; may be called by a signal's handler."""
        self._stopped = True

    def run(self, duration_s: float | None = None) -> None:
        """Serve; returns after `stop`, the end of stdin, or the duration."""
        ends_at_s = None if duration_s is None else self._began_s + duration_s
        try:
            while not self._stopped and (ends_at_s is None or time.monotonic() < ends_at_s):
                self._wait(ends_at_s)
        finally:
            for client in self._clients.values():
                client.close()

    def _wait(self, ends_at_s: float | None) -> None:
        due = [at for at in (self._hub.deadline(), self._next_entry_s(), ends_at_s) if at]
        wait_s = min(max(0.0, min(due, default=_SLEEP_MAX_S) - time.monotonic()), _SLEEP_MAX_S)
        listeners = [] if self._listener is None else [self._listener.fileno()]
        wanted = [*self._station_of, *self._clients, *listeners]
        # select, because its timeout has microseconds where epoll's has milliseconds
        for descriptor in select.select(wanted, [], [], wait_s)[0]:
            if descriptor in self._station_of:
                self._read_frames(descriptor)
            elif descriptor in self._clients:
                self._read_commands(self._clients[descriptor])
            else:
                self._welcome()
        self._follow_script()
        for station, frame in self._hub.advance(time.monotonic()):
            with contextlib.suppress(OSError):  # the interface is down or its queue is full
                os.write(self._taps[station], frame)

    def _read_frames(self, tap: int) -> None:
        for _ in range(_FRAMES_AT_ONCE):
            try:
                frame = os.read(tap, _FRAME_BYTES_MAX)
            except BlockingIOError:
                return
            self._hub.receive(self._station_of[tap], frame, time.monotonic())

    def _next_entry_s(self) -> float | None:
        return self._began_s + self._script[0][0] if self._script else None

    def _follow_script(self) -> None:
        while (at_s := self._next_entry_s()) is not None and at_s <= time.monotonic():
            _, command = self._script.pop(0)
            self._say({"event": "script", **self._obey(command)})

    def _welcome(self) -> None:
        if self._listener is None:
            return
        connection, _ = self._listener.accept()

        def answer(event: Event) -> None:
            import json

            with contextlib.suppress(OSError):  # whoever asked has gone
                connection.sendall(json.dumps(event).encode() + b"\n")

        client = _Client(connection.fileno(), answer, connection.close)
        self._clients[connection.fileno()] = client

    def _read_commands(self, client: _Client) -> None:
        chunk = os.read(client.descriptor, _LINE_BYTES_MAX)
        if not chunk or len(client.unread) > _LINE_BYTES_MAX:
            del self._clients[client.descriptor]
            client.close()
            self._stopped |= client.ends_everything
            return
        *lines, client.unread = (client.unread + chunk).split(b"\n")
        for line in lines:
            if text := line.decode(errors="replace").strip():
                client.answer({"event": "reply", **self._answer(text)})

    def _answer(self, text: str) -> Event:
        try:
            return self._obey(parse_command(text, self._hub.stations))
        except CommandError as error:
            return {"error": str(error)}

    def _obey(self, command: Command) -> Event:
        did = {"command": type(command).__name__.lower(), "at_s": self._elapsed_s()}
        if isinstance(command, Stop):
            self._stopped = True
        elif isinstance(command, Counts):
            return {**did, **dataclasses.asdict(self._hub.counts())}
        else:
            self._hub.apply(command)
        cut = [f"{one}>{other}" for one, other in self._hub.cuts.pairs()]
        return {**did, "cut": cut, "air": dataclasses.asdict(self._hub.medium.air)}

    def _elapsed_s(self) -> float:
        return round(time.monotonic() - self._began_s, 3)
