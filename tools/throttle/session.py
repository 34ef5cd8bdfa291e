"""One `train` in a throttled group: what was predicted before it, and what it then took."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import trio

from p2ptrain.net.control_socket import call
from p2ptrain.runtime.reports import PlanReport, StepReport, TrainRequest, TrainResult
from p2ptrain.wire.codec import from_plain, to_plain
from tools.bench.processes import peak_bytes
from tools.throttle.group import ThrottledGroup

SETTLING_STEPS: Final = 2
"""First steps, which are not counted: buffers are new, and pages come into memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """What a run told."""

    plan: PlanReport
    steps: tuple[StepReport, ...]
    result: TrainResult
    peak_bytes: tuple[int, ...]
    """By peer: the most that its process has had resident since it began."""

    @property
    def counted_s(self) -> tuple[float, ...]:
        """The steps' times, without those that settle."""
        return tuple(step.seconds for step in self.steps[SETTLING_STEPS:])

    @property
    def step_s(self) -> float:
        """Median of the steps that count."""
        return statistics.median(self.counted_s)


@dataclass(slots=True)
class _Told:
    """Events as they come; the plan is handed on at once, before the first step."""

    planned: Callable[[PlanReport], None]
    plans: list[PlanReport] = field(default_factory=list)
    steps: list[StepReport] = field(default_factory=list)

    def take(self, name: str, data: dict[str, Any]) -> None:  # Any: JSON values
        if name == "plan":
            self.plans.append(from_plain(PlanReport, data))
            self.planned(self.plans[-1])
        elif name == "step":
            self.steps.append(from_plain(StepReport, data))


async def train_once(
    group: ThrottledGroup,
    request: TrainRequest,
    *,
    timeout_s: float,
    planned: Callable[[PlanReport], None] = lambda plan: None,
) -> Session:
    """Have the first peer conduct a run to its end.

    Args:
        group: Running peers.
        request: At least three steps.
        timeout_s: For all of it.
        planned: Called with the plan as soon as it is decided, before the first step.

    Raises:
        P2PTrainError: as the peers report it; PlanInfeasible where nothing fits.
        trio.TooSlowError: it was not over in time.
    """
    told = _Told(planned)
    with trio.fail_after(timeout_s):
        answer = await call(
            group.peers[0].member.socket(), "train", to_plain(request), told.take
        )  # fmt: skip
    return Session(
        plan=told.plans[-1],
        steps=tuple(told.steps),
        result=from_plain(TrainResult, answer),
        peak_bytes=tuple(peak_bytes(peer.pid) or 0 for peer in group.peers),
    )
