"""What all stages' results of a step come to, and what is refused."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from p2ptrain.errors import InvariantBroken, NumericsError, RemoteProtocolError
from p2ptrain.planner.plan import Plan, StagePlan, StageShare
from p2ptrain.training.barrier import StepBarrier, stage_tensor_indices
from p2ptrain.training.messages import Done, stamp_of
from tests.bundles import tiny_bundle
from tests.sim.plans import device, make_plan

MANIFEST = tiny_bundle(blocks=2).manifest  # embed, block0, block1, head: 6 tensors
CUTS = ((0, 2), (2, 2))


def two_stages() -> Plan:
    base = make_plan(device(0), device(1), device(2))
    stages = tuple(
        StagePlan(
            device=device(i), first_segment=first, segment_count=count, in_flight_max=1,
            step_compute_ns=1, memory_bytes=1, parameter_count=1,
        )
        for i, (first, count) in enumerate(CUTS)
    )  # fmt: skip
    return Plan(
        run=base.run, lineage=base.lineage, view=base.view, members=base.members, home=device(2),
        holders=(device(2),), contract=base.contract, schedule="1f1b", stages=stages, step_ns=1,
        reasons=(),
    )  # fmt: skip


PLAN = two_stages()
LAST = 50


def barrier(*, clip_norm: float = 1.0, first_step: int = 0) -> StepBarrier:
    return StepBarrier(
        plan=PLAN, manifest=MANIFEST, clip_norm=clip_norm, first_step=first_step, last_step=LAST
    )


def done(step: int, sums: list[float], *, loss: float | None = None, skip: bool = False) -> Done:
    content = np.array(sums, "<f8").tobytes()
    return Done(stamp=stamp_of(PLAN), step=step, square_sums=content, loss=loss, skip=skip)


def fill(collected: StepBarrier, step: int, *, loss: float = 1.0, skip: bool = False) -> None:
    collected.add(device(1), done(step, [4.0, 1.0, 2.0], loss=loss))
    collected.add(device(0), done(step, [1.0, 4.0, 4.0], skip=skip))


def test_tensor_indices_follow_the_manifest() -> None:
    assert stage_tensor_indices(MANIFEST, range(2)) == (0, 1, 2)
    assert stage_tensor_indices(MANIFEST, range(2, 4)) == (3, 4, 5)
    assert stage_tensor_indices(MANIFEST, ()) == ()


def test_totals_of_a_step_are_one_norm_and_one_scale() -> None:
    collected = barrier()
    assert collected.missing(1) == (device(0), device(1))
    collected.add(device(1), done(1, [4.0, 1.0, 2.0], loss=2.5))
    assert collected.missing(1) == (device(0),)
    collected.add(device(0), done(1, [1.0, 4.0, 4.0]))
    assert collected.missing(1) == ()
    totals = collected.take(1)
    assert (totals.step, totals.loss, totals.gradient_norm) == (1, 2.5, 4.0)
    assert totals.clip_scale == pytest.approx(0.25, rel=1e-5)
    assert collected.missing(1) == (device(0), device(1))


def test_without_clipping_the_scale_is_one() -> None:
    collected = barrier(clip_norm=0.0)
    fill(collected, 1)
    assert collected.take(1).clip_scale == 1.0


def test_repeated_result_changes_nothing() -> None:
    collected = barrier()
    fill(collected, 1)
    collected.add(device(0), done(1, [9.0, 9.0, 9.0]))
    assert collected.take(1).gradient_norm == 4.0
    collected.add(device(0), done(1, [9.0, 9.0, 9.0]))
    assert collected.missing(1) == (device(0), device(1))


def test_next_step_may_come_ahead() -> None:
    collected = barrier()
    collected.add(device(0), done(2, [1.0, 4.0, 4.0]))
    fill(collected, 1, loss=5.0)
    assert collected.take(1).loss == 5.0
    assert collected.missing(2) == (device(1),)


def test_committed_step_needs_nothing_more_from_anybody() -> None:
    collected = barrier()
    collected.add(device(0), done(1, [9.0, 9.0, 9.0]))
    collected.add(device(0), done(2, [9.0, 9.0, 9.0]))
    collected.add(device(0), done(3, [9.0, 9.0, 9.0]))  # too far ahead to be kept
    collected.skip_to(2)
    collected.skip_to(1)
    assert collected.missing(3) == (device(0), device(1))
    collected.add(device(1), done(2, [4.0, 1.0, 2.0], loss=2.5))
    fill(collected, 3, loss=5.0)
    assert collected.take(3).loss == 5.0


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_loss_that_is_not_finite_stops_the_step(loss: float) -> None:
    collected = barrier()
    fill(collected, 1, loss=loss)
    with pytest.raises(NumericsError, match="step 1: the loss or a gradient"):
        collected.take(1)


def test_one_stage_that_skips_stops_the_step_for_all() -> None:
    collected = barrier()
    fill(collected, 1, skip=True)
    with pytest.raises(NumericsError):
        collected.take(1)


def test_totals_before_every_stage_reported_are_a_bug() -> None:
    collected = barrier()
    with pytest.raises(InvariantBroken):
        collected.take(1)


@pytest.mark.parametrize(
    ("sender", "result"),
    [
        (2, done(1, [1.0, 1.0, 1.0])),  # home has no stage
        (3, done(1, [1.0, 1.0, 1.0])),  # no member
        (0, done(1, [1.0, 1.0])),
        (0, done(1, [1.0, 1.0, 1.0, 1.0])),
        (0, done(LAST + 1, [1.0, 1.0, 1.0])),  # there is no such step
    ],
)
def test_result_that_does_not_fit_is_the_senders_error(sender: int, result: Done) -> None:
    with pytest.raises(RemoteProtocolError):
        barrier().add(device(sender), result)


def test_resumed_run_counts_from_its_first_step() -> None:
    collected = barrier(first_step=40)
    collected.add(device(0), done(40, [1.0, 1.0, 1.0]))  # of a step that is over: nothing
    assert collected.missing(40) == (device(0), device(1))
    fill(collected, 41)
    assert collected.take(41).step == 41


def test_what_replicas_tell_is_added_in_the_order_of_ranks() -> None:
    shares = tuple(
        StageShare(device=device(i), weight=1, step_compute_ns=1, memory_bytes=1) for i in (1, 2, 0)
    )  # fmt: skip
    whole = dataclasses.replace(
        PLAN.stages[0], device=device(1), segment_count=4, split="replicas", shares=shares
    )
    plan = dataclasses.replace(PLAN, stages=(whole,))
    collected = StepBarrier(
        plan=plan, manifest=MANIFEST, clip_norm=0.0, first_step=0, last_step=LAST
    )
    losses = {device(1): 1e16, device(2): -1e16, device(0): 1.0}
    for index in range(3):
        told = [9.0, 0.0, 0.0, 0.0, 7.0, 0.0] if index == 1 else [0.0] * 6
        assert len(collected.missing(1)) == 3 - index
        collected.add(device(index), done(1, told, loss=losses[device(index)]))
    totals = collected.take(1)
    assert totals.loss == 1.0
    assert totals.gradient_norm == 4.0
