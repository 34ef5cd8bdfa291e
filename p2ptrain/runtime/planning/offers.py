"""Answer offers: fetch the bundle, open an engine, measure ourselves on it."""

from __future__ import annotations

import time
from dataclasses import dataclass

import trio

from p2ptrain import limits
from p2ptrain.bundle.reading import parse_manifest
from p2ptrain.data.opening import OpenData
from p2ptrain.engine.contract import Engine
from p2ptrain.errors import BundleError, PeerLost
from p2ptrain.ids import DeviceId, Digest, RunId, short
from p2ptrain.planner.plan import Plan
from p2ptrain.planner.profile import PeerProfile
from p2ptrain.runtime.compute.known_profiles import known_or_measured
from p2ptrain.runtime.compute.stopwatch import Stopwatch
from p2ptrain.runtime.exchange.foreign import SURVIVABLE, as_ours
from p2ptrain.runtime.planning.own_data import offered_data
from p2ptrain.runtime.planning.own_placement import is_of_owners
from p2ptrain.runtime.services import Services
from p2ptrain.store.bundles import Bundle, bundle_from_parts
from p2ptrain.store.profiles import ProfileStore
from p2ptrain.training.contract import Contract
from p2ptrain.training.messages import Declined, Offer, Profiled
from p2ptrain.training.owners import owner_of

PREPARED_MAX = 2
"""Offers whose engines are kept open at once; an older one is forgotten."""


def kept_s(offer: Offer) -> float:
    """How long what was prepared for an offer waits for its plan: others may take their time."""
    return limits.OFFER_KEPT_S + (limits.OWN_DATA_TIMEOUT_S if offer.own_data else 0.0)


@dataclass(frozen=True, slots=True)
class Prepared:
    """What an answered offer has left here for its plan."""

    bundle: Bundle
    engine: Engine
    offer: Offer
    home: DeviceId
    at_s: float
    data: OpenData | None
    """Of our own, where each peer of the run feeds its own."""


