"""Which runtime is installed here, whether it is intact, and what kind of machine this is."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Final

TRAINING: Final = "onnxruntime-training"
STOCK: Final = "onnxruntime"
DISTRIBUTIONS: Final = {
    "onnxruntime-training-cpu": TRAINING,
    "onnxruntime-training": TRAINING,
    "onnxruntime": STOCK,
    "onnxruntime-gpu": STOCK,
    "onnxruntime-openvino": STOCK,
    "onnxruntime-directml": STOCK,
}
"""Distributions that own the package directory `onnxruntime/`, and the runtime each holds."""

_X86_CLASSES: Final = (("avx512f", "avx512"), ("avx2", "avx2"), ("avx", "avx"), ("sse2", "sse2"))
_ARM_CLASSES: Final = (("asimd", "neon"), ("neon", "neon"))
_MACHINES: Final = {"arm64": "aarch64", "amd64": "x86_64"}


def installed_distributions() -> dict[str, str]:
    """Version by name of every installed distribution that owns `onnxruntime/`."""
    found = {}
    for name in DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def installation_problem(
    installed: Mapping[str, str], *, imported_version: str, has_training: bool
) -> str | None:
    """Why the imported onnxruntime is not the one that was installed, or None when it is.

    Two distributions own one directory, and pip lets the second overwrite the first in silence;
    the mixture imports, and then computes with whichever files came last.
    """
    if len(installed) > 1:
        names = " and ".join(f"{name} {version}" for name, version in sorted(installed.items()))
        return f"{names} are both installed and have overwritten each other's files"
    for name, version in installed.items():
        if _release(version) != _release(imported_version):
            return f"{name} {version} has been overwritten by onnxruntime {imported_version}"
        if (DISTRIBUTIONS[name] == TRAINING) != has_training:
            return f"{name} {version} has been overwritten by another onnxruntime package"
    return None


def runtime_name(installed: Mapping[str, str], *, has_training: bool) -> str:
    """`onnxruntime-training` or `onnxruntime`, by what was installed, else by what it can do."""
    for name in installed:
        return DISTRIBUTIONS[name]
    return TRAINING if has_training else STOCK


def machine_name() -> str:
    """`x86_64`, `aarch64`, ...: one name for each processor family on every system."""
    machine = platform.machine().lower()
    return _MACHINES.get(machine, machine)


def instruction_set_class(machine: str, cpuinfo: str) -> str:
    """The class of vector instructions that decides which kernels run, hence the last bits.

    Args:
        machine: As `machine_name` gives it.
        cpuinfo: Text of /proc/cpuinfo; may be empty where there is none.

    Returns:
        avx512, avx2, avx, sse2, neon, or `unknown`; aarch64 always has neon.
    """
    flags: set[str] = set()
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        if key.strip().lower() in ("flags", "features"):
            flags = set(value.split())
            break
    classes = _ARM_CLASSES if machine.startswith(("aarch64", "arm")) else _X86_CLASSES
    for flag, name in classes:
        if flag in flags:
            return name
    return "neon" if machine == "aarch64" else "unknown"


def read_cpuinfo() -> str:
    """Text of /proc/cpuinfo, empty where the system has none."""
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _release(version: str) -> str:
    return version.partition("+")[0]
