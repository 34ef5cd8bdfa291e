"""Random disturbances for a while (tools/soak.py): the result is the undisturbed one."""

from __future__ import annotations

from pathlib import Path

from tools.soak import STEPS_PER_MINUTE, soak

STEPS = 2 * STEPS_PER_MINUTE


async def test_two_minutes_of_disturbances_change_no_bit(tmp_path: Path) -> None:
    said: list[str] = []
    counts = await soak(STEPS, 7, tmp_path, said.append)
    print("\n".join(said))
    assert sum(counts.values()) >= 2
