"""A model without numbers: states, activations and gradients are hashes of what they depend on.

A segment's state after a step depends on its state before, on what came in from both sides, on the
gradients of tied copies and on the recorded clip scale. So whoever replays with a wrong replica,
log, record or data ends with another state than the reference, which the checker computes from the
committed records alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from p2ptrain.training.step_record import StepRecord

Value = bytes


def mix(*parts: object) -> Value:
    """One value of many; equal only if all parts are."""
    text = "|".join(part.hex() if isinstance(part, bytes) else str(part) for part in parts)
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def drawn(segment: int) -> Value:
    """A segment's state at step 0."""
    return mix("drawn", segment)


def fed(end: str, step: int) -> Value:
    """What a data holder feeds: inputs to the first segment, labels to the last."""
    return mix(end, step)


def forward(segment: int, state: Value, entering: Value) -> Value:
    return mix("activation", segment, state, entering)


def backward(segment: int, state: Value, entering: Value, returning: Value) -> Value:
    return mix("cotangent", segment, state, entering, returning)


def own_gradient(segment: int, state: Value, entering: Value, returning: Value) -> Value:
    return mix("gradient", segment, state, entering, returning)


def updated(segment: int, state: Value, gradient: Value, record: StepRecord) -> Value:
    return mix("state", segment, state, gradient, record.step, record.clip_scale)


def record_of(step: int, view: int, gradients: Mapping[int, Value]) -> StepRecord:
    """What all members make of the gradients.

    It depends on the view, as if every view computed within tolerance only: a step that is made
    twice then has two records, and the checkers can tell.
    """
    digest = mix("record", step, view, *(gradients[s] for s in sorted(gradients)))
    share = int.from_bytes(digest[:6], "little") / (1 << 48)
    return StepRecord(step=step, loss=4.0 + share, gradient_norm=2.0, clip_scale=share)


@dataclass(frozen=True, kw_only=True)
class Model:
    """How many segments, and which hold copies of one tensor."""

    count: int
    ties: tuple[tuple[int, ...], ...] = ()

    def tied_with(self, segment: int) -> tuple[int, ...]:
        """Other segments whose gradients are added to this one's."""
        found = {s for group in self.ties if segment in group for s in group} - {segment}
        return tuple(sorted(found))

    @property
    def tied(self) -> frozenset[int]:
        return frozenset(segment for group in self.ties for segment in group)


@dataclass(kw_only=True)
class Pass:
    """One step's forward and backward over consecutive segments: what left and what was found."""

    span: range
    entering: dict[int, Value] = field(default_factory=dict)
    gradients: dict[int, Value] = field(default_factory=dict)
    activation: Value = b""
    """Left after the last segment."""
    cotangent: Value = b""
    """Left before the first."""

    def run_forward(self, states: Mapping[int, Value], entering: Value) -> None:
        for segment in self.span:
            self.entering[segment] = entering
            entering = forward(segment, states[segment], entering)
        self.activation = entering

    def run_backward(self, states: Mapping[int, Value], returning: Value) -> None:
        for segment in reversed(self.span):
            entering, state = self.entering[segment], states[segment]
            self.gradients[segment] = own_gradient(segment, state, entering, returning)
            returning = backward(segment, state, entering, returning)
        self.cotangent = returning


def summed(model: Model, own: Mapping[int, Value], tied: Mapping[int, Value]) -> dict[int, Value]:
    """Gradients with those of tied copies added in segment order."""
    known = {**tied, **own}
    found = {}
    for segment in own:
        group = sorted({segment, *model.tied_with(segment)})
        found[segment] = own[segment] if len(group) == 1 else mix("sum", *(known[s] for s in group))
    return found


@dataclass(kw_only=True)
class Reference:
    """The states that the committed records lead to, from step 0 on."""

    model: Model
    records: dict[int, StepRecord] = field(default_factory=dict)
    states: dict[int, dict[int, Value]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.states[0] = {segment: drawn(segment) for segment in range(self.model.count)}

    @property
    def newest(self) -> int:
        return max(self.records, default=0)

    def commit(self, record: StepRecord) -> None:
        """The next step's record."""
        before = self.states[record.step - 1]
        whole = Pass(span=range(self.model.count))
        whole.run_forward(before, fed("inputs", record.step))
        whole.run_backward(before, fed("labels", record.step))
        gradients = summed(self.model, whole.gradients, {})
        self.records[record.step] = record
        self.states[record.step] = {
            s: updated(s, before[s], gradients[s], record) for s in range(self.model.count)
        }

    def go_back(self, step: int) -> None:
        """A forced lineage begins after `step`: later ones never happened."""
        for later in [each for each in self.records if each > step]:
            del self.records[later]
            del self.states[later]


ReadLog = Callable[[str, int, int], Value | None]
"""(kind, segment, step) -> what was logged."""


@dataclass(frozen=True, kw_only=True)
class ReplayInputs:
    """Where a replay reads what came in; None where nobody has it."""

    activation: Callable[[int], Value | None]
    cotangent: Callable[[int], Value | None]
    tied: Callable[[int, int], Value | None]
    """(segment, step)"""


@dataclass(frozen=True, kw_only=True)
class Sent:
    """What a replayed range sent in one step, to be logged again."""

    step: int
    activation: Value
    cotangent: Value
    gradients: dict[int, Value]


def replayed(
    model: Model, states: dict[int, Value], records: list[StepRecord], inputs: ReplayInputs
) -> tuple[dict[int, Value], list[Sent]] | None:
    """States after the records' steps; None: an input is missing."""
    span, sent = range(min(states), max(states) + 1), []
    for record in records:
        entering, returning = inputs.activation(record.step), inputs.cotangent(record.step)
        outside = {s for own in span for s in model.tied_with(own)} - set(span)
        tied = {s: inputs.tied(s, record.step) for s in outside}
        known = {s: value for s, value in tied.items() if value is not None}
        if entering is None or returning is None or len(known) < len(tied):
            return None
        step = Pass(span=span)
        step.run_forward(states, entering)
        step.run_backward(states, returning)
        gradients = summed(model, step.gradients, known)
        states = {s: updated(s, states[s], gradients[s], record) for s in span}
        sent.append(
            Sent(
                step=record.step, activation=step.activation, cotangent=step.cotangent,
                gradients=step.gradients,
            )
        )  # fmt: skip
    return states, sent
