"""The plan that this device has accepted, until it is decided or withdrawn.

A decision is durable here before it takes effect, so what its home peer says next may come ahead
of it; such messages wait here. One plan at a time: a second one is refused.
"""

from __future__ import annotations

from p2ptrain import limits
from p2ptrain.errors import RemoteProtocolError
from p2ptrain.ids import DeviceId, RunId
from p2ptrain.planner.plan import Plan
from p2ptrain.training.messages import Stamp, stamp_of

Early = tuple[tuple[DeviceId, object], ...]
"""Messages with their senders, in the order of arrival."""


class ExpectedPlan:
    """Holds at most one accepted plan and the messages that came ahead of its decision."""

    def __init__(self) -> None:
        self._plan: Plan | None = None
        self._early: list[tuple[DeviceId, object]] = []

    @property
    def run(self) -> RunId | None:
        """The run whose decision is awaited."""
        return None if self._plan is None else self._plan.run

    @property
    def home(self) -> DeviceId | None:
        """Who will conduct it."""
        return None if self._plan is None else self._plan.home

    def expect(self, plan: Plan) -> None:
        """This device accepts `plan`; an older one of the same run is over."""
        self._plan, self._early = plan, []

    def keep(self, device: DeviceId, stamp: Stamp, message: object) -> bool:
        """Keep a message for a plan that is not yet decided; False when it is for none.

        Raises:
            RemoteProtocolError: too many came.
        """
        plan = self._plan
        if plan is None or stamp_of(plan) != stamp or device not in plan.members:
            return False
        if len(self._early) >= limits.EARLY_MESSAGES_MAX:
            raise RemoteProtocolError("too many messages ahead of a decision")
        self._early.append((device, message))
        return True

    def take(self, plan: Plan) -> Early | None:
        """The plan is decided: what came ahead of it; None when it was not expected."""
        if self._plan is None or self._plan.digest != plan.digest:
            return None
        early = tuple(self._early)
        self._plan, self._early = None, []
        return early

    def forget(self, plan: Plan) -> None:
        """The plan will not be decided."""
        self.take(plan)

    def home_down(self, device: DeviceId) -> RunId | None:
        """A peer is gone: its plan cannot be conducted any more; gives the plan's run."""
        if self._plan is None or self._plan.home != device:
            return None
        run = self._plan.run
        self._plan, self._early = None, []
        return run
