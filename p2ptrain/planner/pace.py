"""How fast the stages of a view really compute, and when that asks for another plan.

Every stage tells each step's compute time with its results, so all members see all paces; each
judges only its own stage. Pure: no clock, no chance.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import deque
from typing import Final

from p2ptrain import limits
from p2ptrain.ids import DeviceId
from p2ptrain.planner.plan import Plan
from p2ptrain.planner.profile import KindCost, PeerProfile

AS_PLANNED: Final = 1000
"""Per mille of the planned time; 3000: three times as slow."""
STEPS_MIN: Final = 9
"""Before there is a pace, and of those it is the median of however long they took: one stalled
step can be longer than everything else that is looked at."""
SAMPLES_MAX: Final = 64
"""Of one stage: more than two DRIFT_FOR_S hold."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Sample:
    at_s: float
    permille: int


class PaceWatch:
    """The paces of a run's stages at one member, view after view.

    Our own stage asks for a plan when its median over twice DRIFT_FOR_S is off by DRIFT_PERMILLE,
    which it is once it was off for most of that time, and its median over the last DRIFT_FOR_S is,
    too (or over twice STEPS_MIN and STEPS_MIN steps, where these take longer). The plan that
    follows is made with the latter, so only a change by as much again asks again. Between two
    times it waits, DRIFT_PAUSE_S_MIN at first, twice as long each time up to DRIFT_PAUSE_S_MAX,
    until it was quiet for two of these: a device that is throttled now and then costs at most a
    view in 16 minutes.
    """

    def __init__(self, device: DeviceId) -> None:
        self._device = device
        self._planned_ns: dict[DeviceId, int] = {}
        self._samples: dict[DeviceId, deque[_Sample]] = {}
        self._begun_at_s: float | None = None
        self._asked_at_s = -math.inf
        self._pause_s = 0.0

    def begin(self, plan: Plan) -> None:
        """A view begins: what its plan predicts is what counts from now on."""
        self._planned_ns = {device: plan.compute_ns_of(device) for device in plan.devices}
        self._samples = {device: deque(maxlen=SAMPLES_MAX) for device in self._planned_ns}
        self._begun_at_s = None

    def note(self, device: DeviceId, compute_ns: int, now: float) -> bool:
        """A stage has told what a step took; whether our own asks for a plan, told once.

        Args:
            device: Whose stage it is; others are ignored.
            compute_ns: Of all forwards and backwards; 0: it did not say.
            now: In seconds, never less than before.
        """
        planned_ns = self._planned_ns.get(device, 0)
        if planned_ns == 0 or compute_ns == 0:
            return False
        samples = self._samples[device]
        if samples and now - samples[-1].at_s < limits.DRIFT_SAMPLE_S:
            return False
        permille = min(AS_PLANNED * compute_ns // planned_ns, limits.PACE_PERMILLE_MAX)
        samples.append(_Sample(now, max(1, permille)))
        return device == self._device and self._asks(now)

    def paces(self) -> dict[DeviceId, int]:
        """Per mille of the planned time by device, lately, where enough steps were told."""
        known = {device: self._pace(device) for device in sorted(self._samples)}
        return {device: pace for device, pace in known.items() if pace is not None}

    def _pace(self, device: DeviceId, times: int = 1) -> int | None:
        """The median of the last DRIFT_FOR_S and STEPS_MIN steps at least, or of `times` both."""
        samples, steps = self._samples.get(device, deque()), times * STEPS_MIN
        if len(samples) < steps:
            return None
        since_s = min(samples[-1].at_s - times * limits.DRIFT_FOR_S, samples[-steps].at_s)
        return statistics.median_low(s.permille for s in samples if s.at_s >= since_s)

    def _asks(self, now: float) -> bool:
        if self._begun_at_s is None:
            self._begun_at_s = now
        too_early = now - self._begun_at_s < limits.DRIFT_FOR_S
        if too_early or now - self._asked_at_s < self._pause_s:
            return False
        medians = [self._pace(self._device, times) for times in (1, 2)]
        if not all(pace is not None and _is_off(pace) for pace in medians):
            return False
        is_calm = now - self._asked_at_s > 2 * limits.DRIFT_PAUSE_S_MAX
        longer_s = min(2 * self._pause_s, limits.DRIFT_PAUSE_S_MAX)
        self._pause_s = limits.DRIFT_PAUSE_S_MIN if is_calm else longer_s
        self._asked_at_s = now
        return True


def at_pace(profile: PeerProfile, permille: int) -> PeerProfile:
    """The profile of a peer that takes this much of the time it was planned with."""

    def scaled(time_ns: int) -> int:
        return min(-(-time_ns * permille // AS_PLANNED), limits.PART_NS_MAX)

    kinds = {
        name: KindCost(
            forward_ns=scaled(cost.forward_ns),
            backward_ns=scaled(cost.backward_ns),
            cotangents_ns=None if cost.cotangents_ns is None else scaled(cost.cotangents_ns),
            gradients_ns=scaled(cost.gradients_ns),
            norm_ns=scaled(cost.norm_ns),
            update_ns=scaled(cost.update_ns),
        )
        for name, cost in profile.kinds.items()
    }
    return dataclasses.replace(profile, kinds=kinds)


def _is_off(permille: int) -> bool:
    """Slower or faster by DRIFT_PERMILLE: what takes 5/6 of the time is 20 % faster."""
    line = AS_PLANNED + limits.DRIFT_PERMILLE
    return permille > line or permille * line < AS_PLANNED * AS_PLANNED
