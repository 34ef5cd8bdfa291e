"""How a run speaks to its members, this device included."""

from __future__ import annotations

from typing import Protocol

import trio

from p2ptrain import limits
from p2ptrain.engine.contract import Array
from p2ptrain.ids import DeviceId
from p2ptrain.wire.frames import TensorHeader


class Outlet(Protocol):
    """Sends control messages and tensors to a member of the run."""

    def send(self, device: DeviceId, message: object) -> None:
        """Queue a control message; PeerLost when there is no link."""

    async def send_tensor(self, device: DeviceId, header: TensorHeader, *arrays: Array) -> None:
        """Send one tensor; PeerLost when the link breaks.

        A cancellation in the middle breaks the link: use `send_whole`.
        """


async def send_whole(
    outlet: Outlet, device: DeviceId, header: TensorHeader, *arrays: Array
) -> None:
    """Send one tensor and, when cancelled in the middle, finish it for SEND_GRACE_S.

    A run that ends must not break its links: its members go on without it, and its receivers
    discard what still comes.
    """
    async with trio.open_nursery() as nursery:
        whole = trio.CancelScope(shield=True)
        nursery.start_soon(_limit_when_cancelled, whole)
        with whole:
            await outlet.send_tensor(device, header, *arrays)
        nursery.cancel_scope.cancel()


async def _limit_when_cancelled(scope: trio.CancelScope) -> None:
    try:
        await trio.sleep_forever()
    finally:
        scope.deadline = trio.current_time() + limits.SEND_GRACE_S
