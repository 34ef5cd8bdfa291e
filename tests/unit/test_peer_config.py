"""What config.toml may say."""

from __future__ import annotations

import dataclasses

import pytest

from p2ptrain.errors import ConfigError
from p2ptrain.ids import DeviceId
from p2ptrain.power.model import PowerConfig
from p2ptrain.runtime.config import default_threads, power_settings, step_setting
from tests.sim.plans import make_record


def test_nothing_said_keeps_the_assumptions() -> None:
    assert power_settings({}) == PowerConfig()


def test_power_table_is_read() -> None:
    settings = {"power": {"idle_watts": 3, "core_watts": 1.5, "source": "plug, 2026-11-02"}}
    assert power_settings(settings) == PowerConfig(
        idle_watts=3.0, core_watts=1.5, source="plug, 2026-11-02"
    )


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"network": {}}, "unknown entry 'network'"),
        ({"power": 3}, "no table"),
        ({"power": {"watts": 3}}, "unknown key 'watts'"),
        ({"power": {"idle_watts": -1}}, "between 0"),
    ],
)
def test_anything_else_is_refused(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        power_settings(settings)


@pytest.mark.parametrize("setting", ["disk", "memory", "auto"])
def test_step_setting_is_read(setting: str) -> None:
    assert step_setting({"journal": {"steps": setting}, "power": {"idle_watts": 3}}) == setting
    assert step_setting({"journal": {}}) == step_setting({}) == "disk"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"journal": {"steps": "tape"}}, "none of disk, memory, auto"),
        ({"journal": {"fsync": True}}, "unknown key 'fsync'"),
        ({"journal": 3}, "no table"),
    ],
)
def test_other_step_settings_are_refused(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        step_setting(settings)


@pytest.mark.parametrize(
    ("machines", "threads"),
    [
        ([(1, 1)], 1),
        ([(2, 2)], 1),
        ([(8, 8)], 4),
        ([(8, 8), (4, 4)], 2),
        ([(16, 3), (16, 16)], 3),
        ([(16, 16), (1, 1)], 1),
    ],
    ids=str,
)
def test_run_uses_half_of_the_smallest_machine_within_what_owners_allow(
    machines: list[tuple[int, int]], threads: int
) -> None:
    records = [
        dataclasses.replace(make_record(DeviceId("a" * 26)), cores=cores, threads_max=allowed)
        for cores, allowed in machines
    ]
    assert default_threads(records) == threads
