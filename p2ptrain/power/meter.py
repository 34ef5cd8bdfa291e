"""The meter of this machine: the best readable source, else the model, labelled as it is."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from p2ptrain.energy.meter import MeterIdentity, Reading
from p2ptrain.energy.power_model import PowerModel
from p2ptrain.power.host import host_identity, machine_cpu_ns
from p2ptrain.power.model import PowerConfig, model_for, package_model
from p2ptrain.power.rapl import RaplCounter, open_rapl


class EnergyCounter(Protocol):
    """A source of microjoules that only grow."""

    def read_uj(self) -> int | None:
        """Microjoules since it was opened; None when it cannot be read now."""
        ...


class Meter:
    """One machine's meter; `model` gives what the counter does not say."""

    def __init__(
        self,
        *,
        identity: MeterIdentity,
        model: PowerModel,
        counter: EnergyCounter | None,
        machine_cpu_ns: Callable[[], int | None],
    ) -> None:
        self.identity = identity
        self.model = model
        self._counter = counter
        self._machine_cpu_ns = machine_cpu_ns

    def read(self, now: float) -> Reading:
        """One reading; takes well under a millisecond and never fails."""
        return Reading(
            at_s=now,
            counter_uj=None if self._counter is None else self._counter.read_uj(),
            machine_cpu_ns=self._machine_cpu_ns(),
        )


def open_meter(
    *,
    root: Path = Path("/"),
    config: PowerConfig | None = None,
    machine: str | None = None,
    cores: int | None = None,
) -> Meter:
    """RAPL where it is readable, else the calibrated model, which says why.

    Args:
        root: Prefix of /sys, /proc and /etc; for tests.
        config: `[power]` of config.toml.
        machine: Overrides platform.machine().
        cores: Overrides the number of cores.
    """
    config = PowerConfig() if config is None else config
    machine = platform.machine() if machine is None else machine
    cores = (os.cpu_count() or 1) if cores is None else cores
    host = host_identity(root)
    if config.meter == "model":
        return _modelled(root, host, "", model_for(machine=machine, cores=cores, config=config))
    rapl = open_rapl(root)
    if isinstance(rapl, RaplCounter):
        return _rapl(root, host, rapl, package_model(machine=machine, cores=cores, config=config))
    model = model_for(machine=machine, cores=cores, config=config)
    return _modelled(root, host, f" ({rapl.reason})", model)


def _rapl(root: Path, host: str, counter: RaplCounter, model: PowerModel) -> Meter:
    names = [zone.name for zone in counter.zones]
    identity = MeterIdentity(
        meter=f"{host}/rapl",
        scope="board" if names == ["psys"] else "package",
        quality="measured",
        error_band=None,
        source=f"RAPL {', '.join(names)}; split by CPU share; idle: {model.source}",
    )
    return _meter(root, identity, model, counter)


def _modelled(root: Path, host: str, why: str, model: PowerModel) -> Meter:
    identity = MeterIdentity(
        meter=f"{host}/model",
        scope="model",
        quality="estimated",
        error_band=model.error_band,
        source=f"model: {model.source}{why}",
    )
    return _meter(root, identity, model, None)


def _meter(
    root: Path, identity: MeterIdentity, model: PowerModel, counter: EnergyCounter | None
) -> Meter:
    return Meter(
        identity=identity,
        model=model,
        counter=counter,
        machine_cpu_ns=lambda: machine_cpu_ns(root),
    )
