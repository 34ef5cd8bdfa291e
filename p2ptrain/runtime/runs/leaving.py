"""Whom a run cannot do without, and whom it does without."""

from __future__ import annotations

from p2ptrain.agreement.view import View
from p2ptrain.ids import DeviceId
from p2ptrain.planner.plan import Plan
from p2ptrain.training.contract import Contract
from p2ptrain.training.owners import owner_of


def why_waited_for(device: DeviceId, plan: Plan, contract: Contract) -> str | None:
    """Why a run waits for a member that leaves; None: others take its part over."""
    if owner_of(contract.owners, device) is not None:
        return "the run trains on this device's own data: it waits until it is back"
    if not plan.keep_data_here or plan.home != device:
        return None
    does = "conducts the run" if contract.owners else "keeps the run's data"
    return f"this device {does}: it waits until it is back"


def goes_on_without(
    device: DeviceId, view: View, newest: View | None, offered_by: DeviceId | None
) -> bool:
    """Whether nobody waits for what a device has from before it was restarted.

    Args:
        device: It.
        view: The newest that it knew when it was back.
        newest: That it knows now.
        offered_by: Who has offered it a part in the run since. The home peer of a view that lacks
            it does so once that view is at work, with all its states.
    """
    if newest is not None and newest.digest != view.digest:
        return True
    return device not in view.members and offered_by == view.plan.home
