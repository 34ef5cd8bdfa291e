"""The order of a run's work: what every peer does next follows from what is done.

All peers derive the same sequence of items from the contract; only `stop_after` comes as a
message, and it can only shorten the sequence at a step that nobody has begun.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from p2ptrain.errors import InvariantBroken
from p2ptrain.training.contract import Contract

ItemKind = Literal["train", "evaluate", "checkpoint", "replicate"]
FED_ITEMS: Final = ("train", "evaluate")
"""Items for which samples are read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One piece of work at one step: train makes the step, the others follow it."""

    kind: ItemKind
    step: int

    def __str__(self) -> str:
        return f"{self.kind} step {self.step}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Intervals:
    """When a run saves: steps between checkpoints (0: only after the last) and replica sets."""

    checkpoint_every: int
    replica_every: int


class Program:
    """Says which item is current; told when it is complete or when to stop.

    Args:
        contract: Of the run.
        intervals: Of the view.
        first_step: Where the lineage began.
        resume_step: Where this view goes on, if it follows another one: an evaluation due there
            may be made twice, with the same result, and every stage is replicated anew.
    """

    def __init__(
        self,
        contract: Contract,
        *,
        intervals: Intervals,
        first_step: int,
        resume_step: int | None = None,
    ) -> None:
        self._contract, self._intervals = contract, intervals
        self._first_step = first_step
        self._step = first_step if resume_step is None else resume_step
        self._evaluated_at: int | None = None
        drawn = resume_step is None and first_step == 0
        self._replicated_at: int | None = 0 if drawn else None
        self._saved_at: int | None = first_step if first_step > 0 else None
        self._last = max(contract.steps, first_step)
        self._fed_count = 0

    @property
    def fed_count(self) -> int:
        """Steps and evaluations that are complete here, of those in this view."""
        return self._fed_count

    @property
    def step(self) -> int:
        """The last step that is complete."""
        return self._step

    @property
    def stopped(self) -> bool:
        """Whether the session ends before the contract's last step."""
        return self._last < self._contract.steps

    @property
    def current(self) -> Item | None:
        """What to do next; None when the session is complete."""
        step, last = self._step, self._step >= self._last
        if self._evaluated_at != step and (last or self._evaluation_due(step)):
            return Item(kind="evaluate", step=step)
        if self._saved_at != step and (last or self._checkpoint_due(step)):
            return Item(kind="checkpoint", step=step)
        if not last and self._replicated_at != step and self._replica_due(step):
            return Item(kind="replicate", step=step)
        return None if last else Item(kind="train", step=step + 1)

    def complete(self, item: Item) -> None:
        """Note that the current item is done."""
        if item != self.current:
            raise InvariantBroken(f"{item} completed while {self.current} is current")
        self._fed_count += item.kind in FED_ITEMS
        match item.kind:
            case "train":
                self._step = item.step
            case "evaluate":
                self._evaluated_at = item.step
            case "checkpoint":
                self._saved_at = self._replicated_at = item.step
            case "replicate":
                self._replicated_at = item.step

    def _evaluation_due(self, step: int) -> bool:
        every = self._contract.evaluate_every
        return step == self._first_step or (every > 0 and step % every == 0)

    def _checkpoint_due(self, step: int) -> bool:
        every = self._intervals.checkpoint_every
        return step != self._first_step and every > 0 and step % every == 0

    def _replica_due(self, step: int) -> bool:
        return self._replicated_at is None or step % self._intervals.replica_every == 0

    def stop_after(self, step: int) -> None:
        """End the session after `step`; a step that is already complete stays."""
        self._last = max(self._step, min(self._last, step))

    def microbatches(self, item: Item) -> int:
        """How many microbatches an item sends through the pipeline."""
        match item.kind:
            case "train":
                return self._contract.microbatches
            case "evaluate":
                return self._contract.heldout_microbatches
            case "checkpoint" | "replicate":
                return 0
