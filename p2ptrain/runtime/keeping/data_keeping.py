"""Keep the run's data on as many members as the view names: offer a copy, fetch one, say so."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import trio

from p2ptrain.agreement.view import View
from p2ptrain.errors import DataError, PeerLost, RemoteProtocolError
from p2ptrain.ids import DeviceId
from p2ptrain.planner.plan import Plan
from p2ptrain.runtime.home.home_duty import HomeSession
from p2ptrain.runtime.home.progress import ProgressTracker
from p2ptrain.runtime.keeping.data_copy import CopiedRun, DataCopy, DataOffer, OfferedData
from p2ptrain.runtime.keeping.run_state import RunState
from p2ptrain.runtime.planning.job import Job
from p2ptrain.store.weights import Weights, open_weights
from p2ptrain.training.messages import DataHeld, DataOffered, stamp_of


class DataKeeping:
    """One device's copy of one run's data, across views."""

    def __init__(
        self, *, state: RunState, job: Job | None, on_copied: Callable[[Job, Weights], None]
    ) -> None:
        """`job`: where this device has the data from the beginning."""
        self._state, self._services, self._job = state, state.services, job
        self._on_copied = on_copied
        self._offered = OfferedData(state.services.blobs)
        self._offer: DataOffer | None = None
        self._fetching = False
        self.problem: str | None = None
        """Why this device could not make its copy."""

    async def run(self, view: View) -> None:
        """Once a view's work has begun: say what is here, and offer it to the other holders.

        Cancelled: a copy that is under way is asked for again in the next view.

        Raises:
            DataError: the data of the home peer has changed or cannot be read any more.
        """
        if self._job is None:
            await trio.lowlevel.checkpoint()
            return
        self._tell_held(view)
        others = [device for device in view.plan.holders if device != self._services.device]
        if not others or view.plan.home != self._services.device:
            return
        if self._offer is None:
            self._offer = await self._offered.open(self._job)
        offered = DataOffered(
            stamp=stamp_of(view.plan),
            listing=self._offer.listing,
            listing_bytes=self._offer.listing_bytes,
            total_bytes=self._offer.total_bytes,
        )
        for device in others:
            with contextlib.suppress(PeerLost):  # then the view changes
                self._services.outlet.send(device, offered)

    async def take(self, view: View, device: DeviceId, offered: DataOffered) -> None:
        """Fetch what the home peer offers, unless it is here or on its way.

        Cancelled, or refused by the disk: whole parts stay for the next attempt.
        """
        expected = self._services.device in view.plan.holders and device == view.plan.home
        if self._job is not None or self._fetching or not expected:
            await trio.lowlevel.checkpoint()
            return
        self._fetching = True
        try:
            await self._fetch(view, device, offered)
        except (PeerLost, RemoteProtocolError, DataError) as error:
            self.problem = error.message
        finally:
            self._fetching = False

    def close(self) -> None:
        """The run is over here: offer nothing any more."""
        self._offered.close()

    async def _fetch(self, view: View, device: DeviceId, offered: DataOffered) -> None:
        run = CopiedRun(
            run=view.run,
            lineage=view.lineage,
            view=view.number,
            bundle=self._state.bundle,
            contract=view.contract,
            checkpoint_every=view.checkpoint_every,
        )
        copy = DataCopy(run, runs_path=self._services.runs_path, blobs=self._services.blobs)
        offer = DataOffer(
            listing=offered.listing,
            listing_bytes=offered.listing_bytes,
            total_bytes=offered.total_bytes,
        )
        job = await copy.fetch(device, offer)
        weights = await trio.to_thread.run_sync(open_weights, job.bundle)
        await trio.to_thread.run_sync(job.directory.write_record, job.record(view.contract))
        self._job, self.problem = job, None
        self._on_copied(job, weights)
        self._tell_held(self._state.view or view)

    def _tell_held(self, view: View) -> None:
        held = DataHeld(stamp=stamp_of(view.plan))
        for device in view.members:
            with contextlib.suppress(PeerLost):
                self._services.outlet.send(device, held)


def later_session(
    state: RunState, plan: Plan, job: Job, weights: Weights, first_step: int
) -> HomeSession:
    """What a device that got the run's data in mid run needs in order to feed it; what it knows
    of the session begins after `first_step`."""
    progress = ProgressTracker(
        job=job,
        plan=plan,
        contract=state.contract,
        services=state.services,
        emit=lambda name, report: None,
        first_step=first_step,
    )
    return HomeSession(job=job, weights=weights, progress=progress)
