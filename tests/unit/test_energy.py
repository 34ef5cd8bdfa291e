"""Energy: phases, splitting, the ledger's sums, peers that share a meter."""

from __future__ import annotations

import pytest

from p2ptrain.energy.combine import PeerBooking, combine
from p2ptrain.energy.ledger import (
    RUNS_KEPT,
    STEPS_KEPT,
    Amounts,
    EnergyLedger,
    Interval,
    PhaseAmount,
    measure,
)
from p2ptrain.energy.meter import MeterIdentity, Reading
from p2ptrain.energy.phases import PHASES, PhaseClock
from p2ptrain.energy.power_model import PowerModel, process_share_uj, split
from p2ptrain.energy.recorder import EnergyRecorder
from p2ptrain.errors import InvariantBroken
from p2ptrain.ids import DeviceId
from p2ptrain.runtime.reporting.energy_report import energy_report
from p2ptrain.wire.codec import from_plain, to_plain

SECOND = 1_000_000_000
MODEL = PowerModel(
    idle_watts=10.0, core_watts=5.0, joules_per_byte=1e-6, cores=2, source="a test's figures"
)


def _interval(**changes: object) -> Interval:
    values = {
        "phase_ns": {"compute": 3 * SECOND, "communicate": SECOND, "wait": SECOND, "idle": 0},
        "cpu_ns": 4 * SECOND,
        "bytes_sent": 1_000_000,
        "bytes_received": 500_000,
        "samples": 32,
        **changes,
    }
    return Interval(**values)  # type: ignore[arg-type]  # fields by name, values vary by case


def test_phase_clock_lets_compute_win_and_adds_up() -> None:
    clock = PhaseClock(10.0)
    clock.begin("wait", 11.0)
    clock.begin("communicate", 12.0)
    clock.begin("compute", 13.0)
    clock.end("communicate", 14.0)
    clock.end("compute", 16.0)
    clock.end("wait", 17.0)
    assert clock.phase == "idle"
    spent = clock.take(18.0)
    assert spent == {
        "compute": 3 * SECOND, "communicate": SECOND, "wait": 2 * SECOND, "idle": 2 * SECOND
    }  # fmt: skip
    assert sum(spent.values()) == 8 * SECOND


def test_phase_clock_counts_a_phase_that_goes_on_across_takes() -> None:
    clock = PhaseClock(0.0)
    clock.begin("compute", 0.0)
    clock.begin("compute", 0.5)
    assert clock.take(1.0)["compute"] == SECOND
    clock.end("compute", 1.5)
    assert clock.take(2.0)["compute"] == SECOND


def test_phase_clock_gives_no_time_when_the_clock_steps_back() -> None:
    clock = PhaseClock(5.0)
    assert sum(clock.take(4.0).values()) == 0
    assert sum(clock.take(6.0).values()) == SECOND


def test_phase_clock_refuses_an_end_without_a_beginning() -> None:
    with pytest.raises(InvariantBroken, match="before it began"):
        PhaseClock(0.0).end("wait", 1.0)


@pytest.mark.parametrize(
    ("total", "weights", "parts"),
    [
        (10, (1, 1, 1), (4, 3, 3)),
        (7, (0, 0), (4, 3)),
        (100, (1, 0, 3), (25, 0, 75)),
        (0, (5, 5), (0, 0)),
        (1, (1, 2), (0, 1)),
    ],
)
def test_split_is_exact(total: int, weights: tuple[int, ...], parts: tuple[int, ...]) -> None:
    assert split(total, weights) == parts


@pytest.mark.parametrize(
    ("package", "idle", "process", "machine", "expected"),
    [
        (100, 40, 1, 2, 30),
        (100, 40, 2, 2, 60),
        (100, 40, 3, 2, 60),
        (30, 40, 1, 2, 0),
        (100, 40, 0, 0, 0),
    ],
)
def test_process_share_lies_between_nothing_and_all(
    package: int, idle: int, process: int, machine: int, expected: int
) -> None:
    shared = process_share_uj(
        package_uj=package, idle_uj=idle, process_cpu_ns=process, machine_cpu_ns=machine
    )
    assert shared == expected


