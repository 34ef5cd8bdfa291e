"""The small parts a run is made of: promises, sends that finish, foreign errors, accounts."""

from __future__ import annotations

import errno

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from p2ptrain import limits
from p2ptrain.energy.ledger import NO_RUN
from p2ptrain.engine.contract import Array
from p2ptrain.errors import (
    EngineError,
    InvariantBroken,
    NumericsError,
    P2PTrainError,
    PeerLost,
    RemoteProtocolError,
)
from p2ptrain.ids import DeviceId
from p2ptrain.net import addresses
from p2ptrain.net.addresses import join_address, reachable_addresses
from p2ptrain.runtime.exchange.foreign import SURVIVABLE, as_ours
from p2ptrain.runtime.exchange.outlet import send_whole
from p2ptrain.runtime.reporting.usage import PeerMeter, RunMeter, Traffic
from p2ptrain.runtime.runs.expected import ExpectedPlan
from p2ptrain.runtime.signal import Signal
from p2ptrain.training.messages import Ready, stamp_of
from p2ptrain.wire.flows import Carried
from p2ptrain.wire.frames import TensorHeader
from tests.memory_group import model_meter
from tests.sim.plans import device, make_plan
from tests.unit.test_inbox import header

HOME, MEMBER, STRANGER = device(0), device(1), device(2)
PLAN = make_plan(HOME, MEMBER)
LATER = make_plan(HOME, MEMBER, view=2)
GO = Ready(stamp=stamp_of(PLAN))


# The plan that is promised and not yet decided.


def test_messages_ahead_of_a_decision_are_kept_in_order() -> None:
    expected = ExpectedPlan()
    assert expected.run is None
    assert not expected.keep(HOME, stamp_of(PLAN), GO)
    expected.expect(PLAN)
    assert expected.run == PLAN.run
    assert expected.keep(HOME, stamp_of(PLAN), GO)
    assert expected.keep(MEMBER, stamp_of(PLAN), "second")
    assert expected.take(PLAN) == ((HOME, GO), (MEMBER, "second"))
    assert expected.take(PLAN) is None
    assert expected.run is None


def test_messages_of_strangers_and_other_plans_are_not_kept() -> None:
    expected = ExpectedPlan()
    expected.expect(PLAN)
    assert not expected.keep(STRANGER, stamp_of(PLAN), GO)
    assert not expected.keep(HOME, stamp_of(LATER), GO)
    assert expected.take(LATER) is None
    assert expected.take(PLAN) == ()


def test_early_messages_are_bounded() -> None:
    expected = ExpectedPlan()
    expected.expect(PLAN)
    for _ in range(limits.EARLY_MESSAGES_MAX):
        expected.keep(HOME, stamp_of(PLAN), GO)
    with pytest.raises(RemoteProtocolError, match="ahead of a decision"):
        expected.keep(HOME, stamp_of(PLAN), GO)


def test_promise_ends_with_the_proposal_or_its_home() -> None:
    expected = ExpectedPlan()
    expected.expect(PLAN)
    expected.forget(LATER)
    assert expected.run == PLAN.run
    expected.forget(PLAN)
    assert expected.run is None
    expected.expect(PLAN)
    assert expected.home_down(MEMBER) is None
    assert expected.run == PLAN.run
    assert expected.home_down(HOME) == PLAN.run
    assert expected.take(PLAN) is None


def test_newer_plan_takes_the_place_of_an_older_one() -> None:
    expected = ExpectedPlan()
    expected.expect(PLAN)
    expected.keep(HOME, stamp_of(PLAN), GO)
    expected.expect(LATER)
    assert expected.take(PLAN) is None
    assert expected.take(LATER) == ()


# Sends that a cancellation does not cut short.


class SlowOutlet:
    """A tensor takes `gate` to send; a cancelled one is cut."""

    def __init__(self) -> None:
        self.gate = trio.Event()
        self.sent = self.cut = False
        self.error: Exception | None = None

    def send(self, device: DeviceId, message: object) -> None:
        raise NotImplementedError

    async def send_tensor(self, device: DeviceId, header: TensorHeader, *arrays: Array) -> None:
        try:
            await self.gate.wait()
        except trio.Cancelled:
            self.cut = True
            raise
        if self.error is not None:
            raise self.error
        self.sent = True


async def test_cancelled_send_is_finished_within_its_grace(mock_clock: MockClock) -> None:
    outlet = SlowOutlet()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(send_whole, outlet, MEMBER, header("activation"))
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
        mock_clock.jump(limits.SEND_GRACE_S / 2)
        outlet.gate.set()
    assert outlet.sent
    assert not outlet.cut


async def test_send_that_never_ends_is_cut_after_its_grace(mock_clock: MockClock) -> None:
    outlet, scope = SlowOutlet(), trio.CancelScope()

    async def send() -> None:
        with scope:
            await send_whole(outlet, MEMBER, header("activation"))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        await trio.testing.wait_all_tasks_blocked()
        mock_clock.jump(1000)
        await trio.testing.wait_all_tasks_blocked()
        assert not outlet.cut, "nobody cancelled it"
        scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert not outlet.cut
        mock_clock.jump(limits.SEND_GRACE_S)
    assert outlet.cut


async def test_send_over_a_broken_link_says_so() -> None:
    outlet = SlowOutlet()
    outlet.gate.set()
    outlet.error = PeerLost("the link broke")
    with pytest.RaisesGroup(PeerLost):
        await send_whole(outlet, MEMBER, header("activation"))


