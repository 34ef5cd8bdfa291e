"""What each stage does, in which order: schedules as plain lists of actions.

A backward with a later W is only its first part, the cotangents that the stage before waits for;
W are the gradients of parameters. A backward without a W is whole.

The order of a stage's backwards, and of its W, is the order in which it accumulates gradients, so
it is part of the numerics contract (DESIGN section 10): always by microbatch.

Sources: GPipe after Huang et al. 2019; 1F1B after Narayanan et al. 2019 (PipeDream-flush); eager
1F1B after Zhuang et al. 2023, "On Optimizing the Communication of Model Parallelism", section 4;
ZB-H1 after Qi et al. 2024, "Zero Bubble Pipeline Parallelism", section 2.1, and here eager, too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from p2ptrain import limits
from p2ptrain.errors import ConfigError

Kind = Literal["F", "B", "W"]
SCHEDULES: Final = ("1f1b", "gpipe", "zb-h1", "eager-1f1b", "eager-zb-h1")
AUTO: Final = "auto"
"""In place of a schedule: the shortest step."""
AUTO_SCHEDULES: Final = ("1f1b", "zb-h1", "eager-1f1b", "eager-zb-h1")
"""What AUTO chooses from."""
_EAGER: Final = ("eager-1f1b", "eager-zb-h1")
_DELAYING: Final = {"zb-h1": "1f1b", "eager-zb-h1": "eager-1f1b"}
"""What has backwards in two parts, and what is the same without them."""

_TEXT: Final = re.compile(r"(\d{1,9})([FBW])(\d{1,9})\Z", re.ASCII)
_KINDS: Final[dict[str, Kind]] = {"F": "F", "B": "B", "W": "W"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Action:
    """One microbatch through one stage, forward (F), backward (B) or the delayed part of its
    backward (W); printed as `2F0`."""

    stage: int
    kind: Kind
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"


def parse_action(text: str) -> Action:
    """`2F0` -> stage 2, forward, microbatch 0; ValueError on anything else."""
    match = _TEXT.match(text)
    if match is None:
        raise ValueError(f"{text!r:.40} is not an action such as 2F0")
    return Action(stage=int(match[1]), kind=_KINDS[match[2]], microbatch=int(match[3]))


def one_f_one_b(
    stage: int, stages: int, microbatches: int, *, eager: bool = False
) -> tuple[Action, ...]:
    """One stage's actions under 1F1B: fill, then one backward after each forward, then drain.

    Args:
        stage: Its index.
        stages: Of the plan.
        microbatches: Of a step.
        eager: Twice as many forwards go ahead, so that a tensor has the time of one more microbatch
            to get to its neighbour. Where links take no time it gains nothing.

    Raises:
        ValueError: `stage` is not below `stages`, or a count is out of its bounds.
    """
    _check_counts(stage, stages, microbatches)
    return _alternating(stage, microbatches, ahead=_ahead(stage, stages, eager=eager))


def evaluation(stage: int, stages: int, microbatches: int, *, in_flight: int) -> tuple[Action, ...]:
    """One stage's actions when only losses are wanted: 1F1B, where a backward releases a buffer.

    Args:
        stage: Its index.
        stages: Of the plan.
        microbatches: Of the evaluation, which may be more than those of a step.
        in_flight: What the stage has room for when it trains.

    Raises:
        ValueError: `stage` is not below `stages`, or a count is out of its bounds.
    """
    _check_counts(stage, stages, microbatches)
    return _alternating(stage, microbatches, ahead=min(in_flight, stages - stage) - 1)


def _alternating(stage: int, microbatches: int, *, ahead: int) -> tuple[Action, ...]:
    """Forwards, then one backward after each forward, then what is left."""
    ahead = min(microbatches, ahead)
    actions = [_forward(stage, microbatch) for microbatch in range(ahead)]
    for microbatch in range(microbatches):
        if microbatch + ahead < microbatches:
            actions.append(_forward(stage, microbatch + ahead))
        actions.append(_backward(stage, microbatch))
    return tuple(actions)


def gpipe(stage: int, stages: int, microbatches: int) -> tuple[Action, ...]:
    """One stage's actions under GPipe: all forwards, then all backwards, both by microbatch.

    Raises:
        ValueError: `stage` is not below `stages`, or a count is out of its bounds.
    """
    _check_counts(stage, stages, microbatches)
    forwards = tuple(_forward(stage, microbatch) for microbatch in range(microbatches))
    return forwards + tuple(_backward(stage, microbatch) for microbatch in range(microbatches))


def zero_bubble(
    stage: int, stages: int, microbatches: int, *, eager: bool = False
) -> tuple[Action, ...]:
    """One stage's actions under ZB-H1: as 1F1B, with gradients computed where it would be idle.

    Cotangents leave as early as under 1F1B or earlier; the gradients of up to as many microbatches
    as the first stage holds under 1F1B wait for the end of the step, where 1F1B drains. So no
    stage holds more than that one. A backward whose gradients would follow it at once stays whole.

    Args:
        stage: Its index.
        stages: Of the plan.
        microbatches: Of a step.
        eager: As of `one_f_one_b`: what is said of 1F1B is then true of the eager one.

    Raises:
        ValueError: `stage` is not below `stages`, or a count is out of its bounds.
    """
    _check_counts(stage, stages, microbatches)
    most = min(microbatches, 1 + _ahead(0, stages, eager=eager))
    begun = min(microbatches, _ahead(stage, stages, eager=eager))
    actions = [_forward(stage, microbatch) for microbatch in range(begun)]
    delayed = 0  # gradients of the microbatches before this one are done
    for microbatch in range(microbatches):
        if begun < microbatches:
            for _ in range(begun - delayed - most + 1):
                actions.append(_gradients(stage, delayed))
                delayed += 1
            actions.append(_forward(stage, begun))
            begun += 1
        actions.append(_backward(stage, microbatch))
        if begun == microbatches:
            actions.append(_gradients(stage, delayed))
            delayed += 1
    actions += [_gradients(stage, microbatch) for microbatch in range(delayed, microbatches)]
    return _whole_where_possible(actions)


def _ahead(stage: int, stages: int, *, eager: bool) -> int:
    """Forwards before the first backward, beside the one that it follows."""
    return (2 if eager else 1) * (stages - 1 - stage)


def _whole_where_possible(actions: Sequence[Action]) -> tuple[Action, ...]:
    """Without each W that directly follows the backward that it is a part of."""
    before = (None, *actions[:-1])
    return tuple(
        action
        for action, last in zip(actions, before, strict=True)
        if action.kind != "W"
        or last is None
        or (last.kind, last.microbatch) != ("B", action.microbatch)
    )


def stage_actions(schedule: str, stage: int, stages: int, microbatches: int) -> tuple[Action, ...]:
    """One stage's actions under the schedule a plan names.

    Raises:
        ConfigError: the schedule is unknown; nothing was planned.
    """
    eager = is_eager(schedule)
    match schedule:
        case "1f1b" | "eager-1f1b":
            return one_f_one_b(stage, stages, microbatches, eager=eager)
        case "zb-h1" | "eager-zb-h1":
            return zero_bubble(stage, stages, microbatches, eager=eager)
        case "gpipe":
            return gpipe(stage, stages, microbatches)
    raise ConfigError(
        f"unknown schedule {schedule!r:.40}", hint=f"choose one of: {', '.join(SCHEDULES)}"
    )


def delays_gradients(schedule: str) -> bool:
    """Whether a schedule has backwards in two parts."""
    return schedule in _DELAYING


def undelayed(schedule: str) -> str:
    """The same with every backward whole."""
    return _DELAYING.get(schedule, schedule)


def choices(asked: str, *, delayable: bool) -> tuple[str, ...]:
    """What a plan may have, by the memory that it takes.

    Args:
        asked: Of `SCHEDULES`, or AUTO.
        delayable: Whether backwards can be run in two parts. If not, ZB-H1 does what 1F1B does and
            holds more for it, so 1F1B is meant.
    """
    meant = AUTO_SCHEDULES if asked == AUTO else (asked,)
    return meant if delayable else tuple(dict.fromkeys(map(undelayed, meant)))


def is_eager(schedule: str) -> bool:
    """Whether a schedule gives tensors the time of another microbatch to get to a neighbour."""
    return schedule in _EAGER


def all_actions(schedule: str, stages: int, microbatches: int) -> tuple[tuple[Action, ...], ...]:
    """The actions of every stage, by stage index."""
    return tuple(stage_actions(schedule, stage, stages, microbatches) for stage in range(stages))


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """How many microbatches a stage has room for."""

    in_flight: int
    """Between their forward and the end of their backward."""
    delayed: int
    """Of these, between their cotangents and their gradients."""
    early: int = 1
    """How many more than in flight the stage before may have sent."""

    @property
    def at_edges(self) -> int:
        """Places for what comes from a neighbour or goes there."""
        return self.in_flight + self.delayed + self.early

    def covers(self, other: Held) -> bool:
        """Whether there is room for as many as `other` has."""
        enough = self.in_flight >= other.in_flight and self.delayed >= other.delayed
        return enough and self.early >= other.early


ONE: Final = Held(in_flight=1, delayed=0)


def held(schedule: str, actions: Sequence[Action]) -> Held:
    """What one stage needs room for, of which these are the actions under that schedule."""
    early = 2 if is_eager(schedule) else 1
    return Held(in_flight=in_flight_max(actions), delayed=delayed_max(actions), early=early)


def in_flight_max(actions: Sequence[Action]) -> int:
    """The most microbatches whose stash one stage holds at once, from F to the end of B or W."""
    last = _last_actions(actions)
    held = most = 0
    for action in actions:
        if action.kind == "F":
            held += 1
        elif action in last:
            held -= 1
        most = max(most, held)
    return most


def delayed_microbatches(actions: Sequence[Action]) -> frozenset[int]:
    """The microbatches whose gradients are a W of their own."""
    return frozenset(action.microbatch for action in actions if action.kind == "W")


def delayed_max(actions: Sequence[Action]) -> int:
    """The most microbatches whose W is missing after their B, at once."""
    delayed = delayed_microbatches(actions)
    held = most = 0
    for action in actions:
        if action.kind == "W":
            held -= 1
        elif action.kind == "B" and action.microbatch in delayed:
            held += 1
        most = max(most, held)
    return most


def _last_actions(actions: Sequence[Action]) -> frozenset[Action]:
    """Of each microbatch: W, or B where that is whole."""
    delayed = delayed_microbatches(actions)
    return frozenset(
        action
        for action in actions
        if action.kind == "W" or (action.kind == "B" and action.microbatch not in delayed)
    )


def check(actions: Sequence[Sequence[Action]]) -> None:
    """Refuse action lists that cannot run to their end or would add gradients out of order.

    Raises:
        ConfigError: names the stage and the first action that is wrong or waits for ever; the
            caller keeps its previous schedule.
    """
    microbatches = sum(action.kind == "F" for action in actions[0]) if actions else 0
    for stage, own in enumerate(actions):
        problem = _stage_problem(stage, own, microbatches)
        if problem is not None:
            raise ConfigError(f"stage {stage}: {problem}", hint="choose another schedule")
    stuck = _first_stuck(actions)
    if stuck is not None:
        raise ConfigError(
            f"the schedule deadlocks: {stuck} waits for ever", hint="choose another schedule"
        )


def _stage_problem(stage: int, actions: Sequence[Action], microbatches: int) -> str | None:
    for action in actions:
        if action.stage != stage:
            return f"{action} belongs to another stage"
    forwards = [action.microbatch for action in actions if action.kind == "F"]
    backwards = [action.microbatch for action in actions if action.kind == "B"]
    if sorted(forwards) != list(range(microbatches)) or not forwards:
        return f"not each of {microbatches} microbatches goes forward once"
    if backwards != list(range(microbatches)):
        return "backwards are not in the order of their microbatches"
    last = _last_actions(actions)
    if [action.microbatch for action in actions if action in last] != backwards:
        return "gradients are not added in the order of their microbatches"
    return None


def _first_stuck(actions: Sequence[Sequence[Action]]) -> Action | None:
    """Run the lists as far as they go; the first action that waits for ever, if any."""
    done: set[tuple[int, Kind, int]] = set()
    position = [0] * len(actions)
    moved = True
    while moved:
        moved = False
        for stage, own in enumerate(actions):
            while position[stage] < len(own) and _ready(own[position[stage]], len(actions), done):
                action = own[position[stage]]
                done.add((stage, action.kind, action.microbatch))
                position[stage] += 1
                moved = True
    for own, reached in zip(actions, position, strict=True):
        if reached < len(own):
            return own[reached]
    return None


def _ready(action: Action, stages: int, done: set[tuple[int, Kind, int]]) -> bool:
    stage, microbatch = action.stage, action.microbatch
    if action.kind == "F":
        return stage == 0 or (stage - 1, "F", microbatch) in done
    if action.kind == "W":
        return (stage, "B", microbatch) in done
    if (stage, "F", microbatch) not in done:
        return False
    return stage == stages - 1 or (stage + 1, "B", microbatch) in done


def _forward(stage: int, microbatch: int) -> Action:
    return Action(stage=stage, kind="F", microbatch=microbatch)


def _backward(stage: int, microbatch: int) -> Action:
    return Action(stage=stage, kind="B", microbatch=microbatch)


def _gradients(stage: int, microbatch: int) -> Action:
    return Action(stage=stage, kind="W", microbatch=microbatch)


def _check_counts(stage: int, stages: int, microbatches: int) -> None:
    if not 1 <= stages <= limits.STAGES_MAX or not 0 <= stage < stages:
        raise ValueError(f"stage {stage} of {stages}")
    if not 1 <= microbatches <= limits.MICROBATCHES_MAX:
        raise ValueError(f"{microbatches} microbatches")
