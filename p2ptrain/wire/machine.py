"""The shape of every deciding core: six verbs, driven by trio or by the simulator.

A machine never waits and never does I/O. After each input the driver takes `writes()`,
`outgoing()` and `events()` at one instant, makes the writes durable, then sends, then hands the
events on. Inputs that are not messages (a link came up, a plan is proposed) are ordinary methods
of the machine, called through the driver so that it looks again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from p2ptrain.ids import DeviceId


@dataclass(frozen=True, slots=True, kw_only=True)
class Outgoing:
    """One message to one other peer; may be lost, doubled or late."""

    to: DeviceId
    message: object


class Machine(Protocol):
    """What the driver and the simulator need of a core."""

    def receive(self, message: object, sender: DeviceId, now: float) -> None:
        """Take one message; RemoteProtocolError when `sender` broke the rules."""

    def tick(self, now: float) -> None:
        """Do what is due; afterwards `deadline()` is later than `now`."""

    def deadline(self) -> float | None:
        """When `tick` is next wanted; None: only after another input."""

    def writes(self) -> Sequence[object]:
        """Drain the records that must be durable before anything else happens."""

    def outgoing(self) -> Sequence[Outgoing]:
        """Drain the messages to send once the writes are durable."""

    def events(self) -> Sequence[object]:
        """Drain what the shell should know, in order."""
