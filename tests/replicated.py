"""Layouts whose stages several peers share, as plan files, and comparisons with one peer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from p2ptrain.runtime.reports import TrainResult
from p2ptrain.store.tensors import read_tensors
from tests.memory_group import MemoryGroup, float_bits

TOLERANCE: Final = 1e-5
"""Relative: what replicas may differ from one peer (DESIGN section 10)."""
SMALL: Final = 1e-3
Layout = Sequence[tuple[Sequence[int], int, Sequence[int]]]
"""By stage: peers by rank, number of segments, weights."""


def plan_text(layout: Layout, schedule: str = "1f1b", name: str = "peer-{}") -> str:
    """The plan file of a layout, for peers that are called so."""
    lines = [f'schedule = "{schedule}"']
    for peers, segments, weights in layout:
        names = [name.format(peer) for peer in peers]
        lines += ["[[stage]]", f"devices = {names}", f"segments = {segments}"]
        lines += [f"weights = {list(weights)}"] if len(peers) > 1 else []
    return "\n".join(lines)


def peer_count(layout: Layout) -> int:
    return 1 + max(peer for peers, *_ in layout for peer in peers)


def parameters(path: Path) -> dict[str, np.ndarray]:
    """What a run that was asked for `safetensors` has trained."""
    return {name: np.array(array) for name, array in read_tensors(path).tensors.items()}


@dataclass(frozen=True)
class Run:
    """One run in memory, with what it trained and all that travelled."""

    result: TrainResult
    trained: dict[str, np.ndarray]
    group: MemoryGroup

    @property
    def bits(self) -> tuple[bytes, str, float]:
        return float_bits(self.result.losses), self.result.state_digest, self.result.heldout_last


def assert_near(found: TrainResult, wanted: TrainResult) -> None:
    """Every loss is that of the other run, but for the order of sums."""
    assert len(found.losses) == len(wanted.losses)
    np.testing.assert_allclose(found.losses, wanted.losses, rtol=TOLERANCE)
    np.testing.assert_allclose(found.heldout_last, wanted.heldout_last, rtol=TOLERANCE)


def deviation(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> float:
    """The largest difference of any tensor, relative to its largest value.

    No tensor counts as smaller than SMALL of the largest: the bias of attention's keys has no true
    gradient, so all of what is trained there is rounding (DESIGN section 10).
    """
    assert found.keys() == wanted.keys()
    largest = max(float(np.max(np.abs(array))) for array in wanted.values())
    return max(
        float(np.max(np.abs(found[name] - wanted[name])))
        / max(float(np.max(np.abs(wanted[name]))), SMALL * largest)
        for name in wanted
    )
