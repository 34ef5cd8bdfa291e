"""When this peer should try to propose the next view of a run: wishes, patience, back-off."""

from __future__ import annotations

import math
import random

from p2ptrain import limits


class Wishes:
    """Timing only; whether a proposal is possible at all is the machine's business."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._due_s: float | None = None
        self._jitter_s = 0.0
        self._not_before_s = -math.inf
        self._patience_s: float | None = None
        self.reasons: tuple[str, ...] = ()
        """Why a new view is wanted, oldest first; empty: it is not."""

    def want(self, reason: str, now: float, after_s: float) -> None:
        """A new view is wanted once nothing has changed for `after_s`; the later due time wins."""
        if reason not in self.reasons:
            self.reasons = (*self.reasons, reason)[-limits.PROPOSALS_OPEN_MAX :]
        due_s = now + after_s
        self._due_s = due_s if self._due_s is None else max(self._due_s, due_s)
        self._jitter_s = self._rng.uniform(0.0, 0.2 * limits.PROPOSE_STAGGER_S)

    def unwant(self) -> None:
        """The reasons vanished."""
        self.reasons, self._due_s = (), None

    def settle(self) -> None:
        """A view was decided: nothing is wanted, and nobody is waited for."""
        self.unwant()
        self._patience_s = None
        self._not_before_s = -math.inf

    def reachable_changed(self, now: float) -> None:
        """Who may propose has changed: give whoever is first in rank its moment again."""
        soon_s = now + limits.RETURNED_RETRY_S
        if self._due_s is not None:
            self._due_s = max(self._due_s, soon_s)
        if self._patience_s is not None and self._patience_s < soon_s:
            self._patience_s = now + limits.RETURNED_RETRY_S * self._rng.uniform(1.0, 3.0)

    def somebody_returned(self, now: float) -> None:
        """What hindered a proposal may be gone: do not wait the whole patience."""
        if self._patience_s is not None and self._not_before_s > now:
            self._not_before_s = now + limits.RETURNED_RETRY_S * self._rng.uniform(1.0, 2.0)
            self._patience_s = self._not_before_s

    def promised(self, now: float) -> None:
        """A proposer showed a sign of life: its ballot gets time to end in a decision."""
        self._patience_s = now + limits.DECISION_PATIENCE_S * self._rng.uniform(1.0, 1.4)
        self._not_before_s = -math.inf

    def back_off(self, now: float, wait_s: float) -> None:
        """An own ballot failed: try again after a random while, unless somebody else decides."""
        self._not_before_s = now + wait_s * self._rng.uniform(0.5, 1.5)
        self._patience_s = self._not_before_s

    def propose_at_s(self, rank: int, *, promised: bool) -> float | None:
        """When to open a ballot; None: not by itself.

        `rank` counts members that go first; a member that has promised somebody's ballot waits
        for its decision instead.
        """
        if promised:
            return self._patience_s
        if self._due_s is None:
            return None
        stagger_s = min(rank, limits.PROPOSE_RANK_MAX) * limits.PROPOSE_STAGGER_S
        return max(self._due_s + stagger_s + self._jitter_s, self._not_before_s)
