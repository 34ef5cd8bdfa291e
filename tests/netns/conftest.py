"""Skip with the reason where no network can be emulated; one network of three stations else."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools.wifi_emulator.medium import Air
from tools.wifi_emulator.namespaces import Unavailable, require_permitted
from tools.wifi_emulator.wifi import Wifi, wifi

ROOT = Path(__file__).resolve().parents[2]
STATIONS = ("a", "b", "c")
AIR = Air(rate_mbit=100, delay_ms=5, loss_percent=1)


@pytest.fixture(scope="session", autouse=True)
def permitted() -> None:
    """Nothing here runs without namespaces."""
    try:
        require_permitted()
    except Unavailable as error:
        pytest.skip(f"no network can be emulated here: {error}")


@pytest.fixture(scope="session", autouse=True)
def private_runtime_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Control sockets go into a short, empty folder of our own."""
    folder = tmp_path_factory.mktemp("run")
    folder.chmod(0o700)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(folder))
        before = os.environ.get("PYTHONPATH", "")
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(ROOT), before))))
        yield


@pytest.fixture
def air(permitted: None) -> Iterator[Wifi]:
    """Three stations at 100 Mbit/s, 5 ms and 1 % loss."""
    with wifi(STATIONS, AIR, seed=7) as running:
        yield running
