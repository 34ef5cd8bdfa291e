"""Sensors that give watts: Jetson rails, batteries, and their integral over time."""

from __future__ import annotations

from pathlib import Path

import pytest

from p2ptrain.planner.profile import Battery
from p2ptrain.power.battery import battery_now, battery_watts
from p2ptrain.power.integrator import GAP_MAX_S, PowerIntegrator
from p2ptrain.power.jetson import find_jetson_rails
from p2ptrain.power.meter import open_meter


def _write(root: Path, base: str, files: dict[str, object]) -> Path:
    for name, content in files.items():
        path = root / base / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return root


def _sensor(root: Path, number: int, rails: dict[int, tuple[str, int, int]]) -> Path:
    files: dict[str, object] = {"name": "ina3221"}
    for channel, (label, millivolts, milliamperes) in rails.items():
        files[f"in{channel}_label"] = label
        files[f"in{channel}_input"] = millivolts
        files[f"curr{channel}_input"] = milliamperes
    return _write(root, f"sys/class/hwmon/hwmon{number}", files)


def test_jetson_with_a_total_rail_uses_it_alone(tmp_path: Path) -> None:
    _write(tmp_path, "sys/class/hwmon/hwmon0", {"name": "thermal", "in1_label": "VDD_IN"})
    _sensor(
        tmp_path,
        3,
        {1: ("VDD_IN", 5032, 1240), 2: ("VDD_CPU_GPU_CV", 5000, 400), 3: ("VDD_SOC", 5000, 300),
         7: ("sum of shunt voltages", 9, 9)},
    )  # fmt: skip
    rails = find_jetson_rails(tmp_path)
    assert rails is not None
    assert rails.scope == "board"
    assert rails.watts() == pytest.approx(6.23968)
    assert rails.source == "INA3221 VDD_IN, without carrier board"


def test_jetson_without_a_total_adds_its_rails_but_none_twice(tmp_path: Path) -> None:
    _sensor(
        tmp_path,
        1,
        {1: ("VDD_GPU_SOC", 5000, 1000), 2: ("VDD_CPU_CV", 5000, 200),
         3: ("VIN_SYS_5V0", 5000, 600), 7: ("sum", 1, 1)},
    )  # fmt: skip
    _sensor(tmp_path, 2, {1: ("NC", 5000, 5000), 2: ("VDDQ_VDD2_1V8AO", 5000, 400)})
    rails = find_jetson_rails(tmp_path)
    assert rails is not None
    assert rails.scope == "soc"
    assert rails.watts() == pytest.approx(5 + 1 + 3)


@pytest.mark.parametrize("rails", [{}, {1: ("NC", 1, 1)}, {7: ("sum", 1, 1)}])
def test_no_usable_rail_is_none(tmp_path: Path, rails: dict[int, tuple[str, int, int]]) -> None:
    assert find_jetson_rails(_sensor(tmp_path, 0, rails)) is None


def test_rail_that_stops_reading_gives_no_watts(tmp_path: Path) -> None:
    rails = find_jetson_rails(_sensor(tmp_path, 0, {1: ("VDD_IN", 5000, 1000)}))
    assert rails is not None
    (tmp_path / "sys/class/hwmon/hwmon0/curr1_input").unlink()
    assert rails.watts() is None


@pytest.mark.parametrize(
    ("files", "watts"),
    [
        ({"status": "Discharging", "power_now": 8_500_000}, 8.5),
        ({"status": "Discharging", "power_now": -8_500_000}, 8.5),
        ({"status": "Discharging", "current_now": 700_000, "voltage_now": 12_000_000}, 8.4),
        ({"status": "Discharging", "voltage_now": 12_000_000}, None),
        ({"status": "Charging", "power_now": 8_500_000}, None),
        ({"status": "Discharging", "power_now": 1, "scope": "Device"}, None),
    ],
)
def test_battery_watts(tmp_path: Path, files: dict[str, object], watts: float | None) -> None:
    _write(tmp_path, "sys/class/power_supply/AC", {"type": "Mains", "online": 0})
    _write(tmp_path, "sys/class/power_supply/BAT0", {"type": "Battery", **files})
    assert battery_watts(tmp_path) == (None if watts is None else pytest.approx(watts))


def test_two_batteries_are_added(tmp_path: Path) -> None:
    for name in ("BAT0", "BAT1"):
        files = {"type": "Battery", "status": "Discharging", "power_now": 3_000_000}
        _write(tmp_path, f"sys/class/power_supply/{name}", files)
    assert battery_watts(tmp_path) == pytest.approx(6.0)


