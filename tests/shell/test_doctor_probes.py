"""The doctor's probes of this machine, against what a test can make of it."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from p2ptrain.diagnosis.observations import Machine, PortUse
from p2ptrain.doctor import firewall as firewall_probe
from p2ptrain.doctor import interfaces as interface_probe
from p2ptrain.doctor.interfaces import interfaces
from p2ptrain.doctor.machine import machine
from p2ptrain.doctor.port import port_use
from p2ptrain.doctor.programs import run_program


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return root


def test_taken_port_is_named_with_its_owner() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        use = port_use(port)
        assert use is not None
        assert not use.is_free
        assert use.owner is not None
        assert f"(process {os.getpid()})" in use.owner
    assert port_use(port) == PortUse(port=port, is_free=True)
    assert port_use(0) is None


def test_machine_is_read_from_its_files(tmp_path: Path) -> None:
    cpu = "sys/devices/system/cpu/cpu0/cpufreq/scaling_"
    root = tree(
        tmp_path,
        {
            "sys/class/thermal/thermal_zone0/temp": "51000",
            "sys/class/thermal/thermal_zone1/temp": "91500",
            "sys/class/thermal/cooling_device0/temp": "200000",
            f"{cpu}governor": "powersave",
            f"{cpu}driver": "cpufreq-dt",
            "sys/devices/platform/soc/soc:firmware/get_throttled": "50005",
            "sys/class/power_supply/BAT0/type": "Battery",
            "sys/class/power_supply/BAT0/status": "Discharging",
            "sys/class/power_supply/BAT0/capacity": "12",
            "sys/class/power_supply/mouse/type": "Battery",
            "sys/class/power_supply/mouse/scope": "Device",
            "sys/class/power_supply/mouse/capacity": "3",
            "proc/meminfo": "MemAvailable: 1024 kB",
        },
    )
    assert machine(root) == Machine(
        hottest_celsius=91.5,
        governor="powersave",
        throttled="under-voltage, throttling",
        on_battery=True,
        battery_percent=12,
        free_memory_bytes=1024 * 1024,
    )


def test_machine_without_such_files_says_nothing(tmp_path: Path) -> None:
    assert machine(tmp_path) == Machine()
    for driver, expected in (("intel_pstate", None), ("acpi-cpufreq", "powersave")):
        cpu = "sys/devices/system/cpu/cpu0/cpufreq/scaling_"
        root = tree(tmp_path, {f"{cpu}governor": "powersave", f"{cpu}driver": driver})
        assert machine(root).governor == expected


def test_radio_is_read_from_iw_and_proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    iw = tmp_path / "bin" / "iw"
    iw.parent.mkdir()
    iw.write_text('#!/bin/sh\n[ "$*" = "dev wlan9 get power_save" ] && echo "Power save: on"\n')
    iw.chmod(0o755)
    monkeypatch.setenv("PATH", f"{iw.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(interface_probe, "_addresses", lambda: [("wlan9", ("10.0.0.1/24",))])
    monkeypatch.setattr(interface_probe, "_indexed", list)
    wireless = "Inter-| sta-|\n face | tus |\n wlan9: 0000   40.  -81.  -256  0 0 0 0 0 0"
    root = tree(tmp_path, {"sys/class/net/wlan9/wireless/here": "", "proc/net/wireless": wireless})
    (found,) = interfaces(root)
    assert (found.name, found.networks) == ("wlan9", ("10.0.0.1/24",))
    assert (found.is_wireless, found.power_save, found.signal_dbm) == (True, True, -81)
    assert found.multicast_error is not None  # nobody has that address here
    assert found.has_carrier is None


def test_loopback_is_no_interface_to_others() -> None:
    assert all(not each.networks or each.name != "lo" for each in interfaces())


def test_rules_are_hidden_from_others_than_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(firewall_probe, "find_program", lambda name: f"/usr/sbin/{name}")
    for user, expected in ((0, False), (1000, True)):
        monkeypatch.setattr(os, "geteuid", lambda user=user: user)
        assert firewall_probe.is_hidden() is expected
    monkeypatch.setattr(firewall_probe, "find_program", lambda name: None)
    assert not firewall_probe.is_hidden()


def test_program_that_is_missing_or_fails_says_nothing() -> None:
    assert run_program("no-such-program-anywhere") is None
    assert run_program("false") is None
    assert run_program("echo", "yes") == "yes\n"
