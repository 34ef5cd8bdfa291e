"""Runs that begin with a plan somebody has written: carried out as it is, or refused with why."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from p2ptrain.errors import ConfigError, PlanInfeasible
from p2ptrain.runtime.reports import PlanReport
from tests.bundles import tiny_bundle
from tests.memory_group import float_bits, memory_group, request_for

BUNDLE = tiny_bundle()
SEGMENTS = len(BUNDLE.manifest.segments)


def _plan(*stages: tuple[list[str], int]) -> str:
    tables = [f"[[stage]]\ndevices = {names}\nsegments = {count}\n" for names, count in stages]
    return "\n".join(tables)


async def _train(path: Path, plan: str | None, members: int = 3) -> tuple[PlanReport, bytes]:
    async with memory_group(path, members) as group:
        with trio.fail_after(60):
            result = await group[0].train(request_for(path, BUNDLE, plan=plan))
        (report,) = group.reports("plan")
        assert isinstance(report, PlanReport)
        return report, float_bits(result.losses)


async def test_a_run_begins_with_the_plan_that_is_asked_for(tmp_path: Path) -> None:
    async with memory_group(tmp_path, 3) as group:
        names = [group[index].name for index in range(3)]
    text = _plan(([names[2]], 1), ([names[0]], SEGMENTS - 1))
    report, losses = await _train(tmp_path, text)
    assert [(s.name, len(s.segments)) for s in report.stages] == [
        (names[2], 1), (names[0], SEGMENTS - 1),
    ]  # fmt: skip
    assert "as asked" in report.reasons[0]
    _, planned = await _train(tmp_path, None)
    assert losses == planned, "placement does not change bits"


@pytest.mark.parametrize(
    ("stages", "error", "message"),
    [
        ([(["nobody"], SEGMENTS)], ConfigError, "there is no device 'nobody'"),
        ([(["0"], SEGMENTS + 1)], ConfigError, f"the model has {SEGMENTS}"),
        ([(["0"], SEGMENTS)], PlanInfeasible, "stage 0 needs"),
    ],
)
async def test_what_does_not_match_is_refused_before_anything_is_written(
    tmp_path: Path, stages: list[tuple[list[str], int]], error: type[Exception], message: str
) -> None:
    async with memory_group(tmp_path, 2) as group:
        named = [([group[0].name if n == "0" else n for n in own], c) for own, c in stages]
        group[0].memory_bytes = lambda: 1000
        with pytest.raises(error, match=message), trio.fail_after(60):
            await group[0].train(request_for(tmp_path, BUNDLE, plan=_plan(*named)))
        assert group[0].runs.current_run is None
        assert not list(group[0].runs_path.glob("*"))