class OfferDesk:
    """Keeps what was prepared for an offer until its plan is decided or forgotten."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._prepared: dict[RunId, Prepared] = {}
        self._measuring = trio.Lock()

    @property
    def prepared_count(self) -> int:
        """Engines that are kept open for runs."""
        return len(self._prepared)

    async def answer(self, home: DeviceId, offer: Offer, busy_with: RunId | None) -> None:
        """Prepare for an offer and send the measurement, or say why not."""
        answer: Profiled | Declined
        try:
            if busy_with is not None and busy_with != offer.run:
                raise PeerLost(f"busy with run {short(busy_with)}")
            if offer.threads > self._services.threads_max:
                raise PeerLost(f"its owner allows {self._services.threads_max} threads")
            async with self._measuring:  # two at once would measure each other
                answer = await self._measure(home, offer)
        except SURVIVABLE as error:
            reason = as_ours(error).message[: limits.REASON_CHARACTERS_MAX]
            answer = Declined(run=offer.run, view=offer.view, reason=reason)
        try:
            self._services.outlet.send(home, answer)
        except PeerLost:
            self.forget(offer.run)

    def refusal(self, plan: Plan, contract: Contract) -> str | None:
        """Why we cannot run our stage of this plan; None when we can."""
        if not plan.stages_of(self._services.device):
            return None
        prepared = self._prepared.get(plan.run)
        if prepared is None or prepared.offer.view != plan.view:
            return "it was not offered this run"
        if contract.bundle != prepared.bundle.digest:
            return "the plan is for another bundle than was offered"
        if (contract.threads, contract.form) != (prepared.offer.threads, prepared.offer.form):
            return "the plan has other threads or another graph form than was offered"
        if prepared.engine.build not in contract.builds:
            return "its runtime build is not in the numerics contract"
        if (reason := self._data_objection(prepared, plan, contract)) is not None:
            return reason
        need = plan.memory_of(self._services.device)
        have = self._services.memory_bytes()
        return (
            f"its stage needs {need} bytes of memory and {have} are left" if need > have else None
        )

    def _data_objection(self, prepared: Prepared, plan: Plan, contract: Contract) -> str | None:
        owner = owner_of(contract.owners, self._services.device)
        if prepared.data is None and not contract.owners:
            return None
        if owner is None or prepared.data is None or not owner.has(prepared.data.owned):
            return "the plan has other data here than it has told"
        return None if is_of_owners(plan, contract.owners) else "the plan is not its owners'"

    def prepared(self, run: RunId) -> Prepared | None:
        """What a decided plan runs on; None when nothing was prepared, or too long ago."""
        return self._prepared.get(run)

    def forget(self, run: RunId) -> None:
        """Close the engine of a run that is over; one that is taking part keeps its own."""
        self._prepared.pop(run, None)

    def over(self, plan: Plan) -> None:
        """A plan has ended or was not agreed; what was prepared for a later view stays."""
        prepared = self._prepared.get(plan.run)
        if prepared is not None and prepared.offer.view <= plan.view:
            self.forget(plan.run)

    def expire(self, offer: Offer) -> None:
        """Nobody came back to this offer in time: forget it, unless a newer one took its place."""
        prepared = self._prepared.get(offer.run)
        if prepared is not None and prepared.offer is offer:
            self.forget(offer.run)

    def home_down(self, device: DeviceId) -> None:
        """A peer is gone: its offers will not be decided."""
        for run in [run for run, p in self._prepared.items() if p.home == device]:
            self.forget(run)

    async def _measure(self, home: DeviceId, offer: Offer) -> Profiled:
        bundle = await self._fetch_bundle(home, offer)
        data: OpenData | None = None
        if offer.own_data:
            data = await offered_data(self._services, home, offer, bundle.manifest)
        engine = await trio.to_thread.run_sync(self._services.open_engine, offer.threads)
        services = self._services
        store = ProfileStore(services.cache_path / "profiles")
        quota = services.cpu_quota()
        stopwatch = Stopwatch(
            clock_ns=services.clock_ns, cores=None if quota is None else quota.cores
        )
        costs = await trio.to_thread.run_sync(
            known_or_measured, store, engine, bundle, offer, stopwatch
        )
        record_ns = await trio.to_thread.run_sync(services.record_ns)
        self._keep(offer, Prepared(bundle, engine, offer, home, time.monotonic(), data))
        profile = PeerProfile(
            device=self._services.device,
            kinds=costs.kinds,
            other_sizes=costs.other_sizes,
            memory_bytes=self._services.memory_bytes(),
            host=self._services.host,
            own_cores=self._services.own_cores,
            cores=self._services.cores,
            build=engine.build,
            power=self._services.power(offer.threads),
            battery=self._services.battery(),
            record_ns=record_ns,
        )
        linked = self._services.directory.linked()
        links = self._services.link_figures()
        return Profiled(
            run=offer.run,
            view=offer.view,
            profile=profile,
            linked=linked,
            links=links,
            data=None if data is None else data.owned,
        )

    def _keep(self, offer: Offer, prepared: Prepared) -> None:
        self._prepared[offer.run] = prepared
        while len(self._prepared) > PREPARED_MAX:
            oldest = min(self._prepared, key=lambda run: self._prepared[run].at_s)
            del self._prepared[oldest]

    async def _fetch_bundle(self, home: DeviceId, offer: Offer) -> Bundle:
        for prepared in self._prepared.values():
            if prepared.bundle.digest == offer.bundle:
                return prepared.bundle
        blobs = self._services.blobs
        if offer.bundle_bytes > limits.MANIFEST_BYTES_MAX:
            raise BundleError(f"a manifest of {offer.bundle_bytes} bytes is too long")
        content = await blobs.fetch(home, offer.bundle, size=offer.bundle_bytes)
        manifest = parse_manifest(content)
        graphs: dict[Digest, bytes] = {}
        for digest, file in manifest.graphs.items():
            name = Digest(digest)
            graphs[name] = await blobs.fetch(home, name, size=file.bytes)
        return await trio.to_thread.run_sync(bundle_from_parts, content, graphs)
