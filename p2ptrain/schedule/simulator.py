"""How long a step takes: the runtime's own action lists on stages with known times.

A stage does one action at a time, in order. A boundary tensor leaves when its action ends,
travels while the sender computes on, and queues behind the tensor before it in that direction.
All times are integer nanoseconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from p2ptrain.errors import ConfigError, InvariantBroken
from p2ptrain.schedule.actions import Action, delayed_microbatches

_SPLIT: Final = "B before W"


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """When one action runs, nanoseconds since the step began."""

    action: Action
    start_ns: int
    end_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """One simulated step."""

    stages: tuple[tuple[Span, ...], ...]
    """Spans by stage index, in the order they run."""
    step_ns: int

    @property
    def compute_ns(self) -> tuple[int, ...]:
        """Busy time of each stage."""
        return tuple(sum(span.end_ns - span.start_ns for span in own) for own in self.stages)

    @property
    def bubble_share(self) -> float:
        """Share of all stages' time in which they do nothing, 0 to 1."""
        whole = self.step_ns * len(self.stages)
        return 1.0 - sum(self.compute_ns) / whole if whole else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PartsTime:
    """What a backward takes on one stage in its two parts."""

    cotangents_ns: int
    gradients_ns: int


def simulate(
    actions: Sequence[Sequence[Action]],
    *,
    forward_ns: Sequence[int],
    backward_ns: Sequence[int],
    transfer_ns: Sequence[int],
    parts: Sequence[PartsTime] | None = None,
) -> Timeline:
    """Play one step.

    Args:
        actions: By stage, as `all_actions` gives them.
        forward_ns: Time of one microbatch forward, by stage.
        backward_ns: The same backward, in one piece.
        transfer_ns: Time of one tensor over each boundary, either direction; one fewer.
        parts: Of backwards whose gradients are delayed, by stage; None: such a backward still does
            all, and W nothing, as without the graphs for it.

    Raises:
        ConfigError: the action lists deadlock; run `check` first.
        ValueError: the lengths do not agree or a time is negative.
    """
    if parts is None:
        parts = [PartsTime(cotangents_ns=whole, gradients_ns=0) for whole in backward_ns]
    cotangents_ns = [part.cotangents_ns for part in parts]
    gradients_ns = [part.gradients_ns for part in parts]
    _check_lengths(
        len(actions), transfer_ns, (forward_ns, backward_ns, cotangents_ns, gradients_ns)
    )
    durations = {"F": forward_ns, "B": backward_ns, _SPLIT: cotangents_ns, "W": gradients_ns}
    play = _Play(actions, durations, transfer_ns)
    while play.advance():
        pass
    return play.timeline()


def ceiling(
    actions: Sequence[Sequence[Action]],
    *,
    forward_ns: Sequence[int],
    backward_ns: Sequence[int],
    parts: Sequence[PartsTime] | None = None,
) -> float:
    """The speed-up over one peer that this stage balance allows when transfers are free; one peer
    runs every backward whole."""
    timeline = simulate(
        actions,
        forward_ns=forward_ns,
        backward_ns=backward_ns,
        transfer_ns=[0] * (len(actions) - 1),
        parts=parts,
    )
    microbatches = sum(action.kind == "F" for action in actions[0])
    alone_ns = microbatches * (sum(forward_ns) + sum(backward_ns))
    return alone_ns / timeline.step_ns if timeline.step_ns else 1.0


class _Play:
    """One step being played; each stage runs until it has to wait for a neighbour."""

    def __init__(
        self,
        actions: Sequence[Sequence[Action]],
        duration_ns: Mapping[str, Sequence[int]],
        transfer_ns: Sequence[int],
    ) -> None:
        self._actions = actions
        self._duration_ns = duration_ns
        self._delayed = [delayed_microbatches(own) for own in actions]
        self._transfer_ns = transfer_ns
        self._spans: list[list[Span]] = [[] for _ in actions]
        self._free_at_ns = [0] * len(actions)
        self._arrives_ns: dict[tuple[int, str, int], int] = {}
        self._line_free_ns: dict[tuple[int, str], int] = {}
        """By boundary and direction: when its last tensor has arrived."""

    def advance(self) -> bool:
        """Let every stage run as far as it can; whether anything happened."""
        before = sum(len(own) for own in self._spans)
        for stage, own in enumerate(self._actions):
            for action in own[len(self._spans[stage]) :]:
                inputs_ns = self._inputs_ns(action)
                if inputs_ns is None:
                    break
                self._run(action, max(inputs_ns, self._free_at_ns[stage]))
        return sum(len(own) for own in self._spans) > before

    def timeline(self) -> Timeline:
        for own, spans in zip(self._actions, self._spans, strict=True):
            if len(spans) < len(own):
                raise ConfigError(f"the schedule deadlocks: {own[len(spans)]} waits for ever")
        step_ns = max(self._free_at_ns)
        return Timeline(stages=tuple(tuple(own) for own in self._spans), step_ns=step_ns)

    def _inputs_ns(self, action: Action) -> int | None:
        """When the action's input from its neighbour is there; None when not yet known."""
        if action.kind == "W":
            return 0  # the stage's own B comes before it in the list
        source = action.stage - 1 if action.kind == "F" else action.stage + 1
        if not 0 <= source < len(self._actions):
            return 0
        return self._arrives_ns.get((action.stage, action.kind, action.microbatch))

    def _run(self, action: Action, start_ns: int) -> None:
        stage = action.stage
        split = action.kind == "B" and action.microbatch in self._delayed[stage]
        end_ns = start_ns + self._duration_ns[_SPLIT if split else action.kind][stage]
        self._spans[stage].append(Span(action=action, start_ns=start_ns, end_ns=end_ns))
        self._free_at_ns[stage] = end_ns
        target = stage + 1 if action.kind == "F" else stage - 1
        if action.kind != "W" and 0 <= target < len(self._actions):
            line = (min(stage, target), action.kind)
            leaves_ns = max(end_ns, self._line_free_ns.get(line, 0))
            arrives_ns = leaves_ns + self._transfer_ns[line[0]]
            self._line_free_ns[line] = arrives_ns
            self._arrives_ns[(target, action.kind, action.microbatch)] = arrives_ns


def _check_lengths(
    stages: int, transfer_ns: Sequence[int], computing: Sequence[Sequence[int]]
) -> None:
    if stages < 1:
        raise InvariantBroken("a step has at least one stage")
    lengths = [len(own) for own in computing]
    if set(lengths) != {stages} or len(transfer_ns) != stages - 1:
        raise ValueError(f"{stages} stages but times for {[*lengths, len(transfer_ns)]}")
    if any(value < 0 for own in (transfer_ns, *computing) for value in own):
        raise ValueError("a time is not negative")
