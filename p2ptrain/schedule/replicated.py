"""Schedules of stages that run on several peers, and how long a step of theirs takes.

Every microbatch goes through one replica of each stage. A replica's actions are those of one
stage-wide list in which only its own microbatches are kept, so lists that cannot deadlock as a
whole cannot deadlock apart. With one replica everywhere they are the lists of `stage_actions`;
schedules with delayed gradients are known for that case only.

Source: warm-up by the number of workers from the stage on, after PipeDream (Narayanan et al. 2019,
section 3.2), here with uneven replicas.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from p2ptrain.errors import ConfigError
from p2ptrain.schedule.actions import (
    SCHEDULES,
    Action,
    delayed_microbatches,
    delays_gradients,
    is_eager,
    stage_actions,
)
from p2ptrain.schedule.simulator import Span

Owners = tuple[int, ...]
"""By microbatch: the index of the replica that runs it."""


_WHOLE: Final = 1 << 60
"""What a share's weight is a part of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """How tensors get from one replica to another one of the next stage, and cotangents back."""

    forward_lines: tuple[tuple[str, int], ...]
    """What an activation needs all at once, one tensor at a time, and for how many nanoseconds it
    takes each: a direction of a pair, an end's interface, or a shared medium."""
    backward_lines: tuple[tuple[str, int], ...]
    latency_ns: int


Passages = Mapping[tuple[int, int, int], Passage]
"""By boundary between stages, replica before it and replica after it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaTimes:
    """Time of one microbatch on one replica of a stage."""

    forward_ns: int
    backward_ns: int
    """In one piece."""
    cotangents_ns: int = 0
    """Its first part, where gradients are delayed."""
    gradients_ns: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicatedTimeline:
    """One simulated step, without what follows the last backward."""

    spans: tuple[tuple[tuple[Span, ...], ...], ...]
    """By stage and replica, in the order they run."""

    def stage_end_ns(self, stage: int) -> int:
        """When the last replica of a stage has done its last backward."""
        return max((own[-1].end_ns for own in self.spans[stage] if own), default=0)

    def begins_ns(self, stage: int, replica: int) -> int:
        """When a replica begins its first action; each has one."""
        return self.spans[stage][replica][0].start_ns

    @property
    def end_ns(self) -> int:
        return max(self.stage_end_ns(stage) for stage in range(len(self.spans)))


def shared_out(times_ns: Sequence[int], microbatches: int) -> Owners:
    """Give each microbatch to the replica that would be done with it first; ties to the first.

    For equal microbatches this makes the busiest replica as little busy as possible.
    """
    if len(times_ns) == 1:
        return (0,) * microbatches
    done_ns = [0] * len(times_ns)
    owners = []
    for _ in range(microbatches):
        own = min(range(len(times_ns)), key=lambda i: (done_ns[i] + times_ns[i], i))
        done_ns[own] += times_ns[own]
        owners.append(own)
    return tuple(owners)


def owners_by_weight(weights: Sequence[int], microbatches: int) -> Owners:
    """Give each microbatch to a replica, in proportion to their weights and well mixed.

    As many microbatches as the weights' sum give each replica exactly its weight.
    """
    return shared_out([_WHOLE // weight for weight in weights], microbatches)


def replicated_actions(
    schedule: str, owners: Sequence[Owners], replicas: Sequence[int]
) -> tuple[tuple[tuple[Action, ...], ...], ...]:
    """Actions by stage and replica.

    Args:
        schedule: Its name; with replicas, one without delayed gradients.
        owners: By stage; all of the same length.
        replicas: How many replicas each stage has.

    Raises:
        ConfigError: the schedule is unknown, or not one for replicas.
    """
    every = range(len(owners))
    if max(replicas) == 1:
        return tuple((stage_actions(schedule, s, len(owners), len(owners[0])),) for s in every)
    if schedule not in SCHEDULES or delays_gradients(schedule):
        raise ConfigError(
            f"{schedule!r:.40} is no schedule of replicated stages",
            hint="choose 1f1b, eager-1f1b or gpipe",
        )
    count = len(owners[0])
    most = [count for _ in every] if schedule == "gpipe" else _ahead(replicas)
    if is_eager(schedule):
        most = [ahead + sum(replicas[s + 1 :]) for s, ahead in enumerate(most)]
    return _kept_by_replicas(owners, replicas, most)


def replicated_evaluation(
    owners: Sequence[Owners], replicas: Sequence[int], *, microbatches: int
) -> tuple[tuple[tuple[Action, ...], ...], ...]:
    """Actions by stage and replica of an evaluation, in which B says that a buffer is free.

    As under 1F1B, and no further ahead than a step of so many `microbatches`.
    """
    most = [min(microbatches, ahead) for ahead in _ahead(replicas)]
    return _kept_by_replicas(owners, replicas, most)


def _ahead(replicas: Sequence[int]) -> list[int]:
    """Forwards of each stage before its first backward, beside the one that it follows: one for
    every replica from it on. After the last stage nobody has to be kept busy."""
    every = range(len(replicas) - 1)
    return [*(sum(replicas[stage:]) - 1 for stage in every), 0]


def _kept_by_replicas(
    owners: Sequence[Owners], replicas: Sequence[int], ahead_max: Sequence[int]
) -> tuple[tuple[tuple[Action, ...], ...], ...]:
    """Of every stage's list, with so many forwards ahead, what each of its replicas runs."""
    found = []
    for stage, own in enumerate(owners):
        whole = _stage_wide(stage, len(own), min(len(own), ahead_max[stage]))
        found.append(
            tuple(
                tuple(action for action in whole if own[action.microbatch] == replica)
                for replica in range(replicas[stage])
            )
        )
    return tuple(found)