def test_model_pays_cpu_bytes_and_idle() -> None:
    amounts = measure(_interval(), MODEL)
    # 4 CPU seconds x 5 W over 3 s compute and 1 s communicate; 1.5 MB x 1 uJ; 5 s x 10 W idle.
    assert amounts.phases["compute"] == PhaseAmount(
        wall_ns=3 * SECOND, marginal_uj=15_000_000, idle_uj=30_000_000
    )
    assert amounts.phases["communicate"] == PhaseAmount(
        wall_ns=SECOND, marginal_uj=6_500_000, idle_uj=10_000_000
    )
    assert amounts.phases["wait"].total_uj == 10_000_000
    assert amounts.whole.total_uj == 20_000_000 + 1_500_000 + 50_000_000


def test_counter_replaces_the_cpu_figure_by_the_process_share() -> None:
    amounts = measure(_interval(counter_uj=90_000_000, machine_cpu_ns=8 * SECOND), MODEL)
    # 90 J measured - 50 J idle, half of the machine's CPU time ours; bytes are not added.
    assert amounts.whole.marginal_uj == 20_000_000
    assert amounts.whole.idle_uj == 50_000_000


def test_counter_below_the_idle_figure_is_all_idle() -> None:
    amounts = measure(_interval(counter_uj=30_000_000), MODEL)
    assert (amounts.whole.marginal_uj, amounts.whole.idle_uj) == (0, 30_000_000)


def test_idle_peer_pays_its_cpu_where_its_time_went() -> None:
    phase_ns = {"idle": 10 * SECOND}
    amounts = measure(_interval(phase_ns=phase_ns, bytes_sent=0, bytes_received=0), MODEL)
    assert amounts.phases["idle"].marginal_uj == amounts.whole.marginal_uj == 20_000_000


@pytest.mark.parametrize(
    "changes",
    [{"cpu_ns": -1}, {"bytes_sent": -1}, {"counter_uj": -5}, {"phase_ns": {"nap": 1}},
     {"phase_ns": {"idle": -1}}],
)  # fmt: skip
def test_ledger_refuses_impossible_intervals(changes: dict[str, object]) -> None:
    ledger = EnergyLedger(MODEL)
    with pytest.raises(ValueError, match="an interval has no"):
        ledger.add(_interval(**changes))
    assert ledger.life() == Amounts()


def test_ledger_books_by_run_and_step() -> None:
    ledger = EnergyLedger(MODEL)
    first = ledger.add(_interval(), run="r", step=0)
    second = ledger.add(_interval(samples=8), run="r", step=1)
    ledger.add(_interval(samples=0))
    assert ledger.step("r", 0) == first
    assert ledger.run("r") == first.plus(second)
    assert ledger.run("r").samples == 40
    assert ledger.run("unknown") == Amounts()
    assert ledger.life().whole.total_uj == 3 * first.whole.total_uj
    ledger.check()


def test_ledger_keeps_a_bounded_history_and_loses_no_joule() -> None:
    ledger = EnergyLedger(MODEL)
    one = ledger.add(_interval(), run="r0", step=0)
    for step in range(1, STEPS_KEPT + 5):
        ledger.add(_interval(), run=f"r{step % (RUNS_KEPT + 5)}", step=step)
    assert ledger.step("r0", 0) is None
    assert ledger.life().whole.total_uj == (STEPS_KEPT + 5) * one.whole.total_uj
    assert ledger.life().bytes_sent == (STEPS_KEPT + 5) * 1_000_000
    ledger.check()


def test_ledger_check_notices_a_lost_joule() -> None:
    ledger = EnergyLedger(MODEL)
    ledger.add(_interval(), run="r")
    ledger._runs["r"] = Amounts()
    with pytest.raises(InvariantBroken, match="energy ledger"):
        ledger.check()


def _booking(letter: str, meter: str, *, seconds: int = 5) -> PeerBooking:
    identity = MeterIdentity(
        meter=meter, scope="model", quality="estimated", error_band=0.5, source="test"
    )
    phase_ns = {"compute": 3 * SECOND, "wait": (seconds - 3) * SECOND}
    amounts = measure(_interval(phase_ns=phase_ns), MODEL)
    return PeerBooking(
        device=DeviceId(letter * 26), name=letter, amounts=amounts, identity=identity
    )


