"""The emulator as a library: started as a process of its own, told what to do, gone at the end.

with wifi(["a", "b", "c"], Air(loss_percent=1)) as air:
    subprocess.Popen([*air.command_prefix("a"), "p2ptrain", "join", ...])
    air.tell("partition a b,c")
"""

from __future__ import annotations

import contextlib
import json
import select
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

from tools.wifi_emulator.medium import Air
from tools.wifi_emulator.namespaces import namespace_name

ROOT: Final = Path(__file__).resolve().parents[2]
REPLY_TIMEOUT_S: Final = 20.0
CLOSE_TIMEOUT_S: Final = 20.0


class EmulatorFailed(RuntimeError):
    """The emulator's process ended or did not answer."""


class Wifi:
    """A running emulator."""

    def __init__(self, process: subprocess.Popen[bytes], stations: Sequence[str]) -> None:
        self._process = process
        self._unread = b""
        self.addresses: dict[str, str] = {}
        """IPv4 address by station."""
        self.stations = tuple(stations)

    @property
    def process(self) -> int:
        """The emulator's process id."""
        return self._process.pid

    def namespace(self, station: str) -> str:
        """The name of a station's network namespace."""
        return namespace_name(station, self._process.pid)

    def command_prefix(self, station: str) -> list[str]:
        """What goes before a command that is to run at a station."""
        return ["ip", "netns", "exec", self.namespace(station)]

    def tell(self, command: str) -> dict[str, Any]:  # Any: JSON values
        """Give one command and return what the emulator answers.

        Raises:
            ValueError: it is no command.
            EmulatorFailed: the emulator is gone.
        """
        if self._process.stdin is None:
            raise EmulatorFailed("the emulator has no stdin")
        try:
            self._process.stdin.write(command.encode() + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise EmulatorFailed("the emulator is gone") from error
        reply = self.wait_event("reply")
        if "error" in reply:
            raise ValueError(reply["error"])
        return reply

    def wait_event(self, name: str) -> dict[str, Any]:  # Any: JSON values
        """The next event of a kind; others before it are dropped."""
        while True:
            event = self._read_event()
            if event.get("event") == name:
                return event

    def _read_event(self) -> dict[str, Any]:  # Any: JSON values
        if self._process.stdout is None:
            raise EmulatorFailed("the emulator has no stdout")
        while b"\n" not in self._unread:
            if not select.select([self._process.stdout], [], [], REPLY_TIMEOUT_S)[0]:
                raise EmulatorFailed(f"no answer within {REPLY_TIMEOUT_S:.0f} s")
            chunk = self._process.stdout.read1(65_536)  # type: ignore[attr-defined]  # buffered
            if not chunk:
                raise EmulatorFailed(f"the emulator ended with {self._process.wait()}")
            self._unread += chunk
        line, _, self._unread = self._unread.partition(b"\n")
        event: dict[str, Any] = json.loads(line)  # Any: JSON values
        return event


@contextlib.contextmanager
def wifi(stations: Sequence[str], air: Air | None = None, *, seed: int = 1) -> Iterator[Wifi]:
    """An emulator for these stations; its namespaces are gone when the block ends.

    Raises:
        EmulatorFailed: it could not start; its reason is on stderr.
    """
    line = [sys.executable, "-m", "tools.wifi_emulator", "run", "--json", "--seed", str(seed)]
    for station in stations:
        line += ["--station", station]
    line += air_options(Air() if air is None else air)
    process = subprocess.Popen(line, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    running = Wifi(process, stations)
    try:
        running.addresses = running.wait_event("up")["addresses"]
        yield running
    finally:
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()  # the end of its stdin ends the emulator
        try:
            process.wait(CLOSE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def air_options(air: Air) -> list[str]:
    """The command line's options for these parameters."""
    options = []
    for each in fields(air):
        value = getattr(air, each.name)
        if isinstance(value, bool):
            flag = {"shared": "--separate", "multicast": "--filter-multicast"}[each.name]
            options += [] if value else [flag]
        else:
            options += [f"--{each.name.partition('_')[0]}", str(value)]
    return options
