"""What a home peer remembers of a session's steps, also one that became it in mid run."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import cast

import pytest

from p2ptrain.ids import DeviceId
from p2ptrain.planner.plan import Plan, StageShare
from p2ptrain.runtime.home.progress import ProgressTracker
from p2ptrain.runtime.planning.job import Job
from p2ptrain.runtime.reports import EvaluationReport
from p2ptrain.runtime.services import Services
from p2ptrain.training.messages import Evaluated, stamp_of
from tests.sim.plans import device
from tests.sim.run_views import CONTRACT, first_view, make_step

HOME, OTHER = device(0), device(1)


def tracker(first_step: int, reports: list[object]) -> ProgressTracker:
    directory = SimpleNamespace(append_progress=lambda line: None)
    return ProgressTracker(
        job=cast(Job, SimpleNamespace(directory=directory)),
        plan=first_view(HOME, OTHER).plan,
        contract=CONTRACT,
        services=cast(Services, None),
        emit=lambda name, report: reports.append(report),
        first_step=first_step,
    )


@pytest.mark.parametrize("first_step", [0, 1, 2])
def test_loss_keeps_the_step_it_belongs_to(first_step: int) -> None:
    """Also where the first steps were still on their way when the session was taken over."""
    reports: list[object] = []
    progress = tracker(first_step, reports)
    for step in (1, 2, 3, 4):
        progress.step_committed(make_step(step, loss=float(step)), live=False)
    progress.fall_back(3)
    assert progress.losses == (1.0, 2.0, 3.0)
    for step in (4, 6, 5):
        progress.step_committed(make_step(step, loss=10.0 * step), live=False)
    assert progress.losses == (1.0, 2.0, 3.0, 40.0, 50.0, 60.0)
    assert len(reports) == 7


def replicated() -> Plan:
    """One stage of two replicas, OTHER the first of them."""
    base = first_view(HOME, OTHER).plan
    shares = tuple(
        StageShare(device=d, weight=1, step_compute_ns=1, memory_bytes=1) for d in (OTHER, HOME)
    )
    stage = dataclasses.replace(
        base.stages[0], device=OTHER, segment_count=len(base.stages), split="replicas",
        shares=shares,
    )  # fmt: skip
    return dataclasses.replace(base, stages=(stage,), replicas=())


def test_evaluation_is_complete_when_all_replicas_have_told_it() -> None:
    reports: list[EvaluationReport] = []
    progress, plan = tracker(0, cast(list[object], reports)), replicated()
    progress.begin_view(plan)
    for step, told in ((0, (1.5, 2.0)), (2, (0.5, 1.0))):
        for index, (loss, teller) in enumerate(zip(told, (HOME, OTHER), strict=True)):
            assert progress.completed_items == step // 2, index
            message = Evaluated(stamp=stamp_of(plan), step=step, loss=loss)
            progress.receive(teller, message)
        assert progress.evaluated_at == step
    assert [report.heldout_loss for report in reports] == [3.5, 1.5]


def test_evaluation_that_one_replica_is_ahead_of_is_completed_by_the_slower_one() -> None:
    reports: list[EvaluationReport] = []
    progress, plan = tracker(0, cast(list[object], reports)), replicated()
    progress.begin_view(plan)

    def hear(teller: DeviceId, *steps: int) -> None:
        for step in steps:
            told = Evaluated(stamp=stamp_of(plan), step=step, loss=1.0 + step)
            progress.receive(teller, told)

    hear(OTHER, 0, 2)
    assert progress.evaluated_at is None
    hear(HOME, 0)
    assert (progress.completed_items, progress.evaluated_at) == (1, 0)
    hear(HOME, 2)
    assert (progress.completed_items, progress.evaluated_at) == (2, 2)
    assert [report.heldout_loss for report in reports] == [2.0, 6.0]
    hear(OTHER, *range(3, 99))  # more than is ever fed ahead: the newest are kept
    hear(HOME, 3, 98)
    assert (progress.completed_items, progress.evaluated_at) == (3, 98)