def test_three_peers_on_one_host_pay_its_idle_power_once() -> None:
    one = _booking("a", "host/model")
    combined = combine([_booking("c", "host/model"), one, _booking("b", "host/model")])
    assert combined.whole.idle_uj == one.amounts.whole.idle_uj == 50_000_000
    assert combined.whole.marginal_uj == 3 * one.amounts.whole.marginal_uj
    assert [peer.name for peer in combined.peers] == ["a", "b", "c"]
    assert sum(peer.amounts.whole.idle_uj for peer in combined.peers) == 50_000_000
    assert max(peer.amounts.whole.idle_uj for peer in combined.peers) == 16_666_667


def test_peers_on_other_meters_pay_their_own_idle_power() -> None:
    combined = combine([_booking("a", "one"), _booking("b", "two", seconds=10)])
    assert combined.whole.idle_uj == 150_000_000


def test_longest_peer_gives_the_machine_time() -> None:
    combined = combine([_booking("a", "one", seconds=5), _booking("b", "one", seconds=10)])
    assert combined.whole.idle_uj == 100_000_000
    parts = [peer.amounts.whole.idle_uj for peer in combined.peers]
    assert parts == [33_333_333, 66_666_667]


def test_a_device_is_combined_once() -> None:
    with pytest.raises(ValueError, match="twice"):
        combine([_booking("a", "one"), _booking("a", "two")])


def test_report_adds_up_over_phases_and_peers() -> None:
    report = energy_report([_booking("a", "one"), _booking("b", "one")])
    assert report.joules_per_sample == pytest.approx(report.total_joules / 32)
    assert sum(peer.total_joules for peer in report.peers) == pytest.approx(report.total_joules)
    for peer in report.peers:
        assert list(peer.phases) == list(PHASES)
        phases = sum(phase.total_joules for phase in peer.phases.values())
        assert phases == pytest.approx(peer.total_joules)
    assert energy_report([]).joules_per_sample is None


def test_bookings_survive_the_wire_and_hostile_ones_do_not() -> None:
    booking = _booking("a", "one")
    assert from_plain(PeerBooking, to_plain(booking)) == booking
    with pytest.raises(ValueError, match="phases"):
        Amounts(phases={})
    with pytest.raises(ValueError, match="negative"):
        PhaseAmount(marginal_uj=-1)
    with pytest.raises(ValueError, match="scope"):
        MeterIdentity(meter="m", scope="moon", quality="measured", error_band=None, source="s")


def _reading(at_s: float, counter_uj: int | None = None) -> Reading:
    return Reading(at_s=at_s, counter_uj=counter_uj, machine_cpu_ns=None)


def test_recorder_books_what_grew_between_two_calls() -> None:
    recorder = EnergyRecorder(model=MODEL, reading=_reading(1.0), cpu_ns=7 * SECOND)
    recorder.clock.begin("compute", 1.0)
    recorder.clock.end("compute", 3.0)
    booked = recorder.book(
        reading=_reading(4.0), cpu_ns=9 * SECOND, bytes_sent=1000, bytes_received=0,
        samples=32, run="r", step=0,
    )  # fmt: skip
    assert booked.phases["compute"].marginal_uj == 10_000_000
    assert booked.phases["communicate"].marginal_uj == 1000
    assert booked.whole.wall_ns == 3 * SECOND
    again = recorder.book(
        reading=_reading(5.0), cpu_ns=9 * SECOND, bytes_sent=1000, bytes_received=0
    )
    assert again.bytes_sent == again.whole.marginal_uj == 0
    assert recorder.ledger.run("r") == booked


def test_recorder_uses_the_counter_only_when_both_ends_are_known() -> None:
    recorder = EnergyRecorder(model=MODEL, reading=_reading(0.0, 100), cpu_ns=0)
    marginal_uj = []
    readings = [(1.0, 20_000_100), (2.0, None), (3.0, 50_000_000), (4.0, 70_000_000)]
    for second, (at_s, counter_uj) in enumerate(readings, start=1):
        booked = recorder.book(
            reading=_reading(at_s, counter_uj),
            cpu_ns=second * SECOND,
            bytes_sent=0,
            bytes_received=0,
        )
        marginal_uj.append(booked.whole.marginal_uj)
    # Counter: 20 J - 10 J idle; model: one CPU second at 5 W.
    assert marginal_uj == [10_000_000, 5_000_000, 5_000_000, 10_000_000]
