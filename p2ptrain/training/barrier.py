"""Bring every stage's gradients of a step together: the loss, the norm, one clip scale for all."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from p2ptrain.bundle.manifest import Manifest
from p2ptrain.errors import InvariantBroken, NumericsError, RemoteProtocolError
from p2ptrain.ids import DeviceId
from p2ptrain.planner.plan import Plan
from p2ptrain.training.clipping import clip_scale
from p2ptrain.training.messages import Done

STEPS_AHEAD_MAX = 2
"""A stage begins step S + 1 only with every `Done` of step S in hand, so it reports at most S + 1
to a member that still lacks some of step S; home takes steps in order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTotals:
    """What all stages together found in one step."""

    step: int
    loss: float
    gradient_norm: float
    clip_scale: float


def stage_tensor_indices(manifest: Manifest, segments: Iterable[int]) -> tuple[int, ...]:
    """Manifest positions of a stage's tensors, ascending."""
    position = {tensor.name: index for index, tensor in enumerate(manifest.tensors)}
    names = [t.name for segment in segments for t in manifest.segment_tensors(segment)]
    return tuple(sorted(position[name] for name in names))


class StepBarrier:
    """Collects `Done` of every stage's peers; one float64 square sum per tensor in manifest order.

    What several peers of a stage tell is added in the order of their ranks.
    """

    def __init__(
        self, *, plan: Plan, manifest: Manifest, clip_norm: float, first_step: int, last_step: int
    ) -> None:
        self._clip_norm = clip_norm
        self._taken, self._last = first_step, last_step
        self._indices: Mapping[DeviceId, tuple[int, ...]] = {
            device: stage_tensor_indices(manifest, plan.segments_of(device))
            for device in plan.devices
        }
        self._tellers = plan.stages[-1].devices
        self._tensor_count = len(manifest.tensors)
        self._waiting: dict[int, dict[DeviceId, Done]] = {}

    def add(self, device: DeviceId, done: Done) -> None:
        """Note one stage's result; a repeated one changes nothing.

        Where one stage's way to us is slow, the others, who need no more than a quorum, may be
        further on than is kept here: then the step's record comes from them (`skip_to`).

        Raises:
            RemoteProtocolError: from a peer without a stage, with a wrong number of sums, or of a
                step after the run's last.
        """
        indices = self._indices.get(device)
        if indices is None or len(done.square_sums) != 8 * len(indices):
            raise RemoteProtocolError(f"step {done.step}: square sums that do not fit the plan")
        if done.step > self._last:
            raise RemoteProtocolError(f"step {done.step} is done, but {self._last} is the last")
        if not self._taken < done.step <= self._taken + STEPS_AHEAD_MAX:
            return
        self._waiting.setdefault(done.step, {}).setdefault(device, done)

    def skip_to(self, step: int) -> None:
        """A step is committed, whether or not everything of it came here."""
        self._taken = max(self._taken, step)
        for old in [each for each in self._waiting if each <= step]:
            del self._waiting[old]

    def missing(self, step: int) -> tuple[DeviceId, ...]:
        """Stages whose `Done` of this step has not arrived."""
        have = self._waiting.get(step, {})
        return tuple(device for device in self._indices if device not in have)

    def take(self, step: int) -> StepTotals:
        """The totals of a complete step, which is then forgotten.

        Raises:
            NumericsError: a loss or gradient is not finite; the step must not be applied.
        """
        if self.missing(step):
            raise InvariantBroken(f"the totals of step {step} were taken too early")
        dones = self._waiting.pop(step)
        self._taken = step
        sums = np.zeros(self._tensor_count, dtype=np.float64)
        for device, indices in self._indices.items():
            sums[list(indices)] += np.frombuffer(dones[device].square_sums, dtype="<f8")
        told = [dones[device].loss for device in self._tellers]
        losses = [loss for loss in told if loss is not None]
        loss = math.nan if not losses else sum(losses[1:], losses[0])
        if any(done.skip for done in dones.values()) or not math.isfinite(loss):
            raise NumericsError(f"step {step}: the loss or a gradient is not finite")
        norm, scale = clip_scale(sums.tolist(), self._clip_norm)
        return StepTotals(step=step, loss=loss, gradient_norm=norm, clip_scale=scale)
