"""When replicas add up their gradients: beside the backward, and also who ran no microbatch."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import trio

from p2ptrain.ids import DeviceId
from p2ptrain.planner.plan import StagePlan, StageShare
from p2ptrain.runtime.compute.stage import StageWorker
from p2ptrain.runtime.exchange.meeting import Meetings
from p2ptrain.runtime.signal import Signal
from p2ptrain.runtime.views.gradient_sums import GradientSums
from p2ptrain.training.collectives import Array, MeetingKey
from p2ptrain.training.layout import flat_layout
from p2ptrain.training.routing import Route
from tests.bundles import tiny_bundle
from tests.memory_group import MemoryReader, memory_group, request_for
from tests.replicated import plan_text
from tests.sim.plans import device, make_plan
from tests.unit.test_meeting import header

BUNDLE = tiny_bundle()
SEGMENTS = len(BUNDLE.manifest.segments)
SECONDS_MAX, STUCK_S = 60.0, 20.0
RANKS = (device(0), device(1))


class Sums:
    """Which gradients have been added up, by where they lie."""

    def __init__(self) -> None:
        self._done: dict[int, threading.Semaphore] = defaultdict(lambda: threading.Semaphore(0))
        self.in_time: list[bool] = []

    def note(self, vector: Array) -> None:
        self._done[vector.ctypes.data].release()

    def wait(self, vector: Array) -> None:
        """In a worker thread, so that the event loop goes on."""
        self.in_time.append(self._done[vector.ctypes.data].acquire(timeout=STUCK_S))


@pytest.fixture
def sums(monkeypatch: pytest.MonkeyPatch) -> Sums:
    """A step's last backward computes no further segment before each one's sum is known."""
    seen = Sums()
    reduce, by_segment = Meetings.reduce, StageWorker.backward_by_segment

    async def noted(meetings: Meetings, key: MeetingKey, vector: Array) -> None:
        await reduce(meetings, key, vector)
        seen.note(vector)

    def whole(worker: StageWorker, *, microbatch: int, sequence: int) -> None:
        for _ in by_segment(worker, microbatch=microbatch, sequence=sequence):
            pass

    def waiting(worker: StageWorker, *, microbatch: int, sequence: int) -> Iterator[int]:
        for segment in by_segment(worker, microbatch=microbatch, sequence=sequence):
            yield segment
            seen.wait(worker.gradient_vector(segment))

    monkeypatch.setattr(Meetings, "reduce", noted)
    monkeypatch.setattr(StageWorker, "backward", whole)
    monkeypatch.setattr(StageWorker, "backward_by_segment", waiting)
    return seen


async def test_gradients_are_added_up_while_earlier_segments_go_backward(
    tmp_path: Path, sums: Sums
) -> None:
    steps, plan = 2, plan_text([([0, 1], SEGMENTS, [2, 1])])
    async with memory_group(tmp_path, 2) as group:
        asked = request_for(tmp_path, BUNDLE, steps=steps, microbatches=3, plan=plan)
        with trio.fail_after(SECONDS_MAX):
            await group[0].train(asked)
    assert sums.in_time == [True] * (2 * SEGMENTS * steps)


class Gradients:
    """A stage's gradients, without the stage."""

    def __init__(self, value: float) -> None:
        self.vectors = {
            index: np.full(flat_layout(BUNDLE.manifest, index).length, value, np.float32)
            for index in range(SEGMENTS)
        }
        self.reduced = False

    def gradient_vector(self, segment: int) -> Array:
        return self.vectors[segment]

    def clear_gradients(self) -> None:
        for vector in self.vectors.values():
            vector.fill(0.0)

    def gradients_reduced(self) -> None:
        self.reduced = True


def replicated_stage() -> StagePlan:
    shares = tuple(
        StageShare(device=each, weight=1, step_compute_ns=1, memory_bytes=1) for each in RANKS
    )
    return StagePlan(
        device=RANKS[0], first_segment=0, segment_count=SEGMENTS, in_flight_max=1,
        step_compute_ns=1, memory_bytes=1, parameter_count=1, split="replicas", shares=shares,
    )  # fmt: skip


async def test_who_ran_no_microbatch_adds_zeros_and_gets_the_sum() -> None:
    """And not what its memory holds of the step before."""
    plan = dataclasses.replace(make_plan(*RANKS), stages=(replicated_stage(),))
    workers = [Gradients(3.0), Gradients(5.0)]
    all_sums: list[GradientSums] = []

    def made(rank: int) -> GradientSums:
        async def send(device: DeviceId, kind: str, key: MeetingKey, piece: Array) -> None:
            content = memoryview(piece.tobytes())
            receiver = all_sums[RANKS.index(device)].meetings
            reader = MemoryReader(content)
            await receiver.receive(RANKS[rank], header(kind, key), len(content), reader)

        return GradientSums(
            workers[rank],  # type: ignore[arg-type]  # what it needs of a stage
            BUNDLE.manifest,
            Route(plan, RANKS[rank]),
            send=send,
            phase=lambda phase: contextlib.nullcontext(),
            signal=Signal(),
        )

    all_sums += [made(rank) for rank in range(2)]
    for each in all_sums:
        each.meetings.open("train")

    async def step(rank: int, own: range) -> None:
        async with all_sums[rank].added_up():
            for segment in reversed(own):
                all_sums[rank].add(segment)

    with trio.fail_after(SECONDS_MAX):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(step, 0, range(SEGMENTS))
            nursery.start_soon(step, 1, range(0))
    for worker in workers:
        assert worker.reduced
        assert all((vector == 3.0).all() for vector in worker.vectors.values())
