"""The log of sent tensors: whole steps, bounds that drop nothing, what a promise tells of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from p2ptrain.recovery.inventory import HeldLog, LogKind
from p2ptrain.recovery.step_log import LogKey, StepLog


def key(step: int, microbatch: int = 0, segment: int = 3, index: int = 0) -> LogKey:
    return LogKey(kind="activation", step=step, microbatch=microbatch, segment=segment, index=index)


def log_of(*steps: int, bytes_max: int = 1000) -> StepLog:
    log = StepLog(bytes_max=bytes_max)
    for step in steps:
        log.put(key(step), b"12345678")
        log.finish(step)
    return log


def held(first: int, last: int, kind: LogKind = "activation", segment: int = 3) -> HeldLog:
    return HeldLog(kind=kind, segment=segment, first_step=first, last_step=last)


def test_log_of_a_replica_says_which_microbatches_it_has() -> None:
    log = StepLog(bytes_max=1000, microbatches=4)
    for step, own in ((1, (0, 2)), (2, (0, 2)), (3, (1,)), (4, (0, 1, 2, 3))):
        for microbatch in own:
            log.put(key(step, microbatch), b"%d" % microbatch)
        tied = LogKey(kind="tied", step=step, microbatch=0, segment=3, index=9)
        log.put(tied, b"whole")
        log.finish(step)
    assert set(log.inventory()) == {
        replace(held(1, 2), microbatches=(0, 2)),
        replace(held(3, 3), microbatches=(1,)),
        held(4, 4),
        held(1, 4, "tied"),
    }
    assert log.read("activation", 3, 4, (3, 1)) == (b"1", b"3")
    assert log.read("activation", 3, 1, (1, 2)) == (b"2",)
    with pytest.raises(ValueError, match="named once"):
        replace(held(1, 2), microbatches=(2, 0))


def test_tensor_is_copied_and_read_in_order_of_microbatch_and_index() -> None:
    log = StepLog(bytes_max=1000)
    buffer = np.arange(4, dtype=np.float32)
    log.put(key(1, microbatch=1), memoryview(buffer))
    buffer[:] = 0
    log.put(key(1, microbatch=0, index=1), b"second")
    log.put(key(1, microbatch=0, index=0), b"first")
    assert log.read("activation", 3, 1) is None  # the step is not whole
    log.finish(1)
    whole = log.read("activation", 3, 1)
    assert whole == (b"first", b"second", np.arange(4, dtype=np.float32).tobytes())
    assert log.read("cotangent", 3, 1) is None


def test_bound_is_told_and_nothing_is_dropped() -> None:
    log = log_of(1, 2, bytes_max=24)
    assert not log.full
    log.put(key(3), b"12345678")
    assert log.full
    log.finish(3)
    assert log.inventory() == (held(1, 3),)
    log.release(1)
    assert not log.full


def test_release_and_truncation_leave_the_steps_between() -> None:
    log = log_of(1, 2, 3, 4, 5)
    log.put(key(6), b"open")
    log.release(2)
    log.truncate(4)
    assert log.inventory() == (held(3, 4),)
    statistics = log.statistics()
    assert (statistics.first_step, statistics.last_step) == (3, 4)
    assert (statistics.held_bytes, statistics.tensor_count) == (16, 2)
    log.finish(6)  # it was open and is gone
    assert log.inventory() == (held(3, 4),)
    log.release(9)
    assert log.inventory() == ()
    assert log.statistics().first_step is None


def test_step_made_again_replaces_what_was_logged() -> None:
    log = log_of(1)
    log.put(key(1), b"other")
    log.put(key(1), b"third")
    assert log.read("activation", 3, 1) == (b"12345678",)
    log.finish(1)
    assert log.read("activation", 3, 1) == (b"third",)
    assert log.statistics().held_bytes == 5


def test_inventory_has_each_place_and_each_stretch() -> None:
    log = log_of(1, 2, 4)
    tied = LogKey(kind="tied", step=4, microbatch=0, segment=0, index=0)
    log.put(tied, b"")
    log.finish(4)
    assert log.inventory() == (held(1, 2), held(4, 4), held(4, 4, "tied", 0))
