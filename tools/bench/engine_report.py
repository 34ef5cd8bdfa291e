"""What the engine's benchmark shows: seconds, ratios to torch, memory, agreement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from tools.bench.ratios import LOSS_TOLERANCE, Spread, Turn, loss_difference, ratios, spread

BASE: Final = "torch eager"
OURS: Final = "p2ptrain"
TARGETS: Final = {
    ("gpt", 1): 1.7,
    ("bert", 1): 1.75,
    ("mobilenet", 1): 1.2,
    ("gpt", 2): 1.4,
    ("bert", 2): 1.4,
}
"""How many times faster than torch eager with as many threads, by workload and threads."""
MEMORY_MAX: Final = 0.7
"""Of eager torch's peak."""


@dataclass(slots=True, kw_only=True)
class Reading:
    """What one contender did in one case."""

    turns: list[Turn] = field(default_factory=list)
    peak_bytes: int | None = None


@dataclass(slots=True, kw_only=True)
class Case:
    """One workload with one number of threads."""

    workload: str
    threads: int
    rounds: int
    warm_up: int
    readings: dict[str, Reading]

    def seconds(self, name: str) -> list[float]:
        """Seconds per step, one median per round."""
        return [turn.median_s(dropped=self.warm_up) for turn in self.readings[name].turns]

    def speed(self, name: str) -> Spread:
        """How many times faster than eager torch, round by round."""
        return ratios(self.seconds(BASE), self.seconds(name))

    def memory(self, name: str) -> float | None:
        """Peak memory as a share of eager torch's."""
        mine, base = self.readings[name].peak_bytes, self.readings[BASE].peak_bytes
        return mine / base if mine is not None and base else None

    @property
    def target(self) -> float | None:
        return TARGETS.get((self.workload, self.threads))

    @property
    def difference(self) -> float:
        """The largest difference between our losses and eager torch's, first step only for
        models whose statistics run away from any other computation."""
        first = [Turn(seconds=(), losses=t.losses[:1]) for t in self.readings[OURS].turns]
        base = [Turn(seconds=(), losses=t.losses[:1]) for t in self.readings[BASE].turns]
        return loss_difference(first, base)

    @property
    def agrees(self) -> bool:
        return self.difference <= LOSS_TOLERANCE


def print_cases(console: Console, cases: Sequence[Case]) -> None:
    """One table per case."""
    for case in cases:
        title = f"{case.workload}, {case.threads} thread(s)"
        table = Table("contender", "s per step", "x torch eager", "wanted", "peak MiB", title=title)
        for row in _rows(case):
            table.add_row(*row)
        console.print(table)
        console.print(f"first losses differ by {case.difference:.1e}")


def to_json(case: Case) -> dict[str, Any]:  # Any: JSON
    """One case with every reading."""
    return {
        "workload": case.workload,
        "threads": case.threads,
        "target": case.target,
        "loss_difference": case.difference,
        "contenders": {
            name: {
                "seconds_per_step": case.seconds(name),
                "speed": case.speed(name).median,
                "memory": case.memory(name),
                "peak_bytes": reading.peak_bytes,
            }
            for name, reading in case.readings.items()
        },
    }


def markdown(heading: Mapping[str, Any], cases: Sequence[Case]) -> str:  # Any: JSON
    """An entry for BENCHMARKS.md."""
    hardware = heading["machine"]
    lines = [
        f"## Whole steps on one device, {heading['date']}",
        "",
        f"{hardware['processor']}, {hardware['cores']} cores, {hardware['system']}. "
        f"`{heading['command']}`",
    ]
    for case in cases:
        lines += [
            "",
            f"{case.workload}, {case.threads} thread(s), {case.rounds} rounds; first losses differ"
            f" by {case.difference:.1e}.",
            "",
            "| contender | s per step, median (least to greatest) | x torch eager | wanted |"
            " peak memory, MiB (share of torch's) |",
            "| --- | --- | --- | --- | --- |",
        ]
        lines += [f"| {' | '.join(row)} |" for row in _rows(case)]
    return "\n".join(lines) + "\n"


def _rows(case: Case) -> list[tuple[str, ...]]:
    rows = []
    for name, reading in case.readings.items():
        speed, memory = case.speed(name), case.memory(name)
        wanted = ""
        if name.startswith(OURS) and case.target is not None:
            met = "met" if speed.median >= case.target else "MISSED"
            wanted = f"{case.target} {met}"
        peak = "" if reading.peak_bytes is None else f"{reading.peak_bytes / 2**20:.0f}"
        share = "" if memory is None else f" ({memory:.2f})"
        rows.append((name, _shown(spread(case.seconds(name)), 3), _shown(speed, 2), wanted,
                     peak + share))  # fmt: skip
    return rows


def _shown(figure: Spread, digits: int) -> str:
    return f"{figure.median:.{digits}f} ({figure.least:.{digits}f} to {figure.greatest:.{digits}f})"
