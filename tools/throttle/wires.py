"""A switch with cables: network namespaces, each with one interface of a fixed rate.

What the emulated Wi-Fi is for the air, without its work for each frame: the kernel's own token
buckets hold the rate, so a gigabit is possible.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from tools.wifi_emulator.namespaces import NAMED, Unavailable

PREFIX: Final = "p2c"
SUBNET: Final = "10.97.0"
INTERFACE: Final = "eth0"
SWITCH: Final = "switch"
_TIMEOUT_S: Final = 10.0
_BURST_S: Final = 0.002
"""How much a token bucket lets through at once: the kernel's timer is no finer."""
_BURST_BYTES_MIN: Final = 16_384


@dataclass(frozen=True, slots=True)
class Wires:
    """Stations on one switch."""

    stations: tuple[str, ...]
    owner: int

    @property
    def addresses(self) -> dict[str, str]:
        """IPv4 address by station."""
        return {station: f"{SUBNET}.{i + 1}" for i, station in enumerate(self.stations)}

    def namespace(self, station: str) -> str:
        """The name of a station's network namespace."""
        return f"{PREFIX}-{self.owner}-{station}"


def shaping(interface: str, rate_mbit: float, queue_ms: float) -> list[str]:
    """The arguments of `tc` that hold what leaves an interface to a rate."""
    burst = max(_BURST_BYTES_MIN, round(rate_mbit * 1e6 / 8 * _BURST_S))
    line = ["qdisc", "add", "dev", interface, "root", "tbf", "rate", f"{rate_mbit:g}mbit"]
    return [*line, "burst", str(burst), "latency", f"{queue_ms:g}ms"]


@contextlib.contextmanager
def wires(stations: Sequence[str], *, rate_mbit: float, queue_ms: float = 50.0) -> Iterator[Wires]:
    """Stations that each send and receive at a rate; everything is gone when the block ends.

    Args:
        stations: Short names, letters and digits.
        rate_mbit: Of each cable, in either direction.
        queue_ms: What may wait at either end of a cable.

    Raises:
        Unavailable: `ip` or `tc` refused; what they said.
    """
    sweep()
    made = Wires(tuple(stations), os.getpid())
    try:
        with contextlib.ExitStack() as stack:
            _make(made, rate_mbit, queue_ms, stack)
            yield made
    except subprocess.CalledProcessError as error:
        said = f"{' '.join(error.cmd)}: {str(error.stderr).strip()}"
        raise Unavailable(f"no cables can be made: {said}") from error


def sweep() -> list[str]:
    """Remove namespaces whose maker is gone; gives their names."""
    named = sorted(os.listdir(NAMED)) if NAMED.is_dir() else []
    ours = [name for name in named if name.startswith(f"{PREFIX}-")]
    gone = [name for name in ours if not os.path.exists(f"/proc/{name.split('-')[1]}")]
    for name in gone:
        _run("ip", "netns", "delete", name)
    return gone


def _make(made: Wires, rate_mbit: float, queue_ms: float, stack: contextlib.ExitStack) -> None:
    switch = made.namespace(SWITCH)
    for name in (switch, *(made.namespace(station) for station in made.stations)):
        _run("ip", "netns", "add", name)
        stack.callback(_run, "ip", "netns", "delete", name)
    _run("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
    _run("ip", "-n", switch, "link", "set", "bridge", "up")
    for index, (station, address) in enumerate(made.addresses.items()):
        own, port = made.namespace(station), f"port{index}"
        _run("ip", "-n", switch, "link", "add", port, "type", "veth",
             "peer", "name", INTERFACE, "netns", own)  # fmt: skip
        _run("ip", "-n", switch, "link", "set", port, "master", "bridge", "up")
        _run("ip", "-n", own, "address", "add", f"{address}/24", "dev", INTERFACE)
        _run("ip", "-n", own, "link", "set", "lo", "up")
        _run("ip", "-n", own, "link", "set", INTERFACE, "up")
        _run("tc", "-n", switch, *shaping(port, rate_mbit, queue_ms))
        _run("tc", "-n", own, *shaping(INTERFACE, rate_mbit, queue_ms))


def _run(*line: str) -> None:
    subprocess.run(line, check=True, capture_output=True, text=True, timeout=_TIMEOUT_S)
