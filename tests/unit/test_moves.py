"""What moving segments costs, and when it pays."""

from __future__ import annotations

import dataclasses

from p2ptrain.bundle.manifest import Manifest, UpdateRule
from p2ptrain.ids import DeviceId, Digest
from p2ptrain.planner.input import LinkEstimate
from p2ptrain.planner.moves import moving_ns, pays
from p2ptrain.planner.plan import StagePlan
from tests.planning_cases import device, manifest

A, B, C = device("a"), device("b"), device("c")


def stages(*spans: tuple[DeviceId, int]) -> list[StagePlan]:
    found, first = [], 0
    for owner, count in spans:
        found.append(
            StagePlan(
                device=owner, first_segment=first, segment_count=count, in_flight_max=1,
                step_compute_ns=1, memory_bytes=1, parameter_count=1,
            )
        )  # fmt: skip
        first += count
    return found


def link(first: DeviceId, second: DeviceId) -> LinkEstimate:
    rate = 1_000 if C in (first, second) else 1_000_000
    return LinkEstimate(first=first, second=second, latency_ns=7, bytes_per_s=rate)


def cost(model: Manifest, after: list[StagePlan]) -> int:
    before = stages((A, 4), (B, 4))
    return moving_ns(before, after, manifest=model, optimizer="adamw", link=link)


def test_only_segments_that_change_their_device_travel() -> None:
    model = manifest(8)
    assert cost(model, stages((A, 4), (B, 4))) == 0
    one_ns = 7 + 16 * 4 * 1_000  # 16 parameters of 4 bytes at 1 byte per microsecond
    assert cost(model, stages((A, 5), (B, 3))) == one_ns
    assert cost(model, stages((B, 8))) == 4 * one_ns
    assert cost(model, stages((A, 7), (C, 1))) == 3 * one_ns + 7 + 16 * 4 * 1_000_000


def test_optimizer_state_travels_with_its_parameters() -> None:
    rule = UpdateRule(graph=Digest("0" * 64), state=("m", "v"), scalars=(), in_place=True)
    model = dataclasses.replace(manifest(8), updates={"adamw": rule})
    assert cost(model, stages((A, 5), (B, 3))) == 7 + 3 * 16 * 4 * 1_000


def test_steps_that_are_left_decide() -> None:
    gains = [pays(before_ns=12, after_ns=10, steps_left=left, moves_ns=200) for left in (100, 101)]
    assert gains == [False, True]
    assert not pays(before_ns=10, after_ns=12, steps_left=10**6, moves_ns=0)
