"""Troubles of real networks, caused in namespaces, and what the doctor says about each."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from p2ptrain.demo.group import GROUP_NAME, make_peers
from tests.e2e.peers import Member, PeerProcess, ended_afterwards, environment
from tests.netns.stations import StationMember, address, members
from tools.wifi_emulator.medium import Air
from tools.wifi_emulator.wifi import Wifi, wifi

PROBLEMS_FOUND = 11
CLOCK_AHEAD_S = 3 * 3600
FAKED_CLOCK = f"import time\n_now = time.time\ntime.time = lambda: _now() + {CLOCK_AHEAD_S}\n"
WITH_PEER = (
    "start the peer with the other device's address: p2ptrain join --group demo --peer {}; "
    "or there with this one's: --peer 10.98.0.1:47615"
)

Report = dict[str, Any]  # Any: JSON values


@pytest.fixture
def pair(permitted: None) -> Iterator[Wifi]:
    """Two stations on a good network."""
    with wifi(["a", "b"], Air(delay_ms=2), seed=3) as running:
        yield running


QUICK = ("--seconds", "0.8")
"""Long enough where nobody can be heard."""
AT_ONCE = ("--seconds", "0.1")
"""For troubles that have nothing to do with what is heard."""


async def doctor(air: Wifi, station: str, member: Member, *options: str) -> tuple[int, Report]:
    """Run the doctor at a station; its exit code and report."""
    line = [*air.command_prefix(station), sys.executable, "-m", "p2ptrain", "doctor", "--json"]
    with trio.fail_after(60):
        ended = await trio.run_process(
            [*line, *options],
            capture_stdout=True, capture_stderr=True, check=False, env=environment(member),
        )  # fmt: skip
    assert b"Traceback" not in ended.stderr, ended.stderr
    return ended.returncode, json.loads(ended.stdout)


def found(report: Report, check: str, severity: str = "problem") -> list[str]:
    """What was found in one check."""
    return [
        each["found"]
        for each in report["findings"]
        if (each["check"], each["severity"]) == (check, severity)
    ]


def next_steps(report: Report, check: str) -> list[str]:
    return [each["next_step"] for each in report["findings"] if each["check"] == check]


def inside(air: Wifi, station: str, *line: str) -> None:
    """Run a command at a station; it must succeed."""
    prefix = air.command_prefix(station)
    subprocess.run([*prefix, *line], check=True, capture_output=True, timeout=20)


async def test_well_stopped_and_wrongly_timed_peers(
    pair: Wifi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (PeerProcess(member) for member in members(pair, tmp_path))
    async with ended_afterwards((first, second)):
        await first.start()
        await second.start()
        await first.wait_status(lambda status: status.alone_because is None, 30)
        code, report = await doctor(pair, "a", first.member)
        assert code == 0, report
        assert report["group_name"] == GROUP_NAME
        assert found(report, "peer", "fine") == ["linked with peer-2"]
        assert found(report, "multicast", "fine") == ["heard 1 other peer"]
        assert found(report, "clock", "fine") == ["this device's clock agrees with 1 other"]
        states = [member.state for member in (await first.status()).members]
        assert states == ["self", "alive"]  # being looked at did no harm
        await second.kill()
        code, report = await doctor(pair, "a", first.member)
        assert code == PROBLEMS_FOUND
        assert found(report, "reach") == [f"nothing listens at {address(pair, 'b')} (peer-2)"]
        faked = tmp_path / "faked"
        faked.mkdir()
        (faked / "sitecustomize.py").write_text(FAKED_CLOCK)
        with monkeypatch.context() as patch:
            patch.setenv("PYTHONPATH", f"{faked}{os.pathsep}{os.environ['PYTHONPATH']}")
            await second.start()
        code, report = await doctor(pair, "a", first.member)
        assert code == PROBLEMS_FOUND
        assert found(report, "clock") == [
            f"this device's clock is 3 hours behind that of {address(pair, 'b')}"
        ]


async def test_filtered_multicast_is_answered_with_an_address_to_give(
    pair: Wifi, tmp_path: Path
) -> None:
    first, second = (PeerProcess(member) for member in members(pair, tmp_path))
    pair.tell("set multicast=off")
    async with ended_afterwards((first, second)):
        await first.start()
        await second.start()
        for station, peer, other in (("a", first, second), ("b", second, first)):
            code, report = await doctor(pair, station, peer.member, *QUICK)
            assert code == PROBLEMS_FOUND
            assert found(report, "multicast") == [
                "no other peer was heard by multicast on wlan0 within 0.8 s"
            ]
            (advice,) = next_steps(report, "multicast")
            assert f"--peer {address(pair, station)}" in advice
            assert (await other.status()).alone_because is not None
        code, report = await doctor(pair, "a", first.member, "--peer", address(pair, "b"), *QUICK)
        assert found(report, "multicast") == [
            "no other peer was heard by multicast on wlan0 within 0.8 s, but 10.98.0.2:47615 "
            "answers when it is dialled"
        ]
        assert next_steps(report, "multicast") == [WITH_PEER.format(address(pair, "b"))]
        await first.kill()
        await first.start(address(pair, "b"))  # what was advised
        await first.wait_status(lambda status: status.alone_because is None, 30)


async def test_interface_troubles_are_told(pair: Wifi, tmp_path: Path) -> None:
    member = members(pair, tmp_path)[0]
    inside(pair, "a", "sh", "-c", "echo 0 > /proc/sys/net/ipv4/igmp_max_memberships")
    code, report = await doctor(pair, "a", member, *AT_ONCE)
    assert code == PROBLEMS_FOUND
    assert found(report, "multicast") == [
        "wlan0 does not take part in multicast: No buffer space available"
    ]
    assert next_steps(report, "multicast") == [WITH_PEER.format("HOST:PORT")]
    inside(pair, "a", "ip", "link", "set", "wlan0", "down")
    code, report = await doctor(pair, "a", member, *AT_ONCE)
    assert code == PROBLEMS_FOUND
    assert found(report, "interface") == [
        "this device has no network address but loopback: wlan0 is switched off"
    ]
    inside(pair, "a", "ip", "link", "set", "wlan0", "up")
    inside(pair, "a", "ip", "address", "flush", "dev", "wlan0")
    code, report = await doctor(pair, "a", member, *AT_ONCE)
    assert found(report, "interface") == [
        "this device has no network address but loopback: wlan0 has no IPv4 address"
    ]


async def test_firewall_is_named(pair: Wifi, tmp_path: Path) -> None:
    if shutil.which("nft", path=f"{os.environ['PATH']}:/usr/sbin") is None:
        pytest.skip("nft is not installed (Debian: nftables)")
    member = members(pair, tmp_path)[0]
    rules = "table inet filter { chain input { type filter hook input priority 0; policy drop; }; }"
    inside(pair, "a", "nft", rules)
    code, report = await doctor(pair, "a", member, *AT_ONCE)
    assert code == PROBLEMS_FOUND
    assert found(report, "firewall") == [
        "the firewall of this device (nftables, filter input) keeps TCP port 47615 out",
        "the firewall of this device (nftables, filter input) keeps multicast DNS (UDP port 5353) "
        "out",
    ]
    steps = next_steps(report, "firewall")
    for step in steps:
        inside(pair, "a", *step.removeprefix("let it in: ").split())
    code, report = await doctor(pair, "a", member, *AT_ONCE)
    assert found(report, "firewall", "fine") == [
        "nftables lets TCP port 47615 and multicast DNS in"
    ]


async def test_foreign_group_and_clients_kept_apart_are_named(pair: Wifi, tmp_path: Path) -> None:
    (tmp_path / "ours").mkdir()
    (tmp_path / "theirs").mkdir()
    ours = members(pair, tmp_path / "ours")[0]
    (stranger,) = make_peers(tmp_path / "theirs", 1)
    prefix = tuple(pair.command_prefix("b"))
    theirs = PeerProcess(StationMember(name="stranger", home=stranger.home, prefix=prefix))
    async with ended_afterwards((theirs,)):
        await theirs.start()
        code, report = await doctor(pair, "a", ours)
        assert code == PROBLEMS_FOUND
        assert found(report, "group") == ["the peer at 10.98.0.2:47615 belongs to another group"]
        pair.tell("cut a b")
        code, report = await doctor(pair, "a", ours, "--peer", address(pair, "b"), *QUICK)
        assert code == PROBLEMS_FOUND
        assert found(report, "reach") == ["10.98.0.2:47615 (given) does not answer"]
