"""What this device does in a run now: takes part in it, conducts it."""

from __future__ import annotations

from dataclasses import dataclass

import trio

from p2ptrain.errors import Interrupted, NumericsError, P2PTrainError, PeerLost
from p2ptrain.ids import short
from p2ptrain.runtime.founding import Founding
from p2ptrain.runtime.run_member import RunMember
from p2ptrain.training.messages import Ended


@dataclass(slots=True)
class Part:
    """This device's part in a run, until nothing of it is in memory any more."""

    member: RunMember
    scope: trio.CancelScope
    failure: P2PTrainError | None = None
    ended: Ended | None = None
    """How the run ended; None: it goes on, perhaps without this device."""

    @property
    def is_ending(self) -> bool:
        """Whether it will be over soon, whatever comes: only waiting for it is left."""
        over = self.scope.cancel_called or self.ended is not None
        return over or self.member.failure is not None or self.member.is_finishing


@dataclass(slots=True)
class Conduct:
    """The run that somebody at this peer asked for, and why it had to end."""

    founding: Founding
    scope: trio.CancelScope
    member: RunMember | None = None
    failure: P2PTrainError | None = None

    def resumable(self) -> P2PTrainError:
        """Why it ended, with the run and the step to resume once something is on disk."""
        error, job = self.failure or Interrupted("the run was cancelled"), self.founding.job
        if isinstance(error, PeerLost | NumericsError | Interrupted) and job.directory.exists():
            step = max(job.directory.checkpoint_steps(), default=0)
            error.hint = f"go on from step {step} with: --resume {short(job.run)}"
        return error


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStatistics:
    """What a run service holds now."""

    prepared_count: int
    """Offers whose engines are open."""
    taking_part: bool
    conducting: bool
