"""What Linux tells of a process and of the machine: peak memory, processor, load."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Final

_PEAK: Final = re.compile(r"^VmHWM:\s+(\d+) kB$", re.MULTILINE)
_RESIDENT: Final = re.compile(r"^VmRSS:\s+(\d+) kB$", re.MULTILINE)
_MODEL: Final = re.compile(r"^model name\s*:\s*(.+)$", re.MULTILINE)
_MEMORY: Final = re.compile(r"^MemTotal:\s+(\d+) kB$", re.MULTILINE)


def peak_bytes(pid: int) -> int | None:
    """The most memory that a live process has had resident; None where it is not told."""
    return parse_peak_bytes(_read(Path(f"/proc/{pid}/status")))


def parse_peak_bytes(status: str) -> int | None:
    """The peak in the text of `/proc/PID/status`."""
    match = _PEAK.search(status)
    return None if match is None else int(match[1]) * 1024


def resident_bytes(pid: int) -> int | None:
    """What a live process has resident now; None where it is not told."""
    match = _RESIDENT.search(_read(Path(f"/proc/{pid}/status")))
    return None if match is None else int(match[1]) * 1024


def cpu_s(pid: int) -> float | None:
    """Processor seconds that a live process has used, all threads; None where it is not told."""
    return parse_cpu_s(_read(Path(f"/proc/{pid}/stat")), os.sysconf("SC_CLK_TCK"))


def parse_cpu_s(stat: str, ticks_per_s: int) -> float | None:
    """User and system time in the text of `/proc/PID/stat`; the process's name may hold spaces."""
    fields = stat.rpartition(")")[2].split()
    return None if len(fields) < 13 else (int(fields[11]) + int(fields[12])) / ticks_per_s


def machine() -> dict[str, object]:
    """Hardware and load, for the record."""
    model = _MODEL.search(_read(Path("/proc/cpuinfo")))
    memory = _MEMORY.search(_read(Path("/proc/meminfo")))
    return {
        "processor": model[1].strip() if model else platform.processor(),
        "cores": os.cpu_count(),
        "memory_bytes": int(memory[1]) * 1024 if memory else None,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "load_before": round(os.getloadavg()[0], 2),
    }


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
