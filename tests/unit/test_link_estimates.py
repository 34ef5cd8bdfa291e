"""What the planner makes of what both ends of a link have measured."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import ifaddr
import pytest

from p2ptrain.membership.standings import MemberView
from p2ptrain.membership.states import State
from p2ptrain.net.addresses import wifi_medium
from p2ptrain.net.link_reports import PeerLinkStatistics
from p2ptrain.planner.choose import choose_plan
from p2ptrain.planner.input import OTHER_HOST_BYTES_PER_S, OTHER_HOST_LATENCY_NS, LinkEstimate
from p2ptrain.planner.links import LinkFigure, link_estimates
from p2ptrain.runtime.device.link_figures import link_figures
from p2ptrain.runtime.status import member_report
from p2ptrain.units import format_bytes
from tests.planning_cases import device, planning_input, profile

A, B, C = device("a"), device("b"), device("c")
APART = {A: "host-a", B: "host-b", C: "host-c"}
EQUAL = [(10_000_000, 20_000_000)] * 8


def figure(peer: str, **changes: object) -> LinkFigure:
    base = LinkFigure(peer=device(peer), round_trip_ns=2_000_000, bytes_per_s=40_000_000)
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]  # fields by name


def test_slower_direction_and_shorter_round_trip_count() -> None:
    told = {A: [figure("b")], B: [figure("a", bytes_per_s=10_000_000, round_trip_ns=8_000_000)]}
    assert link_estimates(told, {A: "host-a", B: "host-b"}) == (
        LinkEstimate(first=A, second=B, latency_ns=1_000_000, bytes_per_s=10_000_000),
    )


def test_what_no_end_has_measured_is_assumed_and_says_so() -> None:
    trip_only = {A: [figure("b", bytes_per_s=None)]}
    rate_only = {C: [figure("a", round_trip_ns=None)]}
    (trip,) = link_estimates(trip_only, APART)
    (rate,) = link_estimates(rate_only, APART)
    assert (trip.bytes_per_s, trip.rate_measured) == (OTHER_HOST_BYTES_PER_S, False)
    assert (trip.latency_ns, trip.latency_measured) == (1_000_000, True)
    assert (rate.latency_ns, rate.latency_measured) == (OTHER_HOST_LATENCY_NS, False)
    assert (rate.bytes_per_s, rate.rate_measured) == (40_000_000, True)
    nothing = {A: [figure("b", bytes_per_s=None, round_trip_ns=None)], B: []}
    assert link_estimates(nothing, APART) == ()


def test_unknown_links_are_assumed_to_be_like_the_slow_ones_that_are_known() -> None:
    slow = {A: [figure("b", bytes_per_s=3_000_000)], C: [figure("b", bytes_per_s=None)]}
    rates = {(e.first, e.second): e.bytes_per_s for e in link_estimates(slow, APART)}
    assert rates == {(A, B): 3_000_000, (A, C): 3_000_000, (B, C): 3_000_000}
    assert [e.rate_measured for e in link_estimates(slow, APART)] == [True, False, False]
    beside = {**APART, C: "host-b"}  # nothing is assumed of the loopback
    assert [(e.first, e.second) for e in link_estimates(slow, beside)] == [(A, B), (A, C)]
    fast = {A: [figure("b")]}
    assert len(link_estimates(fast, APART)) == 1


def test_links_of_one_host_count_only_where_they_are_shaped() -> None:
    together = {A: "host", B: "host"}
    assert link_estimates({A: [figure("b", bytes_per_s=300_000_000)]}, together) == ()
    assert link_estimates({A: [figure("b", bytes_per_s=None)]}, together) == ()
    (shaped,) = link_estimates({A: [figure("b", bytes_per_s=12_000_000)]}, together)
    assert shaped.bytes_per_s == 12_000_000


def test_a_host_with_a_shaped_link_has_no_loopback_between_its_peers() -> None:
    together = dict.fromkeys((A, B, C), "host")
    slow = {A: [figure("b", bytes_per_s=3_000_000)]}
    rates = {(e.first, e.second): e.bytes_per_s for e in link_estimates(slow, together)}
    assert rates == {(A, B): 3_000_000, (A, C): 3_000_000, (B, C): 3_000_000}
    shaped = {A: [figure("b", bytes_per_s=100_000_000)]}
    rates = {(e.first, e.second): e.bytes_per_s for e in link_estimates(shaped, together)}
    assert rates == dict.fromkeys(rates, OTHER_HOST_BYTES_PER_S) | {(A, B): 100_000_000}
    assert len(rates) == 3
    elsewhere = {**together, C: "other"}  # whose own peers say nothing of this host's
    assert len(link_estimates(slow, elsewhere)) == 3


def test_devices_that_take_no_part_are_left_out() -> None:
    told = {A: [figure("b"), figure("c")], C: [figure("b")]}
    assert [(e.first, e.second) for e in link_estimates(told, {A: "1", B: "2"})] == [(A, B)]


def test_plan_says_what_was_measured_and_shares_the_air() -> None:
    told = {
        A: [figure("b", medium="wifi 10.0.0.0/24")],
        B: [figure("c", bytes_per_s=None, medium="wifi 10.0.0.0/24")],
    }
    peers = [profile(letter, EQUAL, host=f"host-{letter}") for letter in "abc"]
    planning = planning_input(peers, segment_count=8, links=link_estimates(told, APART))
    choice = choose_plan(dataclasses.replace(planning, stages=3))
    reasons = "; ".join(choice.plan.reasons)
    rate, assumed = format_bytes(40_000_000), format_bytes(OTHER_HOST_BYTES_PER_S)
    assert f"link aaaaaaaa to bbbbbbbb: {rate} per second, round trip 2.0 ms, measured" in reasons
    assert "link bbbbbbbb to cccccccc: round trip 2.0 ms, measured" in reasons
    assert f"links between hosts are assumed to carry {assumed} per second" in reasons
    assert "2 links share the air of wifi 10.0.0.0/24" in reasons


@pytest.mark.parametrize(
    "changes", [{"bytes_per_s": 0}, {"round_trip_ns": -1}, {"medium": "x" * 65}]
)
def test_figure_that_no_link_can_have_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"negative|carries|too long"):
        figure("b", **changes)


def test_figures_join_round_trips_rates_and_media() -> None:
    view = MemberView(
        device=B, record=None, state=State.ALIVE, reason="", linked=True, state_s=1.0,
        last_heard_s=0.1, round_trip_s=0.004, last_down="",
    )  # fmt: skip
    counts = PeerLinkStatistics(
        control_bytes_sent=0, control_bytes_received=0, data_bytes_sent=0,
        data_bytes_received=0, queued_bytes=0, bytes_per_s=7, local_host="10.0.0.2",
    )  # fmt: skip
    unlinked = dataclasses.replace(view, device=C, linked=False)
    found = link_figures([unlinked, view], {B: counts, C: counts}, lambda host: f"wifi {host}")
    assert member_report(view, counts).bytes_per_s == 7
    assert member_report(unlinked).bytes_per_s is None
    assert found == (
        LinkFigure(peer=B, round_trip_ns=4_000_000, bytes_per_s=7, medium="wifi 10.0.0.2"),
    )


def test_medium_is_the_subnet_of_a_wireless_interface(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sys/class/net/wlan0/wireless").mkdir(parents=True)
    (tmp_path / "sys/class/net/eth0").mkdir(parents=True)
    adapters = [
        SimpleNamespace(name=name, ips=[SimpleNamespace(ip=ip, network_prefix=24)])
        for name, ip in (("wlan0", "192.168.7.20"), ("eth0", "10.1.0.4"))
    ]
    monkeypatch.setattr(ifaddr, "get_adapters", lambda: adapters)
    assert wifi_medium("192.168.7.20", tmp_path) == "wifi 192.168.7.0/24"
    assert wifi_medium("10.1.0.4", tmp_path) == ""
    assert wifi_medium("", tmp_path) == ""
