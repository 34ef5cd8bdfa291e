"""Which members a run cannot do without when they leave."""

from __future__ import annotations

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
