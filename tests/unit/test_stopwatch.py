"""What a quota makes of short measurements."""

from __future__ import annotations

import pytest

from p2ptrain.runtime.compute.stopwatch import LOOP_CORES, NO_QUOTA, Stopwatch, Taken

MS = 1_000_000


@pytest.mark.parametrize(
    ("cores", "walls", "cpus", "expected"),
    [
        (None, (5, 4, 9), (4, 4, 4), 4),
        (2.0, (5, 4, 9), (4, 4, 4), 4),
        (0.4 + LOOP_CORES, (4, 4, 10), (4, 4, 4), 10),
        (0.4 + LOOP_CORES, (4, 4, 10), (4, 4, 6), 10),
        (0.4 + LOOP_CORES, (12, 13, 14), (4, 4, 4), 12),
        (0.5 + LOOP_CORES, (4,), (8,), 16),
        (LOOP_CORES, (4,), (4,), 400),
    ],
    ids=[
        "no quota",
        "ample",
        "in bursts",
        "one disturbed",
        "throttled already",
        "two threads",
        "a sliver",
    ],
)
def test_calls_last_what_their_processor_time_takes_under_the_quota(
    cores: float | None, walls: tuple[int, ...], cpus: tuple[int, ...], expected: int
) -> None:
    taken = [Taken(wall * MS, cpu * MS) for wall, cpu in zip(walls, cpus, strict=True)]
    assert Stopwatch(cores=cores).lasting_ns(taken) == pytest.approx(expected * MS)


def test_both_clocks_are_read_before_and_after_the_call() -> None:
    wall, cpu = iter((10, 25)), iter((3, 7))
    called = []
    watch = Stopwatch(clock_ns=lambda: next(wall), cpu_ns=lambda: next(cpu))
    assert watch.time(lambda: called.append(1)) == (15, 4)
    assert called == [1]


def test_real_clocks_move() -> None:
    taken = NO_QUOTA.time(lambda: sum(range(100_000)))
    assert taken.wall_ns > 0
    assert taken.cpu_ns > 0
