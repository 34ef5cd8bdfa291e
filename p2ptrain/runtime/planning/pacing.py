"""Ask for a new view of a run when our own stage has left its plan and another one would pay."""

from __future__ import annotations

from typing import Protocol

import trio

from p2ptrain import limits
from p2ptrain.agreement.ballot import Ballot
from p2ptrain.agreement.run_events import PromisedInventory, ProposalWanted
from p2ptrain.agreement.view import View
from p2ptrain.bundle.manifest import Manifest
from p2ptrain.ids import DeviceId, ViewNumber
from p2ptrain.planner.pace import AS_PLANNED, PaceWatch
from p2ptrain.planner.plan import Plan
from p2ptrain.recovery.inventory import Inventory, LiveStage, live_stage
from p2ptrain.runtime.planning.replanning import NextView, next_view
from p2ptrain.runtime.services import Services
from p2ptrain.runtime.signal import Signal


class Want(Protocol):
    """Asks for a new view after a while without other wishes."""

    def __call__(self, reason: str, *, after_s: float) -> None: ...


def _nobody(reason: str, *, after_s: float) -> None:
    """Until somebody listens."""


class Pacing:
    """One member's eye on the paces of a run; `run` asks, once per view at most."""

    def __init__(self, services: Services, manifest: Manifest) -> None:
        self._services, self._manifest = services, manifest
        self._watch = PaceWatch(services.device)
        self._signal = Signal()
        self._step: int | None = None
        self._asked = False
        self.want: Want = _nobody
        """Told why a new view is wanted."""

    def begin(self, plan: Plan) -> None:
        """A view's work begins."""
        self._watch.begin(plan)
        self._step, self._asked = None, False

    def note(self, device: DeviceId, step: int, compute_ns: int) -> None:
        """A stage has told what a step took."""
        if self._watch.note(device, compute_ns, trio.current_time()):
            self._step = step
            self._signal.notify()

    def paces(self) -> dict[DeviceId, int]:
        """What a new view is to be planned with; empty unless we have asked for it."""
        return self._watch.paces() if self._asked else {}

    async def run(self, view: View) -> None:
        """Look whether another plan would pay whenever our stage has drifted, until cancelled."""
        while not self._asked:
            await self._signal.wait_until(lambda: self._step is not None)
            step, self._step = self._step, None
            paces = self._watch.paces()
            given = imagined(view, self._manifest, step or 0, paces, self._services)
            found = await trio.to_thread.run_sync(next_view, given)
            if isinstance(found, View) and _layout(found.plan) != _layout(view.plan):
                self._asked = True
                self.want(self._reason(paces), after_s=0.0)
        await trio.sleep_forever()

    def _reason(self, paces: dict[DeviceId, int]) -> str:
        own = self._services.device
        times = paces.get(own, AS_PLANNED) / AS_PLANNED
        name = self._services.directory.name_of(own)
        return f"{name} takes {times:.1f} times the planned time"


def imagined(
    view: View,
    manifest: Manifest,
    step: int,
    paces: dict[DeviceId, int],
    services: Services,
) -> NextView:
    """What the next view would follow from, if everybody who is there promised after this step.

    Only to learn whether another plan would be chosen: nobody was asked what it holds.
    """
    there = (services.device, *services.directory.linked())
    members = [device for device in view.members if device in there]
    batteries = {profile.device: profile.battery for profile in view.profiles}
    inventories = {
        device: Inventory(
            live=_live(view.plan, device, step),
            states=(),
            logs=(),
            has_data=device in view.plan.holders,
            linked=tuple(sorted(set(members) - {device})),
            links=services.link_figures() if device == services.device else (),
            battery=batteries.get(device),
        )
        for device in members
    }
    return NextView(
        wanted=ProposalWanted(
            ballot=Ballot(round=1, device=services.device),
            number=ViewNumber(view.number + 1),
            base=view,
            promises=tuple(
                PromisedInventory(device=device, inventory=inventories[device])
                for device in sorted(inventories)
            ),
            records=(),
            resume_step=step,
        ),
        manifest=manifest,
        leaving=services.directory.leaving(),
        newcomers=(),
        reason="a look ahead",
        paces=paces,
        change_s=limits.VIEW_CHANGE_S,
    )


def _live(plan: Plan, device: DeviceId, step: int) -> LiveStage | None:
    stages = [plan.stages[index].segments for index in plan.stages_of(device)]
    return live_stage(stages, step, gradients_complete=False) if stages else None


def _layout(plan: Plan) -> list[tuple[tuple[DeviceId, ...], tuple[int, ...], range]]:
    return [(stage.devices, stage.weights, stage.segments) for stage in plan.stages]
