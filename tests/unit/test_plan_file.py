"""Plans that a person asks for: priced as they are, or refused with the nearest that works."""

from __future__ import annotations

import dataclasses

import pytest

from p2ptrain.errors import ConfigError, P2PTrainError, PlanInfeasible
from p2ptrain.planner.explore import Candidate, Explorer
from p2ptrain.planner.plan_file import forced_candidate
from p2ptrain.planner.pricing import Pricing
from p2ptrain.planner.question import Objective, Question
from tests.planning_cases import device
from tests.planning_questions import equal_devices, question

A, B, C = (device(letter) for letter in "abc")


def _asked(memory_bytes: int = 1 << 40, slowness: tuple[int, ...] = (1, 1, 1)) -> Question:
    return question(
        equal_devices("abc", segment_count=6, memory_bytes=memory_bytes, slowness=slowness),
        segment_count=6,
    )


def _forced(text: str, asked: Question | None = None) -> Candidate:
    pricing = Pricing(asked or _asked())
    return forced_candidate(text, file="p.toml", explorer=Explorer(pricing), pricing=pricing)


def _stages(*stages: tuple[list[str], int], schedule: str = "1f1b") -> str:
    tables = [f"[[stage]]\ndevices = {names}\nsegments = {count}\n" for names, count in stages]
    return "\n".join([f'schedule = "{schedule}"', *tables])


def test_it_is_priced_as_asked() -> None:
    candidate = _forced(_stages(([B], 2), ([C, A], 4), schedule="gpipe"))
    assert (candidate.kind, candidate.schedule) == ("hybrid", "gpipe")
    assert candidate.devices == (1, 0, 2)
    assert candidate.cuts == (2, 6)


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("[[stage]", "is not TOML", "README"),
        ("", "has no stages", "[[stage]]"),
        (_stages(([A], 6), schedule="zz"), "unknown schedule 'zz'", "1f1b"),
        (_stages((["x"], 6)), "no device 'x'", "devices:"),
        (_stages(([A[:-1]], 6)), "no device", f"did you mean '{A}'?"),
        (_stages(([A], 3), ([A], 3)), "named twice", "one stage"),
        (_stages(([], 6)), "needs devices", "laptop"),
        (_stages(([A], 0), ([B], 6)), "stage 0 needs a number", "segments = 4"),
        (_stages(([A], 2), ([B], 3)), "have 5 segments, the model has 6", "have to take 4"),
        (_stages(([A], 7), ([B], 3)), "have 10 segments", "take some away"),
    ],
)
def test_what_matches_neither_model_nor_devices_is_refused(
    text: str, message: str, hint: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        _forced(text)
    assert message in refused.value.message
    assert hint in refused.value.hint


def test_what_does_not_fit_names_cuts_that_do() -> None:
    asked = _asked(memory_bytes=900)  # 4 segments with one microbatch in flight, 3 with two
    with pytest.raises(PlanInfeasible) as refused:
        _forced(_stages(([A], 5), ([B], 1)), asked)
    assert "stage 0 needs 1.5 KiB" in refused.value.message
    counts = [int(word) for word in refused.value.hint.replace(",", "").split() if word.isdigit()]
    assert sum(counts) == 6
    fitting = _stages(([A], counts[0]), ([B], counts[1]))
    assert _forced(fitting, asked).memory_bytes == tuple(
        n * 100 * (1 + held) for n, held in zip(counts, (2, 1), strict=True)
    )
    with pytest.raises(PlanInfeasible, match="stage 0 needs") as refused:
        _forced(_stages(([A], 6)), asked)
    assert "no cut of these stages fits" in refused.value.hint


def test_limits_hold_for_asked_plans_too() -> None:
    asked = dataclasses.replace(_asked(), objective=Objective(deadline_ns=1000))
    with pytest.raises(PlanInfeasible, match="breaks the deadline"):
        _forced(_stages(([A], 6)), asked)


def test_a_replica_without_a_microbatch_is_refused() -> None:
    with pytest.raises(P2PTrainError, match="gets no microbatch"):
        _forced(_stages(([A, B], 6)), _asked(slowness=(1, 100, 1)))
