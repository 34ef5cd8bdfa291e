"""The answer to a what-if question, as people and programs read it; `--json` prints the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from p2ptrain.planner.explore import Candidate, Explorer, Found
from p2ptrain.planner.kinds import KINDS, RUNTIME_KINDS
from p2ptrain.planner.outsiders import nothing_with
from p2ptrain.planner.pricing import Pricing, spans
from p2ptrain.schedule.simulator import Span
from p2ptrain.units import (
    NS_PER_S,
    UJ_PER_J,
    format_bytes,
    format_joules,
    format_seconds,
)

ANSWER_VERSION: Final = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class PartReport:
    """One device's part in a candidate; times, bytes and joules of one step."""

    device: str
    stage: int
    segments: tuple[str, ...]
    """Names; all of them under tensor and sequence parallelism."""
    microbatches: int
    compute_s: float
    sent_bytes: int
    joules: float
    memory_bytes: int
    memory_room_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CandidateReport:
    """The best candidate of one kind."""

    kind: str
    runs: bool
    """Whether this version can run it; otherwise it is what-if."""
    schedule: str
    step_s: float
    samples_per_s: float
    joules: float
    """Of a step: every device that takes part, idle time included."""
    joules_per_sample: float
    marginal_joules_per_sample: float
    """Above idle."""
    sent_bytes: int
    """In a step, all devices together."""
    memory_bytes: int
    """Of the device that needs most."""
    busy_share: float
    """Compute of the busiest device in the step, 0 to 1; the rest is waiting and transfers."""
    parts: tuple[PartReport, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceOut:
    """A device that the winner does without."""

    device: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Everything that `p2ptrain plan` shows."""

    model: str
    objective: str
    steps: int
    minibatch: int
    winner: CandidateReport
    runnable: CandidateReport | None
    """The best that this version can run; None: it runs no plan that fits."""
    candidates: tuple[CandidateReport, ...]
    """The best of each kind, the winner first."""
    impossible: dict[str, str]
    """Kinds of which there is none, and why."""
    left_out: tuple[DeviceOut, ...]
    reasons: tuple[str, ...]
    total_s: float
    total_joules: float
    """Of all steps with the winner."""
    priced: int
    """Candidates that were simulated."""
    version: int = ANSWER_VERSION


class Answering:
    """Turns what a search found into an answer."""

    def __init__(self, pricing: Pricing, explorer: Explorer, found: Found) -> None:
        self._pricing, self._explorer, self._found = pricing, explorer, found
        self._contract = pricing.question.contract

    def answer(self, winner: Candidate, *, forced: bool = False) -> Answer:
        """The answer whose winner was found, or asked for."""
        price, steps = winner.price, self._contract.steps
        others = [self._found.by_kind[kind] for kind in KINDS if kind in self._found.by_kind]
        others.sort(key=lambda each: self._explorer.value(each.price))
        shown = [winner, *(each for each in others if each != winner)]
        runnable = next((each for each in shown if each.kind in RUNTIME_KINDS), None)
        return Answer(
            model=self._pricing.question.manifest.name,
            objective=self._objective(),
            steps=steps,
            minibatch=self._contract.minibatch_size,
            winner=self._report(winner),
            runnable=None if runnable is None else self._report(runnable),
            candidates=tuple(self._report(each) for each in shown),
            impossible={str(kind): why for kind, why in self._found.objections.items()},
            left_out=self._left_out(winner),
            reasons=tuple(self._reasons(winner, others, runnable, forced=forced)),
            total_s=price.step_ns * steps / NS_PER_S,
            total_joules=price.total_uj * steps / UJ_PER_J,
            priced=self._found.priced_count,
        )

    def rows(self, candidate: Candidate) -> list[tuple[str, Sequence[Span]]]:
        """The schedule of a candidate by device, for drawing; empty where it has none."""
        if candidate.arrangement is None:
            return []
        timeline = self._pricing.timeline(candidate.arrangement, candidate.cuts)
        return [
            (self._name(replica.device), own)
            for replicas, spans_ in zip(candidate.arrangement.stages, timeline.spans, strict=True)
            for replica, own in zip(replicas, spans_, strict=True)
        ]

    def _report(self, one: Candidate) -> CandidateReport:
        price, samples = one.price, self._contract.minibatch_size
        step_s = price.step_ns / NS_PER_S
        return CandidateReport(
            kind=one.kind,
            runs=one.kind in RUNTIME_KINDS,
            schedule=one.schedule if one.kind != "one device" else "",
            step_s=step_s,
            samples_per_s=samples / step_s if step_s else 0.0,
            joules=price.total_uj / UJ_PER_J,
            joules_per_sample=price.total_uj / UJ_PER_J / samples,
            marginal_joules_per_sample=price.marginal_uj / UJ_PER_J / samples,
            sent_bytes=price.sent_bytes,
            memory_bytes=max(one.memory_bytes),
            busy_share=_busy_share(one),
            parts=tuple(self._part(one, index) for index in range(len(price.shares))),
        )

    def _part(self, one: Candidate, index: int) -> PartReport:
        share = one.price.shares[index]
        names = tuple(segment.name for segment in self._pricing.question.manifest.segments)
        first, end = spans(one.cuts)[share.stage] if one.cuts else (0, len(names))
        return PartReport(
            device=self._name(share.device),
            stage=share.stage,
            segments=names[first:end],
            microbatches=share.microbatches,
            compute_s=share.compute_ns / NS_PER_S,
            sent_bytes=share.sent_bytes,
            joules=one.price.device_uj[index] / UJ_PER_J,
            memory_bytes=one.memory_bytes[index],
            memory_room_bytes=self._pricing.devices[share.device].profile.memory_bytes,
        )

    def _reasons(
        self, winner: Candidate, others: list[Candidate], runnable: Candidate | None, *,
        forced: bool,
    ) -> list[str]:  # fmt: skip
        taken = "as asked" if forced else f"for {self._objective()}"
        names = ", ".join(self._name(device) for device in winner.devices)
        sentences = [f"{_called(winner)} on {names}, {taken}: {self._cost(winner)}"]
        if self._pricing.question.private:
            sentences.append(self._private(winner))
        for other in others:
            if other.kind != winner.kind:
                sentences.append(f"{_called(other)}: {self._against(winner, other)}")
        if winner.kind not in RUNTIME_KINDS:
            runs = "no plan that fits" if runnable is None else self._cost(runnable)
            shape = "" if runnable is None else f"{_called(runnable)}, "
            sentences.append(
                f"the best that this version runs is {shape}{runs}; "
                f"{_article(winner.kind)} is what-if"
            )
        return sentences

    def _private(self, winner: Candidate) -> str:
        """What privacy asks of the plan."""
        home = self._pricing.question.home
        if winner.kind != "one device":
            return f"private: {home} has the first and the last stage, others see no data"
        why = self._found.objections.get("pipeline")
        return f"private: {home} trains alone{f', since {why}' if why else ''}"

    def _cost(self, one: Candidate) -> str:
        step = format_seconds(one.price.step_ns / NS_PER_S)
        joules = format_joules(
            one.price.total_uj / UJ_PER_J / max(1, self._contract.minibatch_size)
        )
        return f"{step} a step, {joules} a sample"

    def _against(self, winner: Candidate, other: Candidate) -> str:
        value = self._explorer.value
        ratio = value(other.price) / max(1, value(winner.price))
        what = "time" if self._pricing.question.objective.goal == "time" else "joules"
        share = _busy_share(other)
        sent = format_bytes(other.price.sent_bytes)
        return (
            f"{ratio:.2f} times the {what}; its busiest device computes {share:.0%} of the step, "
            f"{sent} are sent"
        )

    def _left_out(self, winner: Candidate) -> tuple[DeviceOut, ...]:
        found = []
        for index in range(len(self._pricing.devices)):
            if index not in winner.devices:
                with_it = self._found.with_device.get(index)
                if with_it is None:
                    reason = nothing_with(self._pricing, self._found, index)
                else:
                    reason = f"the best found with it, {_article(with_it.kind)}, takes "
                    reason += self._cost(with_it)
                found.append(DeviceOut(device=self._name(index), reason=reason))
        return tuple(found)

    def _objective(self) -> str:
        objective, parts = self._pricing.question.objective, []
        if objective.deadline_ns is not None:
            parts.append(f"within {format_seconds(objective.deadline_ns / NS_PER_S)}")
        if objective.joules_uj is not None:
            parts.append(f"within {format_joules(objective.joules_uj / UJ_PER_J)}")
        least = "least time" if objective.goal == "time" else "least energy"
        return " ".join([least, *parts])

    def _name(self, device: int) -> str:
        return str(self._pricing.devices[device].id)


def _busy_share(one: Candidate) -> float:
    busiest = max(share.compute_ns for share in one.price.shares)
    return min(1.0, busiest / max(1, one.price.step_ns))


def _called(one: Candidate) -> str:
    """Its kind, and the schedule where stages pass microbatches on."""
    passed_on = one.arrangement is not None and len(one.arrangement.groups) > 1
    return f"{_article(one.kind)}{f' under {one.schedule}' if passed_on else ''}"


def _article(kind: str) -> str:
    """A kind as the subject of a sentence."""
    if kind in ("data", "tensor", "sequence"):
        return f"{kind} parallelism"
    return kind if kind == "one device" else f"a {kind}"
