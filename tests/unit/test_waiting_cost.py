"""What `tools/waiting_cost.py` says of what it has measured."""

from __future__ import annotations

from dataclasses import replace

from tools.waiting_cost import CPU_LIMIT, Waiting, table, within_limit

QUIET = Waiting(peer="peer-2", waits_for="pause", seconds=20.0, cpu_fraction=0.008)


def test_one_survivor_above_the_limit_is_too_much() -> None:
    assert within_limit([QUIET])
    assert not within_limit([QUIET, replace(QUIET, cpu_fraction=CPU_LIMIT)])


def test_table_tells_each_survivor_and_the_limit() -> None:
    assert table([QUIET, replace(QUIET, peer="peer-3", waits_for="silence")]).splitlines() == [
        "peer-2: 0.80% of a core (limit 5%), watched for 20.0 s of pause",
        "peer-3: 0.80% of a core (limit 5%), watched for 20.0 s of silence",
    ]
