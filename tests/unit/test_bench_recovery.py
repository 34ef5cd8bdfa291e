"""What `tools/bench_recovery.py` makes of its turns and of a link."""

from __future__ import annotations

import inspect

import pytest

from p2ptrain import limits
from p2ptrain.recovery.step_log import StepLog
from p2ptrain.runtime.keeping.run_state import RunState
from p2ptrain.runtime.views.view_work import ViewWork
from tools.bench import bare_peer
from tools.bench.processes import parse_cpu_s
from tools.bench.recovery import (
    BERT_BASE,
    Link,
    interval_of,
    link_cost,
    overheads,
    predicted_interval,
)

GIGABIT = 125e6


def test_overhead_is_taken_round_by_round() -> None:
    found = overheads([1.02, 2.10, 1.0], [1.0, 2.0, 1.0])
    assert found.median == pytest.approx(0.02)
    assert found.least == pytest.approx(0.0)
    assert found.greatest == pytest.approx(0.05)


def test_tensors_wait_for_one_chunk_while_a_set_travels() -> None:
    link = Link(bytes_per_s=GIGABIT, set_bytes=125_000_000, step_bytes=0, step_tensors=10)
    cost = link_cost(link, step_s=2.0, interval=20)
    assert cost.transfer_s == pytest.approx(1.0)
    chunk_s = limits.BULK_CHUNK_BYTES_MAX / GIGABIT
    assert cost.delay_share_max == pytest.approx(0.5 * 10 * chunk_s / 40.0)
    assert cost.serial_share == pytest.approx(1.0 / 40.0)


def test_set_travels_on_what_the_tensors_leave() -> None:
    half = Link(bytes_per_s=GIGABIT, set_bytes=125_000_000, step_bytes=62_500_000, step_tensors=1)
    assert link_cost(half, step_s=1.0, interval=10).transfer_s == pytest.approx(2.0)
    full = Link(bytes_per_s=GIGABIT, set_bytes=125_000_000, step_bytes=1 << 40, step_tensors=1)
    assert link_cost(full, step_s=1.0, interval=10).transfer_s == pytest.approx(100.0)


def test_bert_base_on_100_mbit_is_bound_by_the_link() -> None:
    found = predicted_interval(BERT_BASE, bytes_per_s=GIGABIT / 10)
    assert found.steps == 63
    assert "carries" in found.reason


def test_stages_that_compute_all_the_time_are_bound_by_the_time_to_replay_them() -> None:
    found = interval_of(parameters=6_900_000, log_bytes=6_300_000, step_s=1.83, bytes_per_s=GIGABIT)
    assert found.steps == 15
    assert "time" in found.reason
    slower = interval_of(parameters=690_000, log_bytes=630_000, step_s=1.83, bytes_per_s=GIGABIT)
    assert slower.steps == 10


def test_processor_time_is_read_behind_any_name() -> None:
    rest = "S 1 2 3 4 5 6 7 8 9 10 1234 66 0 0 20 0"
    assert parse_cpu_s(f"12 (a (b) c d) {rest}", 100) == 13.0
    assert parse_cpu_s("", 100) is None


def test_bare_peer_replaces_what_the_product_has(monkeypatch: pytest.MonkeyPatch) -> None:
    for owner, name in ((RunState, "log_sent"), (StepLog, "finish"), (ViewWork, "_own_keepers")):
        method = getattr(owner, name)
        assert inspect.isfunction(method)
        monkeypatch.setattr(owner, name, method)  # put back after the test
    bare_peer.strip()
    log = StepLog(bytes_max=10)
    log.finish(1)
    assert log.inventory() == ()
    assert ViewWork._own_keepers(None) == ()  # type: ignore[arg-type]  # nothing of it is read
    assert "nothing" in RunState.log_sent.__qualname__
