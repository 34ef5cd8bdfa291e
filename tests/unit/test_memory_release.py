"""What a finished run held goes back to the machine."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from p2ptrain.runtime.compute.memory_release import release_memory

PIECES, PIECE_BYTES = 4096, 64 * 1024


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096


class Ring:
    """An object that only the collector can free."""

    def __init__(self) -> None:
        self.me = self
        self.pieces = [np.ones(PIECE_BYTES // 8) for _ in range(PIECES)]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_cycles_are_collected_and_the_heap_is_trimmed() -> None:
    release_memory()  # what earlier tests left behind would be used first
    before = resident_bytes()
    ring: Ring | None = Ring()
    held = resident_bytes() - before
    assert held > PIECES * PIECE_BYTES // 2
    del ring
    release_memory()
    assert resident_bytes() - before < held // 4
