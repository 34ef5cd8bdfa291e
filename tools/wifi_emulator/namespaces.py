"""Network namespaces with one emulated Wi-Fi interface each, and a clean end.

Names hold the process that made them, so that whatever a killed one left is removed by the next.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import shutil
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, TypeVar

T = TypeVar("T")

TUN: Final = Path("/dev/net/tun")
NAMED: Final = Path("/run/netns")
INTERFACE: Final = "wlan0"
PREFIX: Final = "p2w"
SUBNET: Final = "10.98.0"
_TUNSETIFF: Final = 0x400454CA
_IFF_TAP: Final = 0x0002
_IFF_NO_PI: Final = 0x1000
_CLONE_NEWNET: Final = 0x40000000
_IP_TIMEOUT_S: Final = 10.0


class Unavailable(Exception):
    """This machine does not permit what the emulator needs."""


def require_permitted() -> None:
    """Raise Unavailable, with the reason, unless namespaces and TAP devices can be made."""
    if os.geteuid() != 0:
        raise Unavailable("network namespaces need root")
    if shutil.which("ip") is None:
        raise Unavailable("the program ip is not installed (Debian: iproute2)")
    try:
        os.close(os.open(TUN, os.O_RDWR))
    except OSError as error:
        raise Unavailable(f"{TUN} cannot be opened: {error.strerror}") from error
    trial = f"{PREFIX}-{os.getpid()}-trial"
    try:
        _ip("netns", "add", trial)
        _ip("netns", "delete", trial)
    except subprocess.CalledProcessError as error:
        said = str(error.stderr).strip()
        raise Unavailable(f"a network namespace cannot be made: {said}") from error


def namespace_name(station: str, owner: int) -> str:
    """The namespace of a station of the emulator with this process id."""
    return f"{PREFIX}-{owner}-{station}"


def address_of(index: int) -> str:
    """The address of the n-th station, from 0."""
    return f"{SUBNET}.{index + 1}"


def sweep() -> list[str]:
    """Remove namespaces whose emulator is gone; gives their names."""
    gone = [name for name in _named() if (owner := _owner(name)) and not _is_running(owner)]
    for name in gone:
        _ip("netns", "delete", name)
    return gone


@contextlib.contextmanager
def stations_up(stations: Sequence[str]) -> Iterator[dict[str, int]]:
    """Make one namespace per station and give the descriptors of their TAP devices.

    Everything is gone when the block ends, however it ends.

    Raises:
        subprocess.CalledProcessError: `ip` refused; nothing is left behind.
    """
    sweep()
    with contextlib.ExitStack() as stack:
        taps = {}
        for index, station in enumerate(stations):
            name = namespace_name(station, os.getpid())
            _ip("netns", "add", name)
            stack.callback(_ip, "netns", "delete", name)
            taps[station] = _open_tap(f"{PREFIX}{index}t{os.getpid() % 100_000}")
            stack.callback(os.close, taps[station])
            _attach(f"{PREFIX}{index}t{os.getpid() % 100_000}", name, address_of(index))
        yield taps


def in_namespace(name: str, function: Callable[[], T]) -> T:
    """Call a function inside a namespace, in a thread of its own; sockets it makes stay there.

    Raises:
        OSError: there is no such namespace; whatever the function raises.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def enter() -> None:
        try:
            with (NAMED / name).open("rb") as handle:
                libc = ctypes.CDLL(None, use_errno=True)
                if libc.setns(handle.fileno(), _CLONE_NEWNET) != 0:
                    raise OSError(ctypes.get_errno(), f"cannot enter namespace {name}")
            results.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def _open_tap(name: str) -> int:
    descriptor = os.open(TUN, os.O_RDWR | os.O_NONBLOCK)
    try:
        request = struct.pack("16sH22x", name.encode(), _IFF_TAP | _IFF_NO_PI)
        fcntl.ioctl(descriptor, _TUNSETIFF, request)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _attach(tap: str, namespace: str, address: str) -> None:
    _ip("link", "set", tap, "netns", namespace, "name", INTERFACE)
    inside = ("-n", namespace)
    _ip(*inside, "address", "add", f"{address}/24", "dev", INTERFACE)
    _ip(*inside, "link", "set", "lo", "up")
    _ip(*inside, "link", "set", INTERFACE, "up")


def _named() -> list[str]:
    return sorted(path.name for path in NAMED.iterdir()) if NAMED.is_dir() else []


def _owner(name: str) -> int | None:
    prefix, _, rest = name.partition("-")
    owner = rest.partition("-")[0]
    return int(owner) if prefix == PREFIX and owner.isdigit() else None


def _is_running(process: int) -> bool:
    return Path(f"/proc/{process}").exists()


def _ip(*arguments: str) -> None:
    line = ["ip", *arguments]
    subprocess.run(line, check=True, capture_output=True, text=True, timeout=_IP_TIMEOUT_S)
