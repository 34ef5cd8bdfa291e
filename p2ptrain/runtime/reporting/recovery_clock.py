"""How long a run stood still because of a loss, and on what: for status and benchmarks."""

from __future__ import annotations

import time

from p2ptrain.runtime.reports import RecoveryReport


class RecoveryClock:
    """Follows one member from noticing a loss to the next new step; keeps the last account."""

    def __init__(self) -> None:
        self.last: RecoveryReport | None = None
        self._reason = ""
        self._noticed_at_s: float | None = None
        self._decided_at_s: float | None = None
        self._ready_at_s: float | None = None
        self.fetch_s = self.replay_s = 0.0
        """Of the restoration under way here: waiting for others' states and logs, computing."""

    def noticed(self, reason: str) -> None:
        """Somebody is lost; what is noticed later belongs to the same account."""
        if self._noticed_at_s is None:
            self._noticed_at_s, self._reason = time.time(), reason
            self._decided_at_s = self._ready_at_s = None

    def decided(self) -> None:
        """The next view is decided."""
        self._decided_at_s, self._ready_at_s = time.time(), None
        self.fetch_s = self.replay_s = 0.0

    def ready(self) -> None:
        """Every member of it is ready."""
        self._ready_at_s = time.time()

    def committed(self) -> None:
        """A new step of it cannot be lost any more: the account is closed."""
        noticed, decided, ready = self._noticed_at_s, self._decided_at_s, self._ready_at_s
        if noticed is None or decided is None or ready is None:
            return
        self.last = RecoveryReport(
            reason=self._reason,
            noticed_at_s=noticed,
            agreement_s=decided - noticed,
            transfer_s=self.fetch_s,
            replay_s=self.replay_s,
            ready_s=ready - decided,
            step_s=time.time() - ready,
        )
        self._noticed_at_s = None
