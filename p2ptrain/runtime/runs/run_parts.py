"""What this device does in a run now: takes part in it, conducts it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

import trio

from p2ptrain import limits
from p2ptrain.errors import Interrupted, NumericsError, P2PTrainError, PeerLost
from p2ptrain.ids import DeviceId, RunId, short
from p2ptrain.planner.plan import Plan
from p2ptrain.runtime.runs.founding import Founding
from p2ptrain.runtime.runs.run_member import RunMember
from p2ptrain.runtime.signal import Signal
from p2ptrain.training.messages import Abort, Ended, stamp_of


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

    def ends_with(self, device: DeviceId, message: Ended) -> bool:
        """Whether it is over because a device says so.

        What failed elsewhere does not end work that goes well here, unless our home peer says so.
        """
        plan = self.member.plan
        if plan is None or self.is_ending or plan.run != message.run:
            return False
        failed_elsewhere = message.outcome == "failed" and device != plan.home
        return plan.lineage <= message.lineage and not (failed_elsewhere and self.member.works)


@dataclass(slots=True)
class Conduct:
    """The run that somebody at this peer asked for, and why it had to end."""

    founding: Founding
    scope: trio.CancelScope
    member: RunMember | None = None
    failure: P2PTrainError | None = None
    is_left: bool = False
    """Whether nobody waits for it any more; a thread that plans may still hold it up."""

    @property
    def is_ending(self) -> bool:
        """Whether it will be over soon, whatever comes: only waiting for it is left."""
        withdrawn = self.member is None and self.founding.is_stopping
        return self.failure is not None or self.is_left or withdrawn

    @contextlib.asynccontextmanager
    async def held(self, changed: Signal) -> AsyncIterator[None]:
        """Cancelled with `scope`, or by whoever asked: that is known at once, also while a thread
        has to end first."""
        with self.scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._note_left, changed)
                yield
                nursery.cancel_scope.cancel()

    async def _note_left(self, changed: Signal) -> None:
        try:
            await trio.sleep_forever()
        finally:
            self.is_left = True
            changed.notify()

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


def abort(plan: Plan, error: P2PTrainError) -> Abort:
    """What tells the members of a plan that its run cannot go on."""
    reason = error.message[: limits.REASON_CHARACTERS_MAX]
    return Abort(stamp=stamp_of(plan), error=type(error).__name__, reason=reason)


def may_be_over(part: Part, device: DeviceId, run: RunId) -> bool:
    """Whether our part in a run may be over for a device that offers `run`.

    It is, where that is this very run, or was conducted by that device, which conducts one at a
    time.
    """
    plan = part.member.plan
    return part.member.state.run == run or (plan is not None and plan.home == device)
