"""Keep trying the addresses we were told until somebody of our group is linked there."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import trio

from p2ptrain import limits
from p2ptrain.ids import DeviceId
from p2ptrain.net.listener import split_address


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """How one dial ended."""

    device: DeviceId | None = None
    """Who answered there, when that is known."""
    failure: str | None = None
    """Try again later; None: nothing failed."""
    refusal: str | None = None
    """Why dialling there is pointless."""
    is_self: bool = False
    """This address is our own; never dial it again."""


def no_matter() -> None:
    """For a dialler whose refusals nobody acts upon."""


class _Target:
    def __init__(self, device: DeviceId | None) -> None:
        self.device = device
        self.wake = trio.Event()
        self.last = Attempt()
        self.refused_at: float | None = None


class Dialler:
    """One task per address, in a nursery of its owner; each ends when it is refused."""

    def __init__(
        self,
        *,
        attempt: Callable[[str], Awaitable[Attempt]],
        wait_missing: Callable[[DeviceId], Awaitable[bool]],
        on_refused: Callable[[], None] = no_matter,
    ) -> None:
        """Takes what dials, what waits while a device is linked, and whom refusals concern."""
        self._attempt = attempt
        self._wait_missing = wait_missing
        self._on_refused = on_refused
        self._targets: dict[str, _Target] = {}
        self._nursery: trio.Nursery | None = None
        self._jitter = random.Random()

    def start(self, nursery: trio.Nursery) -> None:
        """Begin with the addresses that were added so far."""
        self._nursery = nursery
        for address, target in self._targets.items():
            nursery.start_soon(self._pursue, address, target)

    def add(self, address: str, device: DeviceId | None) -> None:
        """Dial an address, now if it waits; a hint beyond the limit is dropped.

        Raises:
            ConfigError: not an address.
        """
        split_address(address)
        target = self._targets.get(address)
        if target is not None and target.refused_at is None:
            target.device = device if device is not None else target.device
            target.wake.set()
        elif self._may_begin(target):
            self._begin(address, _Target(device))

    def forgive(self) -> None:
        """Dial again, now, all that was refused: something changed here."""
        for address, target in list(self._targets.items()):
            if target.refused_at is not None and not target.last.is_self:
                self._begin(address, _Target(target.device))

    def refusals(self) -> dict[str, str]:
        """Addresses that are not dialled any more, and why."""
        found = {a: t.last.refusal for a, t in self._targets.items()}
        return {address: reason for address, reason in found.items() if reason is not None}

    def failures(self) -> dict[str, str]:
        """Addresses that did not answer last time, and why."""
        found = {a: t.last.failure for a, t in self._targets.items()}
        return {address: reason for address, reason in found.items() if reason is not None}

    def knows(self, device: DeviceId) -> bool:
        """Whether some address leads to this device."""
        return any(target.device == device for target in self._targets.values())

    def _may_begin(self, target: _Target | None) -> bool:
        if target is None:
            return len(self._targets) < limits.DISCOVERED_ADDRESSES_MAX
        if target.last.is_self or target.refused_at is None:
            return False
        return trio.current_time() - target.refused_at >= limits.REFUSED_RETRY_S

    def _begin(self, address: str, target: _Target) -> None:
        self._targets[address] = target
        if self._nursery is not None:
            self._nursery.start_soon(self._pursue, address, target)

    async def _pursue(self, address: str, target: _Target) -> None:
        backoff_s = limits.REDIAL_BACKOFF_MIN_S
        while True:
            if target.device is not None and await self._wait_missing(target.device):
                backoff_s = limits.REDIAL_BACKOFF_MIN_S
            target.wake = trio.Event()  # hints that came while a peer was linked are old
            target.last = await self._attempt(address)
            if target.last.refusal is not None:
                target.refused_at = trio.current_time()
                self._on_refused()
                return
            target.device = target.last.device or target.device
            with trio.move_on_after(backoff_s * (0.75 + 0.5 * self._jitter.random())):
                await target.wake.wait()
            backoff_s = min(2 * backoff_s, limits.REDIAL_BACKOFF_MAX_S)
