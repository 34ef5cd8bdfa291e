"""The order of a run's work as tables: what comes when, on every peer alike."""

from __future__ import annotations

import dataclasses

import pytest

from p2ptrain.errors import InvariantBroken
from p2ptrain.training.contract import Contract
from p2ptrain.training.program import Intervals, Item, Program
from tests.sim.plans import make_contract

NEVER = Intervals(checkpoint_every=0, replica_every=100)


def contract(*, steps: int = 4, evaluate_every: int = 0) -> Contract:
    return dataclasses.replace(
        make_contract(), steps=steps, evaluate_every=evaluate_every, heldout_microbatches=3
    )


def items(program: Program) -> str:
    """`E0 T1 C1` and so on, until the program ends."""
    names = []
    while (item := program.current) is not None:
        names.append(f"{item.kind[0].upper()}{item.step}")
        program.complete(item)
    return " ".join(names)


@pytest.mark.parametrize(
    ("steps", "first_step", "evaluate_every", "checkpoint_every", "expected"),
    [
        (3, 0, 0, 0, "E0 T1 T2 T3 E3 C3"),
        (1, 0, 1, 1, "E0 T1 E1 C1"),
        (4, 0, 2, 0, "E0 T1 T2 E2 T3 T4 E4 C4"),
        (4, 0, 0, 2, "E0 T1 T2 C2 T3 T4 E4 C4"),
        (3, 0, 1, 1, "E0 T1 E1 C1 T2 E2 C2 T3 E3 C3"),
        (4, 2, 0, 0, "E2 R2 T3 T4 E4 C4"),
        (4, 2, 2, 2, "E2 R2 T3 T4 E4 C4"),
        (4, 4, 2, 2, "E4"),
        (2, 5, 0, 0, "E5"),
    ],
)
def test_items_come_in_this_order(
    steps: int, first_step: int, evaluate_every: int, checkpoint_every: int, expected: str
) -> None:
    program = Program(
        contract(steps=steps, evaluate_every=evaluate_every),
        first_step=first_step,
        intervals=Intervals(checkpoint_every=checkpoint_every, replica_every=100),
    )
    assert items(program) == expected
    assert program.current is None
    assert program.step == max(steps, first_step)
    assert not program.stopped


@pytest.mark.parametrize(
    ("done", "stop_at", "expected"),
    [
        (0, 0, "E0 C0"),
        (1, 0, "C0"),
        (1, 1, "T1 E1 C1"),
        (2, 1, "E1 C1"),
        (2, 0, "E1 C1"),  # step 1 is made: it stays
        (3, 2, "E2 C2"),
        (2, 9, "T2 T3 T4 E4 C4"),
    ],
)
def test_stop_shortens_the_session_at_a_step_nobody_has_begun(
    done: int, stop_at: int, expected: str
) -> None:
    program = Program(contract(), first_step=0, intervals=NEVER)
    for _ in range(done):
        item = program.current
        assert item is not None
        program.complete(item)
    program.stop_after(stop_at)
    assert items(program) == expected
    assert program.stopped == (stop_at < 4)


def test_stop_can_only_come_earlier() -> None:
    program = Program(contract(steps=9), first_step=0, intervals=NEVER)
    program.stop_after(3)
    program.stop_after(7)
    assert items(program) == "E0 T1 T2 T3 E3 C3"


def test_microbatches_follow_the_kind() -> None:
    program = Program(contract(), first_step=0, intervals=NEVER)
    counts = [
        program.microbatches(Item(kind=k, step=1)) for k in ("train", "evaluate", "checkpoint")
    ]
    assert counts == [8, 3, 0]


def test_completing_another_item_is_a_bug() -> None:
    program = Program(contract(), first_step=0, intervals=NEVER)
    with pytest.raises(InvariantBroken, match="train step 1 completed while evaluate step 0"):
        program.complete(Item(kind="train", step=1))


def test_contract_without_heldout_microbatches_is_refused() -> None:
    with pytest.raises(ValueError, match="held-out microbatches"):
        dataclasses.replace(make_contract(), heldout_microbatches=0)
    with pytest.raises(ValueError, match="evaluations"):
        dataclasses.replace(make_contract(), evaluate_every=-1)


@pytest.mark.parametrize(
    ("resume_step", "expected"),
    [
        (0, "E0 R0 T1 T2 R2 T3 C3 T4 E4 C4"),  # the first evaluation may not have been made
        (1, "R1 T2 R2 T3 C3 T4 E4 C4"),
        (3, "C3 T4 E4 C4"),  # the checkpoint at once, for it may not have been stored
        (4, "E4 C4"),
    ],
)
def test_view_that_follows_another_replicates_first(resume_step: int, expected: str) -> None:
    program = Program(
        contract(),
        intervals=Intervals(checkpoint_every=3, replica_every=2),
        first_step=0,
        resume_step=resume_step,
    )
    assert items(program) == expected
