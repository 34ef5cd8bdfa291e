"""The meter of this machine: the best readable source, else the model, labelled as it is."""

from __future__ import annotations

import dataclasses
import functools
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from p2ptrain.energy.meter import MeterIdentity, Reading
from p2ptrain.energy.power_model import PowerModel
from p2ptrain.power.battery import battery_watts
from p2ptrain.power.host import host_identity, machine_cpu_ns
from p2ptrain.power.integrator import PowerIntegrator
from p2ptrain.power.jetson import find_jetson_rails
from p2ptrain.power.model import PowerConfig, model_for, package_model
from p2ptrain.power.rapl import RaplCounter, open_rapl


class EnergyCounter(Protocol):
    """A source of microjoules that only grow."""

    def read_uj(self, now: float) -> int | None:
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
        self.model = model
        self._identity = identity
        self._has_gaps = False
        self._counter = counter
        self._machine_cpu_ns = machine_cpu_ns

    @property
    def identity(self) -> MeterIdentity:
        """What the figures are; an estimate once a reading has failed and the model stood in."""
        if not self._has_gaps:
            return self._identity
        return dataclasses.replace(
            self._identity,
            quality="estimated",
            error_band=self.model.error_band,
            source=f"{self._identity.source}; partly modelled",
        )

    def read(self, now: float) -> Reading:
        """One reading; takes a few file reads and never fails."""
        counter_uj = None
        if self._counter is not None:
            counter_uj = self._counter.read_uj(now)
            self._has_gaps |= counter_uj is None
        return Reading(at_s=now, counter_uj=counter_uj, machine_cpu_ns=self._machine_cpu_ns())


def open_meter(
    *,
    root: Path = Path("/"),
    config: PowerConfig | None = None,
    machine: str | None = None,
    cores: int | None = None,
) -> Meter:
    """RAPL, a Jetson's sensors or a discharging battery; else the model, which says why.

    Args:
        root: Prefix of /sys, /proc and /etc; for tests.
        config: `[power]` of config.toml.
        machine: Overrides platform.machine().
        cores: Overrides the number of cores.
    """
    config = PowerConfig() if config is None else config
    machine = platform.machine() if machine is None else machine
    cores = (os.cpu_count() or 1) if cores is None else cores
    model = model_for(machine=machine, cores=cores, config=config)
    if config.meter == "model":
        return _modelled(root, "", model)
    rapl = open_rapl(root)
    if isinstance(rapl, RaplCounter):
        return _rapl(root, rapl, package_model(machine=machine, cores=cores, config=config))
    jetson = find_jetson_rails(root)
    if jetson is not None:
        return _integrated(root, "ina3221", jetson.scope, jetson.source, jetson.watts, model)
    if battery_watts(root) is not None:
        watts = functools.partial(battery_watts, root)
        return _integrated(root, "battery", "board", "battery discharge", watts, model)
    return _modelled(root, f" ({rapl.reason})", model)


def _rapl(root: Path, counter: RaplCounter, model: PowerModel) -> Meter:
    names = [zone.name for zone in counter.zones]
    identity = MeterIdentity(
        meter=f"{host_identity(root)}/rapl",
        scope="board" if names == ["psys"] else "package",
        quality="measured",
        error_band=None,
        source=f"RAPL {', '.join(names)}; split by CPU share; idle: {model.source}",
    )
    return _meter(root, identity, model, counter)


def _integrated(
    root: Path,
    name: str,
    scope: str,
    source: str,
    watts: Callable[[], float | None],
    model: PowerModel,
) -> Meter:
    identity = MeterIdentity(
        meter=f"{host_identity(root)}/{name}",
        scope=scope,
        quality="measured",
        error_band=None,
        source=f"{source}; split by CPU share; idle: {model.source}",
    )
    return _meter(root, identity, model, PowerIntegrator(watts))


def _modelled(root: Path, why: str, model: PowerModel) -> Meter:
    identity = MeterIdentity(
        meter=f"{host_identity(root)}/model",
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
        machine_cpu_ns=functools.partial(machine_cpu_ns, root),
    )