def test_integrator_adds_trapeziums_and_skips_holes() -> None:
    samples = iter([2.0, 4.0, None, 10.0, 10.0, 5.0, 5.0])
    integrator = PowerIntegrator(lambda: next(samples))
    assert integrator.read_uj(0.0) == 0
    assert integrator.read_uj(2.0) == 6_000_000
    assert integrator.read_uj(3.0) is None
    assert integrator.read_uj(4.0) == 6_000_000
    assert integrator.read_uj(5.0) == 16_000_000
    late_s = 5.0 + GAP_MAX_S + 1
    assert integrator.read_uj(late_s) is None
    assert integrator.read_uj(late_s + 1) == 21_000_000


def test_jetson_meter_is_measured_and_degrades_when_a_sensor_fails(tmp_path: Path) -> None:
    meter = open_meter(
        root=_sensor(tmp_path, 0, {1: ("VDD_IN", 5000, 1000)}), machine="aarch64", cores=6
    )
    assert (meter.identity.scope, meter.identity.quality) == ("board", "measured")
    assert meter.read(0.0).counter_uj == 0
    assert meter.read(2.0).counter_uj == 10_000_000
    (tmp_path / "sys/class/hwmon/hwmon0/curr1_input").unlink()
    assert meter.read(3.0).counter_uj is None
    assert meter.identity.quality == "estimated"
    assert meter.identity.source.endswith("; partly modelled")


BATTERY = {"type": "Battery", "status": "Discharging"}
WH_UJ = 3_600_000_000


@pytest.mark.parametrize(
    ("files", "charge_wh", "capacity_wh"),
    [
        ({"energy_now": 30_000_000, "energy_full": 50_000_000}, 30, 50),
        ({"energy_now": 51_000_000, "energy_full": 50_000_000}, 50, 50),
        ({"energy_now": -1, "energy_full": 50_000_000}, 0, 50),
        (
            {"charge_now": 2_000_000, "charge_full": 4_000_000, "voltage_now": 12_600_000,
             "voltage_min_design": 11_000_000}, 22, 44,
        ),
        ({"charge_now": 2_000_000, "charge_full": 4_000_000, "voltage_now": 12_000_000}, 24, 48),
    ],
)  # fmt: skip
def test_a_battery_says_what_is_left_in_it(
    tmp_path: Path, files: dict[str, object], charge_wh: int, capacity_wh: int
) -> None:
    _write(tmp_path, "sys/class/power_supply/BAT0", {**BATTERY, **files})
    found = battery_now(tmp_path, reserve_percent=20)
    charge_uj, capacity_uj = charge_wh * WH_UJ, capacity_wh * WH_UJ
    assert found == Battery(charge_uj=charge_uj, capacity_uj=capacity_uj, reserve_percent=20)
    assert found.spendable_uj == max(0, charge_uj - capacity_uj // 5)


def test_two_batteries_count_as_one_and_others_devices_do_not(tmp_path: Path) -> None:
    base, full = "sys/class/power_supply/", {"energy_now": 10_000_000, "energy_full": 20_000_000}
    _write(tmp_path, f"{base}BAT0", {**BATTERY, **full})
    _write(tmp_path, f"{base}BAT1", {"type": "Battery", "status": "Unknown", **full})
    _write(tmp_path, f"{base}mouse", {**BATTERY, "scope": "Device"})
    found = battery_now(tmp_path, reserve_percent=0)
    assert found is not None
    assert (found.charge_uj, found.capacity_uj) == (20 * WH_UJ, 40 * WH_UJ)


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"energy_now": 1, "energy_full": 0},
        {"charge_now": 1, "charge_full": 2},
        {"energy_now": 1, "energy_full": 2, "status": "Charging"},
    ],
)
def test_a_battery_that_is_charged_or_does_not_say_is_none(
    tmp_path: Path, files: dict[str, object]
) -> None:
    _write(tmp_path, "sys/class/power_supply/BAT0", {**BATTERY, **files})
    assert battery_now(tmp_path, reserve_percent=0) is None


def test_discharging_battery_is_a_meter_and_a_plugged_one_is_not(tmp_path: Path) -> None:
    base = "sys/class/power_supply/BAT0"
    _write(tmp_path, base, {"type": "Battery", "status": "Full", "power_now": 5_000_000})
    assert open_meter(root=tmp_path, machine="x86_64", cores=2).identity.scope == "model"
    _write(tmp_path, base, {"status": "Discharging"})
    meter = open_meter(root=tmp_path, machine="x86_64", cores=2)
    assert meter.identity.meter.endswith("/battery")
    assert meter.read(1.0).counter_uj == 0
    assert meter.read(2.0).counter_uj == 5_000_000
