"""Compare predicted with measured peak memory, and depth with what it costs: `--help` says how."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import click
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from p2ptrain.errors import ConfigError, P2PTrainError
from p2ptrain.store.bundles import shipped_bundles
from p2ptrain.units import format_bytes
from tools.bench.processes import machine

ROOT: Final = Path(__file__).resolve().parents[1]
WITHIN: Final = 0.15
TIMEOUT_S: Final = 900


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One way to train; the numbers are chosen so that different parts dominate."""

    batch: int
    in_flight: int
    rematerialise: bool = False

    def __str__(self) -> str:
        kept = ", rematerialised" if self.rematerialise else ""
        return f"{self.batch} samples, {self.in_flight} in flight{kept}"

    def arguments(self) -> list[str]:
        given = ["--batch", str(self.batch), "--in-flight", str(self.in_flight)]
        return [*given, "--rematerialise"] if self.rematerialise else given


SETTINGS: Final = (
    Setting(batch=4, in_flight=2),
    Setting(batch=32, in_flight=4),
    Setting(batch=32, in_flight=4, rematerialise=True),
)
DEPTH_SETTING: Final = Setting(batch=4, in_flight=1)


@click.command()
@click.option("--bundle", "bundles", multiple=True, help="Name or folder. [default: all shipped]")
@click.option("--depth-bundle", default="gpt-nano", show_default=True, help="To be made deeper.")
@click.option(
    "--blocks",
    type=click.IntRange(min=1),
    multiple=True,
    default=(4, 8, 16, 24),
    show_default=True,
    help="Depths of it.",
)
@click.option(
    "--form",
    type=click.Choice(["portable", "training"]),
    default="portable",
    show_default=True,
    help="Of the graphs.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, not tables.")
def main(
    bundles: tuple[str, ...], depth_bundle: str, blocks: tuple[int, ...], form: str, as_json: bool
) -> None:
    """Train two steps of a whole model per line, each in a process of its own.

    The first table sets the planner's prediction against the peak of resident memory. The second
    repeats a model's blocks: what is compiled stays, since equal segments share their graphs. A
    prediction that misses by more than 15 % is printed as missed and exits with 1.
    """
    names = bundles or tuple(sorted(shipped_bundles()))
    peaks = [
        {"bundle": name, "setting": str(setting), **_run(name, setting, form)}
        for name in names
        for setting in SETTINGS
    ]
    depths = [
        {"blocks": count, **_run(depth_bundle, DEPTH_SETTING, form, blocks=count)}
        for count in blocks
    ]
    if as_json:
        print(json.dumps({"version": 1, "machine": machine(), "peaks": peaks, "depths": depths}))
    else:
        console = Console(width=160)
        console.print(_peak_table(peaks))
        console.print(_depth_table(depth_bundle, depths))
    if any(abs(_error(peak)) > WITHIN for peak in peaks):
        raise SystemExit(1)


def _run(
    bundle: str, setting: Setting, form: str, *, blocks: int | None = None
) -> dict[str, Any]:  # Any: JSON
    command = [sys.executable, "-m", "tools.bench.memory_worker", "--bundle", bundle]
    command += ["--form", form, *setting.arguments()]
    command += [] if blocks is None else ["--blocks", str(blocks)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S,
        env={**os.environ, "ORT_DISABLE_TELEMETRY": "1"},
    )  # fmt: skip
    if done.returncode != 0:
        raise ConfigError(f"{bundle}: {done.stderr.strip().splitlines()[-1]}")
    measured: dict[str, Any] = json.loads(done.stdout)  # Any: as above
    return measured


def _error(measured: dict[str, Any]) -> float:  # Any: as above
    error: float = measured["predicted_bytes"] / measured["peak_bytes"] - 1
    return error


def _peak_table(rows: list[dict[str, Any]]) -> Table:  # Any: as above
    parts = ("process", "sessions", "parameters", "frozen", "stash", "boundaries", "workspace")
    table = Table(title="Predicted against measured peak memory, in MiB")
    for heading in ("bundle", "setting", *parts, "predicted", "measured", "error"):
        left = heading in ("bundle", "setting")
        table.add_column(heading, justify="left" if left else "right", no_wrap=True)
    for row in rows:
        error = _error(row)
        table.add_row(
            row["bundle"],
            row["setting"],
            *(_mebibytes(row["predicted"][part]) for part in parts),
            _mebibytes(row["predicted_bytes"]),
            _mebibytes(row["peak_bytes"]),
            f"{error:+.1%}" + (" missed" if abs(error) > WITHIN else ""),
        )
    return table


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.0f}"


def _depth_table(bundle: str, rows: list[dict[str, Any]]) -> Table:  # Any: as above
    table = Table(title=f"{bundle} with more of its blocks")
    for heading in ("blocks", "segments", "graphs", "code and sessions", "start", "peak"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            str(row["blocks"]),
            str(row["segments"]),
            str(row["graphs"]),
            format_bytes(row["sessions_bytes"]),
            f"{row['compile_ns'] / 1e6:.0f} ms, with buffers {row['start_ns'] / 1e6:.0f} ms",
            format_bytes(row["peak_bytes"]),
        )
    return table


if __name__ == "__main__":
    try:
        main()
    except P2PTrainError as error:
        print(f"memory_table: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from error
