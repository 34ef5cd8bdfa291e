"""The rules that the safety of a run hangs on, in one place; tests break them one by one."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from p2ptrain.agreement.run_messages import ViewPromise
from p2ptrain.agreement.view import View, is_quorum
from p2ptrain.ids import DeviceId


class Rules:
    """What `RunMachine` asks whenever it decides something that could be wrong for ever."""

    def is_quorum(self, view: View, devices: Collection[DeviceId]) -> bool:
        """Whether these members decide for the view: any two such sets have a common member."""
        return is_quorum(view.plan, devices)

    def adopted(self, promises: Mapping[DeviceId, ViewPromise]) -> View | None:
        """The value accepted under the highest ballot: it may be decided, so it must win."""
        accepted = [each.accepted for each in promises.values() if each.accepted is not None]
        return max(accepted, key=lambda each: each.ballot).value if accepted else None

    def resume_step(self, promises: Mapping[DeviceId, ViewPromise], base: View) -> int:
        """The newest step of which any promise has the record: no committed one is later."""
        newest = [promise.records[-1].step for promise in promises.values() if promise.records]
        return max([base.resume_step, *newest])

    def may_record(self, *, promised: bool) -> bool:
        """Whether a member that has promised the next view or not may record and commit steps."""
        return not promised

    def trusts_disk(self) -> bool:
        """Whether a journal that is read counts for whole, whatever others have heard from it."""
        return False

    def follows(self, base: View, value: View) -> str | None:
        """Why a view cannot be the one after `base`; None: it can."""
        if value.run != base.run or value.lineage != base.lineage:
            return "it belongs to another run or lineage"
        if value.number != base.number + 1 or value.previous != base.plan.digest:
            return "it does not follow the present view"
        if value.contract != base.contract:
            return "it changes the contract, which holds for the whole run"
        if value.resume_step < base.resume_step:
            return "it goes back behind the present view"
        return None
