"""What a machine draws, as plans are told: booked by its meter, else modelled."""

from __future__ import annotations

import dataclasses

import pytest

from p2ptrain.energy.ledger import PhaseAmount
from p2ptrain.energy.power_model import PowerModel
from p2ptrain.runtime.reporting.usage import power_drawn

MODEL = PowerModel(idle_watts=3.0, core_watts=2.0, joules_per_byte=1e-7, cores=4, source="a model")
LONG = PhaseAmount(wall_ns=20 * 10**9, marginal_uj=100 * 10**6, idle_uj=60 * 10**6)


@pytest.mark.parametrize(("threads", "busy_uw"), [(1, 5_000_000), (2, 7_000_000), (9, 11_000_000)])
def test_without_a_meter_cores_are_counted(threads: int, busy_uw: int) -> None:
    found = power_drawn(MODEL, LONG, threads=threads, is_metered=False)
    assert (found.idle_uw, found.busy_uw, found.pj_per_byte) == (3_000_000, busy_uw, 100_000)
    assert not found.measured
    assert found.error_permille is None
    banded = dataclasses.replace(MODEL, error_band=0.5)
    found = power_drawn(banded, LONG, threads=threads, is_metered=False)
    assert found.error_permille == 500


def test_a_meter_is_believed_once_it_has_seen_enough() -> None:
    found = power_drawn(MODEL, LONG, threads=1, is_metered=True)
    assert (found.busy_uw, found.measured) == (3_000_000 + 5_000_000, True)
    short = PhaseAmount(wall_ns=10**9, marginal_uj=10**9, idle_uj=0)
    found = power_drawn(MODEL, short, threads=1, is_metered=True)
    assert (found.busy_uw, found.measured) == (5_000_000, False)
