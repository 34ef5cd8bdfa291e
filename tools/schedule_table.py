"""Bubble and ceiling of each schedule for pipelines of 2 to 8 stages: `--help` says how."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import click
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from p2ptrain.schedule.actions import SCHEDULES, all_actions, in_flight_max
from p2ptrain.schedule.simulator import PartsTime, ceiling, simulate

STAGES: Final = range(2, 9)
UNIT_NS: Final = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """One microbatch on one stage; all stages are equal."""

    forward_ns: int
    backward_ns: int
    transfer_ns: int

    @property
    def parts(self) -> PartsTime:
        """A backward in two equal parts."""
        half = self.backward_ns // 2
        return PartsTime(cotangents_ns=self.backward_ns - half, gradients_ns=half)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One schedule at one number of stages."""

    schedule: str
    stages: int
    microbatches: int
    bubble: float
    """Share of all stages' time in which they wait, 0 to 1, with the transfers."""
    speed_up: float
    """Over one peer, with the transfers."""
    ceiling: float
    """Over one peer, when transfers are free."""
    held: int
    """Microbatches whose stash the first stage holds at once."""


def rows(times: Times, microbatches: int, stages: Sequence[int] = STAGES) -> Iterator[Row]:
    """Simulate every schedule at every number of stages."""
    for count in stages:
        for schedule in SCHEDULES:
            actions = all_actions(schedule, count, microbatches)
            forward_ns, backward_ns = [times.forward_ns] * count, [times.backward_ns] * count
            parts = [times.parts] * count
            timeline = simulate(
                actions,
                forward_ns=forward_ns,
                backward_ns=backward_ns,
                transfer_ns=[times.transfer_ns] * (count - 1),
                parts=parts,
            )
            alone_ns = microbatches * count * (times.forward_ns + times.backward_ns)
            yield Row(
                schedule=schedule,
                stages=count,
                microbatches=microbatches,
                bubble=timeline.bubble_share,
                speed_up=alone_ns / timeline.step_ns,
                ceiling=ceiling(
                    actions, forward_ns=forward_ns, backward_ns=backward_ns, parts=parts
                ),
                held=in_flight_max(actions[0]),
            )


@click.command()
@click.option("--microbatches", type=click.IntRange(1, 4096), default=8, show_default=True)
@click.option(
    "--backward",
    type=click.FloatRange(0.1, 10.0),
    default=2.0,
    show_default=True,
    help="Time of a backward, in forwards.",
)
@click.option(
    "--transfer",
    type=click.FloatRange(0.0, 100.0),
    default=0.0,
    show_default=True,
    help="Time of a tensor between stages, in forwards.",
)
@click.option("--json", "as_json", is_flag=True, help="One object on stdout.")
def main(microbatches: int, backward: float, transfer: float, as_json: bool) -> None:
    """Show what the schedules of p2ptrain allow on equal stages, simulated, not measured."""
    times = Times(
        forward_ns=UNIT_NS,
        backward_ns=round(backward * UNIT_NS),
        transfer_ns=round(transfer * UNIT_NS),
    )
    found = list(rows(times, microbatches))
    if as_json:
        print(json.dumps({"version": 1, "rows": [asdict(row) for row in found]}))
        return
    sizes = f"backward {backward:g} and transfer {transfer:g} forwards"
    table = Table(
        title=f"{microbatches} microbatches, {sizes}",
        title_justify="left",
        box=None,
    )
    for heading in ("stages", "schedule", "bubble", "speed-up", "ceiling", "held by the first"):
        table.add_column(heading, justify="left" if heading == "schedule" else "right")
    for row in found:
        table.add_row(
            str(row.stages),
            row.schedule,
            f"{row.bubble:.1%}",
            f"{row.speed_up:.2f}",
            f"{row.ceiling:.2f}",
            str(row.held),
        )
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
