"""What config.toml may say."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from p2ptrain.data.options import DataOptions, GivenData
from p2ptrain.errors import ConfigError
from p2ptrain.ids import DeviceId
from p2ptrain.power.model import PowerConfig
from p2ptrain.runtime.config import default_threads, given_data, power_settings, step_setting
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


def test_data_table_is_read_and_the_command_line_goes_before_it(tmp_path: Path) -> None:
    for name in ("notes.txt", "held.txt", "other.txt"):
        (tmp_path / name).write_text("text")
    table = {"path": str(tmp_path / "notes.txt"), "heldout": str(tmp_path / "held.txt"),
             "text_field": "body"}  # fmt: skip
    options = DataOptions(text_field="body")
    assert given_data({"data": table}, None) == GivenData(
        path=table["path"], heldout=table["heldout"], options=options
    )
    other = str(tmp_path / "other.txt")
    found = given_data({"data": table}, other)
    assert found is not None
    assert (found.path, found.options) == (other, options)
    assert given_data({}, other) == GivenData(path=other)
    assert given_data({}, None) is None


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (3, "no table"),
        ({"paths": "/"}, "unknown key 'paths'"),
        ({"path": 3}, "is no text"),
        ({"path": "notes.txt"}, "no absolute path"),
        ({"path": "/absent/notes.txt"}, "there is no file or folder /absent/notes.txt"),
        ({"path": "/", "heldout": "/absent"}, "there is no file or folder /absent"),
        ({"text_field": "body"}, "without a path"),
    ],
)
def test_other_data_settings_are_refused(table: object, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        given_data({"data": table}, None)


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
