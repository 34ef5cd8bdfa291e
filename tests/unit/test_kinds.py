"""Which kinds of plan a run may have, at its start and later."""

from __future__ import annotations

import pytest

from p2ptrain.errors import PlanInfeasible
from p2ptrain.planner import kinds
from p2ptrain.planner.kinds import (
    EXACT_KINDS,
    KINDS,
    Kind,
    kinds_at_start,
    kinds_compared,
    kinds_later,
    refuse_what_if,
)
from p2ptrain.training.contract import PARALLELISMS

RECOVERING: tuple[Kind, ...] = ("one device", "pipeline", "data", "hybrid")


def test_every_run_has_a_kind() -> None:
    for asked in PARALLELISMS:
        assert kinds_at_start(asked)
        assert set(kinds_at_start(asked)) <= set(kinds_later(asked))


@pytest.mark.parametrize(
    ("asked", "start", "later"),
    [
        ("pipeline", EXACT_KINDS, EXACT_KINDS),
        ("auto", RECOVERING, RECOVERING),
        ("data", ("data",), ("one device", "data")),
        ("tensor", ("tensor",), ("one device", "tensor")),
        ("hybrid", ("hybrid",), ("one device", "pipeline", "data", "hybrid")),
    ],
)
def test_what_is_asked_for_is_planned_and_less_after_a_loss(
    asked: str, start: tuple[Kind, ...], later: tuple[Kind, ...]
) -> None:
    assert kinds_at_start(asked) == start
    assert kinds_later(asked) == later


def test_others_are_compared_where_nobody_insists() -> None:
    assert kinds_compared("pipeline") == ("data", "hybrid", "tensor", "sequence")
    assert kinds_compared("auto") == ("tensor", "sequence")
    assert kinds_compared("tensor") == kinds_compared("data") == ()


def test_what_this_version_only_prices_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds, "RUNTIME_KINDS", EXACT_KINDS)
    refuse_what_if("pipeline")
    with pytest.raises(PlanInfeasible, match="of the kind tensor") as refused:
        refuse_what_if("tensor")
    assert "pipeline" in refused.value.hint
    monkeypatch.setattr(kinds, "RUNTIME_KINDS", KINDS)
    refuse_what_if("tensor")
