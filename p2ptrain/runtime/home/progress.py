"""What the home peer sees of a run: totals per step, usage per peer, the reports made of them."""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from pathlib import Path
from typing import Final

from p2ptrain.errors import InvariantBroken, NumericsError
from p2ptrain.ids import DeviceId
from p2ptrain.planner.plan import Plan
from p2ptrain.runtime.home.feeder import ITEMS_AHEAD_MAX
from p2ptrain.runtime.planning.job import Job
from p2ptrain.runtime.reporting.energy_report import energy_report
from p2ptrain.runtime.reporting.plan_report import owner_reports, predicted_boundary_bytes
from p2ptrain.runtime.reports import (
    EnergyReport,
    EvaluationReport,
    PredictionReport,
    StepReport,
    TrafficReport,
    TrainResult,
)
from p2ptrain.runtime.services import Emit, Services
from p2ptrain.training.contract import Contract
from p2ptrain.training.learning_rate import learning_rate
from p2ptrain.training.messages import Evaluated, Usage
from p2ptrain.training.step_record import StepRecord
from p2ptrain.units import NS_PER_S, UJ_PER_J

BOUNDARY_KINDS: Final = ("activation", "cotangent")
TIMED_STEPS_MAX: Final = 100


class ProgressTracker:
    """Follows one session; counts complete items so that the feeder knows how far to go."""

    def __init__(
        self,
        *,
        job: Job,
        plan: Plan,
        contract: Contract,
        services: Services,
        emit: Emit,
        first_step: int | None = None,
    ) -> None:
        """`first_step`: where what this device knows of the session begins; None: at its start."""
        self._first_step = job.first_step if first_step is None else first_step
        self._job, self._plan, self._contract = job, plan, contract
        self._services, self._emit = services, emit
        self._usage: dict[DeviceId, Usage] = {}
        self._losses: dict[int, float] = {}
        """By step. What this device never heard of is missing."""
        self._heldout: dict[int, float] = {}
        self._step_began_s: float | None = None
        self._training_s = 0.0
        self._views = 0
        self._evaluated: dict[int, dict[DeviceId, float]] = {}
        """By step, of those that not all peers of the last stage have told; the newest few."""
        self._view_steps_s: deque[float] = deque(maxlen=TIMED_STEPS_MAX)
        self.completed_items = 0
        self.evaluated_at: int | None = None

    def begin_view(self, plan: Plan) -> None:
        """Another view begins: nothing of it is complete yet."""
        self._plan = plan
        self._views += 1
        self._view_steps_s.clear()
        self._evaluated.clear()
        self.completed_items, self.evaluated_at = 0, None

    def receive(self, device: DeviceId, message: Evaluated | Usage) -> None:
        """Take one report of a stage peer.

        Raises:
            NumericsError: the held-out loss is not finite; the session ends.
        """
        match message:
            case Evaluated() if device in self._plan.stages[-1].devices:
                self._evaluated.setdefault(message.step, {})[device] = message.loss
                self._add_up_evaluation(message.step)
            case Usage() if device == message.booking.device:
                self._usage[device] = message

    def _add_up_evaluation(self, step: int) -> None:
        """Complete one that all peers of the last stage have told of, in the order of ranks."""
        told, devices = self._evaluated[step], self._plan.stages[-1].devices
        if len(told) == len(devices):
            losses = [told[device] for device in devices]
            del self._evaluated[step]
            self._evaluation_complete(step, sum(losses[1:], losses[0]))
        while len(self._evaluated) > ITEMS_AHEAD_MAX:  # no more than that is fed ahead
            del self._evaluated[min(self._evaluated)]

    def _evaluation_complete(self, step: int, loss: float) -> None:
        if not math.isfinite(loss):
            raise NumericsError(f"the held-out loss after step {step} is not finite")
        again = step in self._heldout
        self.evaluated_at = step
        self._heldout[step] = loss
        self.completed_items += 1
        self._step_began_s = time.monotonic()
        if not again:
            report = EvaluationReport(step=step, heldout_loss=loss)
            self._emit("evaluation", report)

    def step_committed(self, record: StepRecord, *, live: bool = True) -> None:
        """A step can no longer be lost. `live`: it was made under this peer's eyes just now."""
        step = record.step
        now = time.monotonic()
        seconds = now - self._step_began_s if self._step_began_s is not None else 0.0
        self._step_began_s = now
        self._training_s += seconds
        if live and seconds > 0:
            self._view_steps_s.append(seconds)
        self.completed_items += live
        self._losses[step] = record.loss
        report = StepReport(
            step=step,
            steps=self._contract.steps,
            loss=record.loss,
            learning_rate=learning_rate(
                self._contract.optimizer, step=step, steps=self._contract.steps
            ),
            gradient_norm=record.gradient_norm,
            seconds=seconds,
            samples_per_s=self._contract.minibatch_size / seconds if seconds > 0 else 0.0,
            joules_per_sample=self._joules_per_sample(),
            activities={
                self._services.directory.name_of(device): usage.activity
                for device, usage in self._usage.items()
            },
        )
        self._job.directory.append_progress(
            {"step": step, "loss": record.loss, "gradient_norm": record.gradient_norm}
        )
        self._emit("step", report)

    def watch(self, emit: Emit) -> None:
        """Tell somebody else from now on."""
        self._emit = emit

    @property
    def losses(self) -> tuple[float, ...]:
        """Of the session's steps as far as this device has heard of them, by step."""
        return tuple(self._losses[step] for step in sorted(self._losses))

    def fall_back(self, step: int) -> None:
        """Steps after this one are given up: they are made again."""
        self._losses = {at: loss for at, loss in self._losses.items() if at <= step}
        self._heldout = {at: loss for at, loss in self._heldout.items() if at <= step}

    def energy(self) -> EnergyReport:
        """What the session has cost all stage peers so far."""
        step_uj, size = self._plan.step_uj, self._contract.minibatch_size
        return energy_report(
            [usage.booking for usage in self._usage.values()],
            samples=len(self._losses) * size,
            predicted_joules_per_sample=None if step_uj is None else step_uj / UJ_PER_J / size,
        )

    def _joules_per_sample(self) -> float | None:
        """None until every stage has booked a step."""
        if not set(self._plan.devices) <= set(self._usage):
            return None
        return self.energy().joules_per_sample

    def result(
        self, *, seconds: float, state_digest: str, model_path: Path | None, stopped: bool
    ) -> TrainResult:
        """The session's end; at least one evaluation has been made."""
        if not self._heldout:
            raise InvariantBroken("a session ended without an evaluation")
        energy = self.energy()
        samples = len(self._losses) * self._contract.minibatch_size
        rate = samples / self._training_s if self._training_s > 0 else 0.0
        return TrainResult(
            run=self._plan.run,
            bundle=self._job.bundle.manifest.name,
            peers=len(self._plan.members),
            stages=len(self._plan.stages),
            first_step=self._first_step,
            steps=self._first_step + len(self._losses),
            losses=self.losses,
            heldout_first=self._heldout[min(self._heldout)],
            heldout_last=self._heldout[max(self._heldout)],
            seconds=seconds,
            samples_per_s=rate,
            tokens_per_s=rate * self._job.bundle.manifest.data.context,
            bytes_sent=sum(usage.booking.amounts.bytes_sent for usage in self._usage.values()),
            traffic=self._traffic(),
            energy=energy,
            state_digest=state_digest,
            model_path=None if model_path is None else str(model_path),
            stopped=stopped,
            prediction=self.prediction(),
            owners=owner_reports(self._contract, self._services.directory.name_of),
        )

    def prediction(self) -> PredictionReport:
        """What the view's plan predicted, and what was measured since the view began."""
        plan, times = self._plan, self._view_steps_s
        return PredictionReport(
            predicted_step_s=plan.step_ns / NS_PER_S,
            measured_step_s=statistics.median(times) if times else None,
            predicted_boundary_bytes=predicted_boundary_bytes(
                plan, self._contract, self._job.bundle.manifest
            ),
            measured_boundary_bytes=self._boundary_bytes(),
            timed_steps=len(times),
            predicted_step_joules=None if plan.step_uj is None else plan.step_uj / UJ_PER_J,
            measured_step_joules=self._step_joules(),
        )

    def _step_joules(self) -> float | None:
        """A step's mean, where all steps had one plan."""
        stages = set(self._plan.devices)
        if self._views > 1 or not stages <= set(self._usage) or not self._losses:
            return None
        return self.energy().total_joules / len(self._losses)

    def _boundary_bytes(self) -> float | None:
        """A step's activations and cotangents at the sockets, where all steps had one plan."""
        if self._views > 1 or not set(self._plan.devices) <= set(self._usage):
            return None
        whole = 0.0
        for usage in self._usage.values():
            own = sum(each.bytes for each in usage.sent if each.kind in BOUNDARY_KINDS)
            whole += own / max(1, usage.step - self._first_step)
        return whole

    def _traffic(self) -> tuple[TrafficReport, ...]:
        return tuple(
            TrafficReport(sender=sender, receiver=each.to, kind=each.kind, bytes_sent=each.bytes)
            for sender, usage in sorted(self._usage.items())
            for each in usage.sent
        )
