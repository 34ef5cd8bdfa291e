"""Faults at chosen moments of a run: the result has the bits of the undisturbed one.

`make exact` runs the full matrix; these cover every phase, role and fault at least once.
"""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import trio

from tests.e2e.exact_cases import (
    FAULTS,
    PHASES,
    ROLES,
    Case,
    Undisturbed,
    run_case,
    undisturbed_runs,
)

COVERING = (
    Case(peers=3, role="first", phase="forward", how="kill"),
    Case(peers=4, role="middle", phase="backward", how="kill"),
    Case(peers=3, role="last", phase="update", how="kill"),
    Case(peers=3, role="holder", phase="commit", how="kill"),
    Case(peers=4, role="last", phase="replicate", how="kill"),
    Case(peers=4, role="first", phase="replay", how="kill"),
    Case(peers=4, role="last", phase="replan", how="kill"),
    Case(peers=3, role="middle", phase="commit", how="stop"),
    Case(peers=3, role="middle", phase="forward", how="cut"),
    Case(peers=4, role="last", phase="backward", how="leave"),
    Case(peers=3, role="holder", phase="update", how="leave"),
    Case(peers=4, role="holder", phase="forward", how="cut"),
)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Undisturbed:
    """The jobs of these cases on one peer, without anything going wrong."""
    directory = tmp_path_factory.mktemp("undisturbed")
    return trio.run(functools.partial(undisturbed_runs, directory, text))


def test_cases_cover_every_phase_role_and_fault() -> None:
    assert {case.phase for case in COVERING} == set(PHASES)
    assert {case.role for case in COVERING} == set(ROLES)
    assert {case.how for case in COVERING} == set(FAULTS)


@pytest.mark.parametrize("case", COVERING, ids=str)
async def test_disturbed_run_has_the_bits_of_the_undisturbed(
    case: Case, tmp_path: Path, text: Path, undisturbed: Undisturbed
) -> None:
    outcome = await run_case(case, tmp_path, text, undisturbed)
    print(f"{case}: {outcome.seconds:.1f} s, {len(outcome.replayed)} steps replayed, "
          f"{outcome.state_bytes_moved} bytes of state moved")  # fmt: skip
