"""How long a disk takes to make a few bytes durable."""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path
from typing import Final

FILE: Final = "disk-speed"
TRIALS: Final = 5
RECORD: Final = b"." * 256


def fsync_s(folder: Path) -> float:
    """The median time to append a record to a file in this folder and to fsync it. Blocking.

    Raises:
        OSError: the disk refuses.
    """
    path = folder / FILE
    times = []
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        for _ in range(TRIALS):
            began_s = time.perf_counter()
            os.write(descriptor, RECORD)
            os.fsync(descriptor)
            times.append(time.perf_counter() - began_s)
    finally:
        os.close(descriptor)
        path.unlink(missing_ok=True)
    return statistics.median(times)
