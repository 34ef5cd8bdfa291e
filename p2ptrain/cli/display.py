"""Show a run while it goes on: a live panel on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Final, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from p2ptrain.cli.tables import (
    activity_lines,
    energy_table,
    plan_lines,
    plan_table,
    printable,
    result_table,
    step_line,
)
from p2ptrain.demo.baselines import Baselines
from p2ptrain.errors import P2PTrainError, RemoteProtocolError
from p2ptrain.runtime.reports import (
    EvaluationReport,
    NoteReport,
    PlanReport,
    StepReport,
    TrainResult,
)
from p2ptrain.wire.codec import from_plain

LINES_PER_RUN: Final = 20
PLAIN_WIDTH: Final = 140


class RunDisplay:
    """What a person sees of one run; a context manager, so that the terminal is left clean.

    Reports go to `out`, progress to stderr: redrawn in place when that is a terminal, otherwise
    about twenty lines for the whole run.
    """

    def __init__(self, *, as_json: bool) -> None:
        self._out = _console(stderr=as_json)
        self._progress = _console(stderr=True)
        self._live: Live | None = None
        self._bar = _progress_bar(self._progress)
        self._task = self._bar.add_task("training", total=None, start=False)
        self._showers: dict[str, Callable[[Any], None]] = {  # Any: one report class each
            "plan": lambda data: self.plan(from_plain(PlanReport, data)),
            "step": lambda data: self.step(from_plain(StepReport, data)),
            "evaluation": lambda data: self.evaluation(from_plain(EvaluationReport, data)),
            "note": lambda data: self.note(from_plain(NoteReport, data).text),
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_live()

    def event(self, name: str, data: dict[str, Any]) -> None:  # Any: JSON values
        """Show one event of the peer; one that a newer peer might send is passed over."""
        shower = self._showers.get(name)
        if shower is None:
            return
        try:
            shower(data)
        except RemoteProtocolError as error:
            raise P2PTrainError(
                f"the running peer sent a {name} event that cannot be read: {error.message}",
                hint="restart the peer after an update",
            ) from error

    def plan(self, plan: PlanReport) -> None:
        """The plan as a table, with one line of reason."""
        self._stop_live()
        self._out.print(plan_table(plan))
        for line in plan_lines(plan):
            self._out.print(printable(line), highlight=False, markup=False)

    def step(self, step: StepReport) -> None:
        """Progress after one step."""
        if self._progress.is_terminal:
            self._redraw(step)
        elif step.step in (1, step.steps) or step.step % max(1, step.steps // LINES_PER_RUN) == 0:
            self.note(step_line(step))

    def evaluation(self, evaluation: EvaluationReport) -> None:
        """A held-out loss."""
        self.note(f"held-out loss after step {evaluation.step}: {evaluation.heldout_loss:.4f} nats")

    def note(self, text: str) -> None:
        """One line on stderr."""
        self._progress.print(
            f"p2ptrain: {printable(text)}", highlight=False, markup=False, soft_wrap=True
        )

    def result(self, result: TrainResult) -> None:
        """The summary at the end."""
        self._stop_live()
        self._out.print()
        self._out.print(result_table(result))
        self._out.print()
        self._out.print(energy_table(result.energy))

    def _redraw(self, step: StepReport) -> None:
        if self._live is None:
            self._live = Live(console=self._progress, refresh_per_second=4, transient=True)
            self._live.start()
            self._bar.start_task(self._task)
        self._bar.update(self._task, total=step.steps, completed=step.step)
        lines = [step_line(step), *activity_lines(step)]
        panel: list[RenderableType] = [self._bar, *(Text(printable(line)) for line in lines)]
        self._live.update(Group(*panel))

    def _stop_live(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


class DemoDisplay(RunDisplay):
    """The display of `p2ptrain demo`: a run, the counting baselines, and a few written lines."""

    def baselines(self, counted: Baselines, result: TrainResult) -> None:
        """The held-out losses of counting beside the model's own."""
        table = Table(title="held-out loss, nats per byte", title_justify="left", box=None)
        table.add_column("")
        table.add_column("loss", justify="right")
        table.add_row("before training", f"{result.heldout_first:.4f}")
        table.add_row("counting bytes (unigram)", f"{counted.unigram:.4f}")
        table.add_row("counting pairs (bigram)", f"{counted.bigram:.4f}")
        table.add_row("after training", f"{result.heldout_last:.4f}")
        self._out.print()
        self._out.print(table)

    def written(self, text: str) -> None:
        """What the trained model wrote."""
        self._out.print()
        self._out.print("written by trained.onnx:", highlight=False)
        for line in text.splitlines():
            self._out.print(f"    {line}", highlight=False, markup=False, soft_wrap=True)


def print_report(*parts: RenderableType) -> None:
    """A report on stdout: tables and lines, one after the other."""
    console = _console(stderr=False)
    for part in parts:
        if isinstance(part, str):
            console.print(printable(part), highlight=False, markup=False, soft_wrap=True)
        else:
            console.print(part)


def _console(*, stderr: bool) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else PLAIN_WIDTH
    return Console(stderr=stderr, width=width, highlight=False)


def _progress_bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeRemainingColumn(),
        console=console,
        auto_refresh=False,
    )
