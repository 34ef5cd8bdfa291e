"""The order of a run's work: what every peer does next follows from what is done.

All peers derive the same sequence of items from the contract; only `stop_after` comes as a
message, and it can only shorten the sequence at a step that nobody has begun.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from p2ptrain.errors import InvariantBroken
from p2ptrain.training.contract import Contract

ItemKind = Literal["train", "evaluate", "checkpoint"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One piece of work at one step: train makes the step, the others follow it."""

    kind: ItemKind
    step: int

    def __str__(self) -> str:
        return f"{self.kind} step {self.step}"


class Program:
    """Says which item is current; told when it is complete or when to stop."""

    def __init__(self, contract: Contract, *, first_step: int, checkpoint_every: int) -> None:
        self._contract = contract
        self._first_step = first_step
        self._checkpoint_every = checkpoint_every
        self._step = first_step
        self._evaluated_at: int | None = None
        self._saved_at: int | None = first_step if first_step > 0 else None
        self._last = max(contract.steps, first_step)

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
        every = self._contract.evaluate_every
        step, first = self._step, self._step == self._first_step
        if self._evaluated_at != step and (first or (every and step % every == 0)):
            return Item(kind="evaluate", step=step)
        every = self._checkpoint_every
        if self._saved_at != step and not first and every and step % every == 0:
            return Item(kind="checkpoint", step=step)
        if step < self._last:
            return Item(kind="train", step=step + 1)
        if self._evaluated_at != step:
            return Item(kind="evaluate", step=step)
        if self._saved_at != step:
            return Item(kind="checkpoint", step=step)
        return None

    def complete(self, item: Item) -> None:
        """Note that the current item is done."""
        if item != self.current:
            raise InvariantBroken(f"{item} completed while {self.current} is current")
        match item.kind:
            case "train":
                self._step = item.step
            case "evaluate":
                self._evaluated_at = item.step
            case "checkpoint":
                self._saved_at = item.step

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
            case "checkpoint":
                return 0
