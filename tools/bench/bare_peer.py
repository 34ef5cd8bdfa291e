"""A peer that logs nothing and keeps no replica: what recovery costs is measured against it.

Started like `python -m p2ptrain`; everything else is the product's own code.
"""

from __future__ import annotations

from p2ptrain.cli.main import main
from p2ptrain.recovery.step_log import StepLog
from p2ptrain.runtime.keeping.run_state import RunState
from p2ptrain.runtime.views.view_work import ViewWork


def strip() -> None:
    """Take logging and snapshots out of this process."""

    def nothing(*_: object) -> None:
        """In place of a log entry, or of what ends a step's log."""

    def nobody(*_: object) -> tuple[()]:
        """In place of the keepers of the replicas; a checkpoint at the end still goes home."""
        return ()

    setattr(RunState, "log_sent", nothing)  # noqa: B010 the type checker knows it as a method
    setattr(StepLog, "finish", nothing)  # noqa: B010 as above
    setattr(ViewWork, "_own_keepers", nobody)  # noqa: B010 as above


if __name__ == "__main__":
    strip()
    main()
