"""A neighbour that two stages of one device have in common is sent everything in one order."""

from __future__ import annotations

import trio
import trio.testing

from p2ptrain.engine.contract import Array
from p2ptrain.ids import DeviceId
from p2ptrain.runtime.reporting.usage import PeerMeter, RunMeter, Traffic
from p2ptrain.runtime.views.neighbours import Neighbours
from p2ptrain.wire.frames import TensorHeader
from tests.memory_group import model_meter
from tests.sim.plans import device, make_plan
from tests.unit.test_inbox import header

HOME, BETWEEN, FURTHER = (device(index) for index in range(3))


class HeldOutlet:
    """Sends begin, and end once `gate` is open."""

    def __init__(self) -> None:
        self.gate = trio.Event()
        self.begun: list[tuple[DeviceId, str]] = []

    def send(self, device: DeviceId, message: object) -> None:
        raise NotImplementedError

    async def send_tensor(self, device: DeviceId, header: TensorHeader, *arrays: Array) -> None:
        self.begun.append((device, header.kind))
        await self.gate.wait()


async def test_one_stage_sends_nothing_before_what_the_other_had_put() -> None:
    meter = PeerMeter(
        device=HOME, name="m", meter=model_meter(), traffic=lambda: Traffic(0, 0),
        sent=lambda run: {},
    )  # fmt: skip
    booked = RunMeter(meter, make_plan(HOME, BETWEEN, FURTHER), samples_per_step=1)
    outlet = HeldOutlet()
    front, back = (
        Neighbours(devices, outlet=outlet, meter=booked, copies=False)
        for devices in ((BETWEEN,), (BETWEEN, FURTHER))
    )
    back.share(front)
    async with trio.open_nursery() as nursery:
        front.start(nursery)
        back.start(nursery)
        await back.put(BETWEEN, header("release"), ())
        await front.put(BETWEEN, header("activation"), ())
        await back.put(FURTHER, header("release"), ())
        await trio.testing.wait_all_tasks_blocked()
        assert sorted(outlet.begun) == [(BETWEEN, "release"), (FURTHER, "release")]
        outlet.gate.set()
        front.close()
        back.close()
    assert outlet.begun[-1] == (BETWEEN, "activation")
