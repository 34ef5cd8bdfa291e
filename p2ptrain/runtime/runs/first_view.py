"""From a decided plan: the view with which a lineage begins, and what a device does in it."""

from __future__ import annotations

from p2ptrain.agreement.view import View
from p2ptrain.ids import DeviceId
from p2ptrain.planner.plan import Plan
from p2ptrain.training.contract import Contract
from p2ptrain.training.messages import Begin


def first_view(plan: Plan, contract: Contract, begin: Begin) -> View:
    """The view that all members of a plan have accepted, as its home peer begins it."""
    return View(
        plan=plan,
        contract=contract,
        profiles=begin.profiles,
        previous=None,
        resume_step=begin.first_step,
        records=(),
        restoration=None,
        first_step=begin.first_step,
        checkpoint_every=begin.checkpoint_every,
    )


def activity(plan: Plan, device: DeviceId) -> str:
    """`run 3f2a1b2c, stage 1 of 3`, for status."""
    what = stages_in_words(plan, device)
    if what is None:
        what = "data" if device == plan.home else "in reserve"
    return f"run {plan.run[:8]}, {what}"


def stages_in_words(plan: Plan, device: DeviceId) -> str | None:
    """`stage 1 of 3`, of a private run's home peer `stages 1 and 3 of 3`; None without a stage."""
    numbers = [str(index + 1) for index in plan.stages_of(device)]
    if not numbers:
        return None
    return f"stage{'s' * (len(numbers) > 1)} {' and '.join(numbers)} of {len(plan.stages)}"
