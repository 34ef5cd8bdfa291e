"""The emulator on this machine: frames cross, cuts hold, and nothing is left behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tools.wifi_emulator.measure import udp_socket
from tools.wifi_emulator.medium import Air
from tools.wifi_emulator.namespaces import NAMED, namespace_name, sweep
from tools.wifi_emulator.wifi import ROOT, Wifi, wifi

PORT = 9
DATAGRAMS = 20
SILENCE_S = 0.5
"""How long nothing must come for the way to be cut."""


@pytest.fixture
def clear_air(permitted: None) -> Wifi:
    with wifi(["a", "b"], Air(delay_ms=5)) as running:
        yield running


def arrived(running: Wifi, sender: str, receiver: str, *, within_s: float = 20.0) -> int:
    """How many of some datagrams arrive; returns at once when all have."""
    with udp_socket(running, receiver, PORT) as hearing, udp_socket(running, sender) as saying:
        hearing.settimeout(within_s)
        for number in range(DATAGRAMS):
            saying.sendto(bytes([number]), (running.addresses[receiver], PORT))
        heard = set()
        try:
            while len(heard) < DATAGRAMS:
                heard.add(hearing.recv(8))
        except TimeoutError:
            pass
        return len(heard)


def test_cut_and_healing_act_at_once(clear_air: Wifi) -> None:
    assert arrived(clear_air, "a", "b") == DATAGRAMS
    assert clear_air.tell("cut a>b")["cut"] == ["a>b"]
    assert arrived(clear_air, "a", "b", within_s=SILENCE_S) == 0
    assert arrived(clear_air, "b", "a") == DATAGRAMS
    assert clear_air.tell("heal")["cut"] == []
    assert arrived(clear_air, "a", "b") == DATAGRAMS
    counts = clear_air.tell("counts")["pairs"]
    assert counts["a>b"]["cut_frames"] >= DATAGRAMS
    assert counts["b>a"]["delivered_frames"] >= DATAGRAMS


def test_parameters_change_while_it_runs(clear_air: Wifi) -> None:
    assert arrived(clear_air, "a", "b") == DATAGRAMS
    assert clear_air.tell("set loss=100")["air"]["loss_percent"] == 100
    assert arrived(clear_air, "a", "b", within_s=SILENCE_S) == 0
    with pytest.raises(ValueError, match="there is no station 'z'"):
        clear_air.tell("cut a z")
    clear_air.tell("set loss=0")
    assert arrived(clear_air, "a", "b") == DATAGRAMS


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, None):
        with wifi(["a", "b"]) as running:
            ours = {running.namespace("a"), running.namespace("b")}
            assert ours <= set(os.listdir(NAMED))
            if number is not None:
                os.kill(running._process.pid, number)
                assert running.wait_event("down")["queue_drops"] == {"a": 0, "b": 0}
        assert not ours & set(os.listdir(NAMED))  # others may have theirs


def test_what_a_killed_emulator_leaves_is_swept() -> None:
    with wifi(["a"]) as running:
        name = running.namespace("a")
        os.kill(running._process.pid, signal.SIGKILL)
        running._process.wait()
        assert name in os.listdir(NAMED)
    assert name in sweep()
    assert name not in os.listdir(NAMED)


def test_script_and_control_socket_give_commands(tmp_path: Path) -> None:
    script, control = tmp_path / "script", tmp_path / "control"
    script.write_text("0.1 cut a b\n0.2 heal\n")
    line = [sys.executable, "-m", "tools.wifi_emulator", "run", "--json", "--station", "a"]
    line += ["--station", "b", "--script", str(script), "--control", str(control)]
    with subprocess.Popen(
        line, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        up, cut, healed = (json.loads(process.stdout.readline()) for _ in range(3))
        assert up["namespaces"]["a"] == namespace_name("a", process.pid)
        assert [cut["cut"], healed["cut"]] == [["a>b", "b>a"], []]
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(10)
            client.connect(str(control))
            client.sendall(b"set rate=5\nstop\n")
            replies = [json.loads(each) for each in client.makefile()]
        assert [reply["command"] for reply in replies] == ["change", "stop"]
        assert replies[0]["air"]["rate_mbit"] == 5
        assert json.loads(process.stdout.readline())["event"] == "down"
    assert process.returncode == 0
    assert not control.exists()