def _stage_wide(stage: int, microbatches: int, ahead: int) -> list[Action]:
    """`ahead` forwards, then one backward after each forward, then the backwards that are left."""
    actions = [Action(stage=stage, kind="F", microbatch=m) for m in range(ahead)]
    for m in range(microbatches):
        if m + ahead < microbatches:
            actions.append(Action(stage=stage, kind="F", microbatch=m + ahead))
        actions.append(Action(stage=stage, kind="B", microbatch=m))
    return actions


def play(
    actions: Sequence[Sequence[Sequence[Action]]],
    owners: Sequence[Owners],
    times: Sequence[Sequence[ReplicaTimes]],
    passages: Passages,
    *,
    folded: bool = False,
) -> ReplicatedTimeline:
    """Simulate one step, event by event.

    A replica does one action at a time, in order. A tensor leaves when its action ends, and waits
    for its lines in the order in which tensors become ready. `folded`: the first and the last stage
    are one device, which does one action of either at a time; the stage that waited goes first.

    Raises:
        ConfigError: the action lists deadlock.
    """
    step = _Step(actions, owners, times, passages, folded=folded)
    step.run()
    return step.timeline()


class _Step:
    """The event heap of one step: ends of actions and arrivals of tensors, by time."""

    def __init__(
        self,
        actions: Sequence[Sequence[Sequence[Action]]],
        owners: Sequence[Owners],
        times: Sequence[Sequence[ReplicaTimes]],
        passages: Passages,
        *,
        folded: bool,
    ) -> None:
        self._folded = folded
        self._actions, self._owners = actions, owners
        self._times, self._passages = times, passages
        self._last = len(actions) - 1
        self._delayed = [[delayed_microbatches(listed) for listed in own] for own in actions]
        self._spans: list[list[list[Span]]] = [[[] for _ in own] for own in actions]
        self._busy: set[tuple[int, int]] = set()
        """Stage and replica of what computes; of two stages on one device the first."""
        self._here: set[tuple[int, str, int]] = set()
        self._line_free_ns: dict[str, int] = {}
        self._events: list[tuple[int, int, Action, bool]] = []
        self._count = 0

    def run(self) -> None:
        for stage, own in enumerate(self._actions):
            for replica in range(len(own)):
                self._start(stage, replica, 0)
        while self._events:
            now_ns, _, action, ended = heapq.heappop(self._events)
            stage = action.stage
            replica = self._owners[stage][action.microbatch]
            if ended:
                self._busy.discard(self._place(stage, replica))
                self._send(action, now_ns)
                if self._folded and stage in (0, self._last):
                    self._start(self._last - stage, replica, now_ns)
            else:
                self._here.add((stage, action.kind, action.microbatch))
            self._start(stage, replica, now_ns)

    def timeline(self) -> ReplicatedTimeline:
        for own, done in zip(self._actions, self._spans, strict=True):
            for listed, spans in zip(own, done, strict=True):
                if len(spans) < len(listed):
                    stuck = listed[len(spans)]
                    raise ConfigError(f"the schedule deadlocks: {stuck} waits for ever")
        return ReplicatedTimeline(spans=tuple(tuple(map(tuple, own)) for own in self._spans))

    def _start(self, stage: int, replica: int, now_ns: int) -> None:
        """Begin the replica's next action if it is free and its input is there."""
        listed, spans = self._actions[stage][replica], self._spans[stage][replica]
        if self._place(stage, replica) in self._busy or len(spans) == len(listed):
            return
        action = listed[len(spans)]
        edge = stage == (0 if action.kind == "F" else self._last) or action.kind == "W"
        if not edge and (stage, action.kind, action.microbatch) not in self._here:
            return
        end_ns = now_ns + self._duration_ns(action, replica)
        spans.append(Span(action=action, start_ns=now_ns, end_ns=end_ns))
        self._busy.add(self._place(stage, replica))
        self._push(end_ns, action, ended=True)

    def _place(self, stage: int, replica: int) -> tuple[int, int]:
        return (0 if self._folded and stage == self._last else stage, replica)

    def _duration_ns(self, action: Action, replica: int) -> int:
        own = self._times[action.stage][replica]
        if action.kind == "F":
            return own.forward_ns
        if action.kind == "W":
            return own.gradients_ns
        delayed = action.microbatch in self._delayed[action.stage][replica]
        return own.cotangents_ns if delayed else own.backward_ns

    def _send(self, action: Action, now_ns: int) -> None:
        forward = action.kind == "F"
        target = action.stage + (1 if forward else -1)
        if action.kind == "W" or not 0 <= target <= self._last:
            return
        boundary = min(action.stage, target)
        ends = (self._owners[boundary], self._owners[boundary + 1])
        before, after = (own[action.microbatch] for own in ends)
        passage = self._passages[boundary, before, after]
        lines = passage.forward_lines if forward else passage.backward_lines
        begins_ns = max(now_ns, *(self._line_free_ns.get(line, 0) for line, _ in lines))
        for line, busy_ns in lines:
            self._line_free_ns[line] = begins_ns + busy_ns
        sent_ns = begins_ns + max(busy_ns for _, busy_ns in lines)
        arriving = Action(stage=target, kind=action.kind, microbatch=action.microbatch)
        self._push(sent_ns + passage.latency_ns, arriving, ended=False)

    def _push(self, at_ns: int, action: Action, *, ended: bool) -> None:
        self._count += 1
        heapq.heappush(self._events, (at_ns, self._count, action, ended))
