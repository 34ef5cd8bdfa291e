"""What a peer says of itself stays true; a suspended machine is a leave and a return."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio
import trio.testing

from p2ptrain.ids import DeviceId
from p2ptrain.membership.events import MemberDown, MemberUp, MemberWasAway
from p2ptrain.membership.machine import Membership
from p2ptrain.power.battery import battery_percent
from p2ptrain.runtime.device.own_record import OwnState, keep_own_record, read_own_state
from p2ptrain.runtime.device.suspension import SuspensionWatch, awake_clock_s, boot_clock_s
from p2ptrain.runtime.driver import Driver
from tests.sim.plans import device, make_record

ME, PEER = device(0), device(1)


@dataclass
class Clocks:
    """A machine whose lid can be closed."""

    awake_s: float = 100.0
    asleep_s: float = 0.0

    def watch(self) -> SuspensionWatch:
        return SuspensionWatch(boot_s=lambda: self.awake_s + self.asleep_s, awake_s=self.awake)

    def awake(self) -> float:
        return self.awake_s


@dataclass
class FakeLinks:
    closed: list[str] = field(default_factory=list)

    def devices(self) -> tuple[DeviceId, ...]:
        return (PEER,)

    def close(self, device: DeviceId, reason: str) -> None:
        self.closed.append(reason)


def make_driver(sent: list[object]) -> Driver[Membership]:
    return Driver(
        Membership(own=make_record(ME), rng=random.Random(1)),
        send=lambda device, message: sent.append(message),
        on_event=lambda event: None,
        on_violation=lambda sender, error: None,
    )


def test_watch_tells_each_suspension_once() -> None:
    clocks = Clocks()
    watch = clocks.watch()
    clocks.awake_s += 50.0
    assert watch.suspended_s() == 0.0
    clocks.asleep_s += 600.0
    assert watch.suspended_s() == 600.0
    assert watch.suspended_s() == 0.0
    clocks.asleep_s += 0.5  # clocks are not read at one instant
    assert watch.suspended_s() == 0.0


def test_this_machine_is_not_suspended_while_it_runs_this_test() -> None:
    assert boot_clock_s() >= awake_clock_s() - 0.1
    assert SuspensionWatch().suspended_s() == 0.0


def test_without_a_boot_clock_nothing_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(time, "CLOCK_BOOTTIME", raising=False)
    assert boot_clock_s() == pytest.approx(awake_clock_s(), abs=1.0)


async def test_changes_of_the_device_are_told_and_nothing_else(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    membership, links = make_driver([]), FakeLinks()
    state = OwnState(addresses=("a:1",), power_source="mains", battery_percent=None)
    moved = OwnState(addresses=("b:1",), power_source="battery", battery_percent=40)
    states = [state, state, moved]

    async def keep() -> None:
        watch = Clocks().watch()
        await keep_own_record(membership, links, read=lambda: states.pop(0), watch=watch)

    nursery.start_soon(keep)
    await trio.sleep(1.5)
    own = membership.machine.own
    assert (own.addresses, own.power_source, own.version) == (("a:1",), "mains", 1)
    await trio.sleep(10.0)
    assert membership.machine.own.version == 1
    await trio.sleep(10.0)
    own = membership.machine.own
    assert (own.addresses, own.power_source, own.battery_percent) == (("b:1",), "battery", 40)
    assert (own.away_count, links.closed) == (0, [])


@pytest.mark.parametrize(("asleep_s", "closed"), [(2.0, 0), (600.0, 1)])
async def test_resumed_machine_says_so_and_dials_again(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery, asleep_s: float, closed: int
) -> None:
    membership, clocks, links = make_driver([]), Clocks(), FakeLinks()
    state = OwnState(addresses=(), power_source="mains", battery_percent=None)

    async def keep() -> None:
        await keep_own_record(membership, links, read=lambda: state, watch=clocks.watch())

    nursery.start_soon(keep)
    await trio.sleep(1.5)
    clocks.asleep_s += asleep_s
    await trio.sleep(1.0)
    own = membership.machine.own
    assert (own.away_count, own.away_s, own.refutations) == (1, asleep_s, 1)
    assert links.closed == ["this machine was suspended"] * closed


def test_group_sees_a_suspended_laptop_leave_and_return() -> None:
    """The laptop's own clock stands still; the other one hears nothing for ten minutes."""
    laptop = Membership(own=make_record(ME), rng=random.Random(1))
    desk = Membership(own=make_record(PEER), rng=random.Random(2))

    def talk(now_laptop: float, now_desk: float) -> None:
        for _ in range(6):
            for out in laptop.outgoing():
                desk.receive(out.message, ME, now_desk)
            for out in desk.outgoing():
                laptop.receive(out.message, PEER, now_laptop)

    laptop.link_up(PEER, 0.0)
    desk.link_up(ME, 0.0)
    talk(0.0, 0.0)
    desk.events()
    for second in range(1, 600):
        desk.tick(float(second))
        desk.outgoing()
    (down,) = [event for event in desk.events() if isinstance(event, MemberDown)]
    assert down.kind == "silent"

    laptop.away(599.0, 1.0)
    desk.link_down(ME, False, 600.0)
    desk.link_up(ME, 600.0)
    laptop.link_down(PEER, False, 1.0)
    laptop.link_up(PEER, 1.0)
    talk(1.1, 600.1)
    events = desk.events()
    assert MemberWasAway(device=ME, away_s=599.0) in events
    assert [type(event) for event in events].count(MemberUp) == 1
    assert desk.members(600.1)[0].last_down == "suspended for 599 s"
    assert not [event for event in laptop.events() if isinstance(event, MemberDown)]


def _write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / "sys/class/power_supply" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")


@pytest.mark.parametrize(
    ("files", "percent"),
    [
        ({}, None),
        ({"AC/type": "Mains"}, None),
        ({"BAT0/type": "Battery", "BAT0/capacity": "42"}, 42),
        ({"BAT0/type": "Battery", "BAT0/capacity": "142"}, 100),
        ({"BAT0/type": "Battery", "BAT0/charge_now": "1", "BAT0/charge_full": "4"}, 25),
        ({"BAT0/type": "Battery", "BAT0/energy_now": "10", "BAT0/energy_full": "100",
          "BAT1/type": "Battery", "BAT1/energy_now": "50", "BAT1/energy_full": "50"}, 40),
        ({"BAT0/type": "Battery", "BAT0/energy_full": "0", "BAT0/energy_now": "0",
          "BAT0/capacity": "7"}, 7),
        ({"mouse/type": "Battery", "mouse/scope": "Device", "mouse/capacity": "5"}, None),
        ({"BAT0/type": "Battery", "BAT0/capacity": "odd"}, None),
    ],
)  # fmt: skip
def test_battery_percent(tmp_path: Path, files: dict[str, str], percent: int | None) -> None:
    _write(tmp_path, files)
    assert battery_percent(tmp_path) == percent


def test_battery_is_told_in_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("p2ptrain.runtime.device.own_record.battery_percent", lambda: 43)
    assert read_own_state(("a:1",)).battery_percent == 40
    monkeypatch.setattr("p2ptrain.runtime.device.own_record.battery_percent", lambda: None)
    assert read_own_state(("a:1",)).battery_percent is None
