"""What tensors between two devices wait for: their link, and the interface of each of them.

A device of three stages' middle sends activations one way and cotangents the other through one
interface. How much that carries is not measured; the fastest link of the device shows it. A link
that is slower than the interface takes it for a part of the time only: while a tensor is on its
way over a slow link, the interface carries others.
"""

from __future__ import annotations

from collections.abc import Sequence

from p2ptrain.planner.links import LOOPBACK_BYTES_PER_S_MIN, LinkTable
from p2ptrain.planner.profile import PeerProfile
from p2ptrain.units import NS_PER_S

Lines = tuple[tuple[str, int], ...]
"""What one tensor needs all at once, and for how many nanoseconds it takes each of them."""


class Interfaces:
    """The lines between devices, which are named by their index.

    Args:
        devices: All that may take part.
        links: Between them.
    """

    def __init__(self, devices: Sequence[PeerProfile], links: LinkTable) -> None:
        self._devices, self._links = devices, links
        self._rates: dict[int, int] = {}

    def lines(self, sender: int, receiver: int, size_bytes: int) -> Lines:
        """What one tensor of so many bytes takes on its way; a medium carries one at a time."""
        link = self._links.between(self._devices[sender], self._devices[receiver])
        whole_ns = _busy_ns(size_bytes, link.bytes_per_s)
        if link.medium:
            return ((f"medium {link.medium}", whole_ns),)
        pair = (f"{sender} to {receiver}", whole_ns)
        if self._is_loopback(sender, receiver):
            return (pair,)
        return (
            pair,
            (f"from {sender}", _busy_ns(size_bytes, self._rate(sender))),
            (f"to {receiver}", _busy_ns(size_bytes, self._rate(receiver))),
        )

    def _rate(self, device: int) -> int:
        """Bytes per second of a device's interface: those of its fastest link over one."""
        if device not in self._rates:
            own = self._devices[device]
            links = [
                self._links.between(own, each)
                for other, each in enumerate(self._devices)
                if other != device and not self._is_loopback(device, other)
            ]
            self._rates[device] = max(link.bytes_per_s for link in links if not link.medium)
        return self._rates[device]

    def _is_loopback(self, one: int, other: int) -> bool:
        """Whether their link leaves the machine: peers of one may have networks of their own."""
        ends = self._devices[one], self._devices[other]
        fast = self._links.between(*ends).bytes_per_s >= LOOPBACK_BYTES_PER_S_MIN
        return ends[0].host == ends[1].host and fast


def _busy_ns(size_bytes: int, bytes_per_s: int) -> int:
    return -(-size_bytes * NS_PER_S // bytes_per_s)
