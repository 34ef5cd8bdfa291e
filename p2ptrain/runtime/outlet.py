"""How a run speaks to its members, this device included."""

from __future__ import annotations

from typing import Protocol

from p2ptrain.engine.contract import Array
from p2ptrain.ids import DeviceId
from p2ptrain.wire.frames import TensorHeader


class Outlet(Protocol):
    """Sends control messages and tensors to a member of the run."""

    def send(self, device: DeviceId, message: object) -> None:
        """Queue a control message; PeerLost when there is no link."""

    async def send_tensor(self, device: DeviceId, header: TensorHeader, *arrays: Array) -> None:
        """Send one tensor; PeerLost when the link breaks."""
