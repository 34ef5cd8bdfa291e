"""What config.toml may say."""

from __future__ import annotations

import pytest

from p2ptrain.errors import ConfigError
from p2ptrain.power.model import PowerConfig
from p2ptrain.runtime.config import power_settings


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
