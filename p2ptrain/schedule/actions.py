"""What each stage does, in which order: schedules as plain lists of actions.

The order of a stage's backwards is the order in which it accumulates gradients, so it is part of
the numerics contract (DESIGN section 10): always by microbatch.

Sources: GPipe after Huang et al. 2019; 1F1B after Narayanan et al. 2019 (PipeDream-flush).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from p2ptrain import limits
from p2ptrain.errors import ConfigError

Kind = Literal["F", "B"]
SCHEDULES: Final = ("1f1b", "gpipe")

_TEXT: Final = re.compile(r"(\d{1,9})([FB])(\d{1,9})\Z", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Action:
    """One microbatch through one stage, forward (F) or backward (B); printed as `2F0`."""

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
    kind: Kind = "F" if match[2] == "F" else "B"
    return Action(stage=int(match[1]), kind=kind, microbatch=int(match[3]))


def one_f_one_b(stage: int, stages: int, microbatches: int) -> tuple[Action, ...]:
    """One stage's actions under 1F1B: fill, then one backward after each forward, then drain.

    Raises:
        ValueError: `stage` is not below `stages`, or a count is out of its bounds.
    """
    _check_counts(stage, stages, microbatches)
    ahead = min(microbatches, stages - 1 - stage)
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


def stage_actions(schedule: str, stage: int, stages: int, microbatches: int) -> tuple[Action, ...]:
    """One stage's actions under the schedule a plan names.

    Raises:
        ConfigError: the schedule is unknown; nothing was planned.
    """
    if schedule == "1f1b":
        return one_f_one_b(stage, stages, microbatches)
    if schedule == "gpipe":
        return gpipe(stage, stages, microbatches)
    raise ConfigError(
        f"unknown schedule {schedule!r:.40}", hint=f"choose one of: {', '.join(SCHEDULES)}"
    )


def all_actions(schedule: str, stages: int, microbatches: int) -> tuple[tuple[Action, ...], ...]:
    """The actions of every stage, by stage index."""
    return tuple(stage_actions(schedule, stage, stages, microbatches) for stage in range(stages))


def in_flight_max(actions: Sequence[Action]) -> int:
    """The most microbatches whose stash one stage holds at once."""
    held = most = 0
    for action in actions:
        held += 1 if action.kind == "F" else -1
        most = max(most, held)
    return most


def check(actions: Sequence[Sequence[Action]]) -> None:
    """Refuse action lists that cannot run to their end or would add gradients out of order.

    Raises:
        ConfigError: names the stage and the first action that is wrong or waits for ever; the
            caller keeps its previous schedule.
    """
    microbatches = len(actions[0]) // 2 if actions else 0
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
    if (stage, "F", microbatch) not in done:
        return False
    return stage == stages - 1 or (stage + 1, "B", microbatch) in done


def _forward(stage: int, microbatch: int) -> Action:
    return Action(stage=stage, kind="F", microbatch=microbatch)


def _backward(stage: int, microbatch: int) -> Action:
    return Action(stage=stage, kind="B", microbatch=microbatch)


def _check_counts(stage: int, stages: int, microbatches: int) -> None:
    if not 1 <= stages <= limits.STAGES_MAX or not 0 <= stage < stages:
        raise ValueError(f"stage {stage} of {stages}")
    if not 1 <= microbatches <= limits.MICROBATCHES_MAX:
        raise ValueError(f"{microbatches} microbatches")