# Foreign errors.


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (NumericsError("ours"), NumericsError, "ours"),
        (ExceptionGroup("", [PeerLost("link"), NumericsError("cause")]), NumericsError, "cause"),
        (ExceptionGroup("", [PeerLost("link"), ValueError("x")]), PeerLost, "link"),
        (
            ExceptionGroup("", [ExceptionGroup("", [ValueError("x")])]),
            P2PTrainError,
            "ValueError: x",
        ),
        (MemoryError("arena"), EngineError, "not enough memory: arena"),
        (MemoryError(), EngineError, "not enough memory"),
        (OSError(errno.ENOSPC, "disk full"), P2PTrainError, "OSError: [Errno 28] disk full"),
        (KeyError("w"), P2PTrainError, "KeyError: 'w'"),
    ],
)
def test_foreign_errors_become_a_sentence(
    error: Exception, kind: type[P2PTrainError], message: str
) -> None:
    ours = as_ours(error)
    assert type(ours) is kind
    assert ours.message == message


def test_broken_invariant_is_never_survived() -> None:
    assert not issubclass(InvariantBroken, SURVIVABLE)
    assert not issubclass(trio.Cancelled, SURVIVABLE)


# Waiting for what other tasks bring about.


async def test_signal_wakes_who_waits_when_the_condition_holds(mock_clock: MockClock) -> None:
    signal, values, woken = Signal(), [0], []

    async def wait_for(value: int) -> None:
        await signal.wait_until(lambda: values[0] >= value)
        woken.append(value)

    async with trio.open_nursery() as nursery:
        for value in (0, 1, 2):
            nursery.start_soon(wait_for, value)
        for expected in ([0], [0, 1], [0, 1, 2]):
            await trio.testing.wait_all_tasks_blocked()
            assert woken == expected
            values[0] += 1
            signal.notify()


# Accounts.


class Counters:
    """Bytes at the sockets, as the links count them."""

    def __init__(self) -> None:
        self.sent = 0

    def __call__(self) -> Traffic:
        return Traffic(self.sent, self.sent // 2)


def test_work_is_booked_on_the_session_it_belongs_to() -> None:
    counters = Counters()
    sent = {HOME: {"activation": 7}}
    meter = PeerMeter(
        device=MEMBER, name="m", meter=model_meter(), traffic=counters,
        sent=lambda run: sent if run == PLAN.run else {},
    )  # fmt: skip
    counters.sent = 100
    first = RunMeter(meter, PLAN, samples_per_step=8)
    counters.sent = 400
    with first.phase("compute"):
        usage = first.usage(stamp_of(PLAN), step=1)
    assert usage.step == 1
    assert usage.booking.amounts.samples == 8
    assert usage.booking.amounts.bytes_sent == 300
    assert usage.booking.device == MEMBER
    assert usage.sent == ()
    sent[HOME] = {"activation": 10, "state": 2}
    assert "%" in usage.activity
    meter.settle()
    usage = first.usage(stamp_of(PLAN), step=2)
    assert usage.booking.amounts.samples == 16
    assert usage.sent == (
        Carried(to=HOME, kind="activation", bytes=3),
        Carried(to=HOME, kind="state", bytes=2),
    )
    first.close()
    counters.sent = 1000
    second = RunMeter(meter, LATER, samples_per_step=8)
    again = second.usage(stamp_of(LATER), step=3)
    assert again.booking.amounts.samples == 8, "a resumed run begins a new account"
    assert again.booking.amounts.bytes_sent == 0
    life = meter.booking().amounts
    assert (life.samples, life.bytes_sent) == (24, 1000)
    assert meter.booking(NO_RUN).amounts.bytes_sent == 700


def test_life_holds_every_session_and_the_idle_time_between() -> None:
    meter = PeerMeter(
        device=MEMBER, name="m", meter=model_meter(), traffic=Counters(), sent=lambda run: {}
    )
    session = RunMeter(meter, PLAN, samples_per_step=1)
    with session.phase("compute"):
        sum(range(1000))
    session.close()
    meter.settle()
    life = meter.booking().amounts
    parts = [meter.booking(NO_RUN).amounts, meter.booking(f"{PLAN.run}.0.1").amounts]
    assert life.whole.total_uj == sum(part.whole.total_uj for part in parts)
    assert parts[1].phases["compute"].wall_ns > 0


# Where a peer can be reached.


def test_peer_that_listens_on_one_address_is_reached_there() -> None:
    assert reachable_addresses("10.1.2.3", 7000) == ("10.1.2.3:7000",)
    assert reachable_addresses("fd00::1", 7000) == ("[fd00::1]:7000",)


@pytest.mark.parametrize("host", addresses.WILDCARDS)
def test_peer_that_listens_everywhere_is_reached_on_every_interface(
    host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ipaddress

    found = ["127.0.0.1", "fd00::7", "192.168.1.9", "::1", "10.0.0.2"]
    monkeypatch.setattr(
        addresses, "_interface_addresses", lambda: [ipaddress.ip_address(ip) for ip in found]
    )
    assert reachable_addresses(host, 1) == (
        "10.0.0.2:1", "192.168.1.9:1", "[fd00::7]:1", "127.0.0.1:1", "[::1]:1",
    )  # fmt: skip


def test_interfaces_of_this_machine_hold_no_link_local_address() -> None:
    found = reachable_addresses("0.0.0.0", 9)
    assert 1 <= len(found) <= addresses.ADDRESSES_MAX
    assert not [address for address in found if address.startswith(("169.254.", "[fe80"))]


def test_addresses_are_joined_for_dialling() -> None:
    assert join_address("10.0.0.2", 7000) == "10.0.0.2:7000"
    assert join_address("fe80::1", 7000) == "[fe80::1]:7000"
