"""Print SI quantities for people. Everything is stored in seconds, bytes, joules, watts."""

from __future__ import annotations

from decimal import ROUND_CEILING, Decimal

NS_PER_S = 1_000_000_000
UJ_PER_J = 1_000_000
KIB = 1024
MIB = 1024 * 1024
GIB = 1024 * 1024 * 1024


def format_bytes(count: int) -> str:
    """`1536` -> `1.5 KiB`."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024 or unit == "GiB":
            return f"{int(size)} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError("unreachable")


def bytes_rounded_up(count: int) -> str:
    """As `format_bytes`, but never less, so that what is needed is told: `1537` -> `1.6 KiB`."""
    for unit, name in ((1, "B"), (KIB, "KiB"), (MIB, "MiB"), (GIB, "GiB")):
        if count < 1024 * unit or unit == GIB:
            tenths = -(-count * 10 // unit)
            return f"{count} B" if unit == 1 else f"{tenths / 10:.1f} {name}"
    raise AssertionError("unreachable")


def rounded_up(count: int, unit: int) -> str:
    """A positive number of units to three digits, never less, as people type it: (12_345, 1000)
    -> `12.4`; `unit` is a power of ten."""
    value = Decimal(count) / Decimal(unit)
    last = Decimal(1).scaleb(value.adjusted() - 2)
    return f"{value.quantize(last, rounding=ROUND_CEILING).normalize():f}"


def format_seconds(seconds: float) -> str:
    """`0.0123` -> `12.3 ms`, `75.0` -> `1 min 15 s`."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} us"
    if seconds < 1:
        return f"{seconds * 1e3:.1f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"


def format_span(seconds: float) -> str:
    """A long time in one unit: `90 s`, `75 min`, `30 h`, `12 days`."""
    for unit_s, below_s, unit in ((1, 120, "s"), (60, 7200, "min"), (3600, 172_800, "h")):
        if seconds < below_s:
            return f"{seconds / unit_s:.0f} {unit}"
    return f"{seconds / 86_400:.0f} days"


def format_joules(joules: float) -> str:
    """`0.0123` -> `12.3 mJ`, `4321` -> `4.32 kJ`."""
    for factor, unit in ((1e-3, "kJ"), (1.0, "J"), (1e3, "mJ")):
        scaled = joules * factor
        if abs(scaled) >= 1 or unit == "mJ":
            return f"{scaled:.3g} {unit}"
    raise AssertionError("unreachable")


def format_count(count: int) -> str:
    """`1234567` -> `1.23 M`."""
    for limit, unit in ((1_000_000_000, "G"), (1_000_000, "M"), (1_000, "k")):
        if count >= limit:
            return f"{count / limit:.3g} {unit}"
    return str(count)


def parse_bytes(text: str) -> int:
    """`512MiB`, `2 GiB`, `1000000` -> bytes; ValueError on anything else or below 1."""
    stripped = text.strip().lower()
    for suffix, factor in (("gib", GIB), ("mib", MIB), ("kib", KIB), ("gb", 10**9), ("mb", 10**6)):
        if stripped.endswith(suffix):
            count = int(float(stripped.removesuffix(suffix)) * factor)
            break
    else:
        count = int(stripped.removesuffix("b"))
    if count < 1:
        raise ValueError(f"{text!r} is not a size")
    return count
