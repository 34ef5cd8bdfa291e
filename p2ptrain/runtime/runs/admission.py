"""Let devices that arrive during a run take part in it: offer, measure, admit by a new view.

The home peer of the view does this. A newcomer fetches the model and measures itself while the
run goes on; the next view names it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import trio

from p2ptrain import limits
from p2ptrain.agreement.view import View
from p2ptrain.errors import PeerLost
from p2ptrain.ids import DeviceId, Digest
from p2ptrain.planner.profile import PeerProfile, is_plausible
from p2ptrain.runtime.services import Services
from p2ptrain.runtime.signal import Signal
from p2ptrain.runtime.views.view_work import may_change_parts
from p2ptrain.schedule.actions import delays_gradients
from p2ptrain.store.bundles import Bundle
from p2ptrain.training.messages import Declined, Offer, Profiled
from p2ptrain.wire.flows import Flow


def admits(view: View, device: DeviceId) -> bool:
    """Whether a device lets others into a view's run: its home peer does, unless all keep their
    parts."""
    return device == view.plan.home and may_change_parts(view)


class Admission:
    """Who was offered the run during one view, and who may be taken into the next."""

    def __init__(
        self, *, view: View, bundle: Bundle, services: Services, admit: Callable[[str], None]
    ) -> None:
        """`admit` is told, in words, that somebody new is ready for the next view."""
        self._view, self._bundle, self._services, self._admit = view, bundle, services, admit
        self._offered: set[DeviceId] = set()
        self._published: list[Digest] = []
        self._newcomers: dict[DeviceId, PeerProfile] = {}
        self.declined: dict[DeviceId, str] = {}
        self._waits_s: dict[DeviceId, float] = {}
        self._again_at_s: dict[DeviceId, float] = {}
        self._signal, self._scope = Signal(), trio.CancelScope()

    @property
    def profiles(self) -> tuple[PeerProfile, ...]:
        """Of those who may be taken into the next view, by device."""
        return tuple(self._newcomers[device] for device in sorted(self._newcomers))

    def begin(self) -> None:
        """Offer the run to every device that is there and not in it."""
        flow = Flow(self._view.plan.run, "bundle")
        for content in (self._bundle.manifest_bytes, *self._bundle.graphs().values()):
            self._published.append(self._services.blobs.publish(content, flow=flow))
        for record in self._services.directory.alive():
            self.arrived(record.device)

    async def run(self) -> None:
        """Ask those again who could not take part, at growing distances, until `close`.

        What kept them out may pass without anybody here noticing: a way between two others that
        was cut, another run, memory that was taken.
        """
        with self._scope:
            while True:
                await self._signal.wait_until(lambda: bool(self._again_at_s))
                await trio.sleep_until(min(self._again_at_s.values()))
                for device, at_s in list(self._again_at_s.items()):
                    if at_s <= trio.current_time():
                        del self._again_at_s[device]
                        self._offered.discard(device)
                        self.arrived(device)

    def close(self) -> None:
        """The view is over: nothing is offered any more."""
        self._scope.cancel()
        for digest in self._published:
            self._services.blobs.withdraw(digest)
        self._published.clear()

    def arrived(self, device: DeviceId) -> None:
        """A device can be talked to: offer it the run unless it takes part or was asked."""
        going = self._services.directory.leaving()
        if device in self._view.members or device in self._offered or device in going:
            return
        contract = self._view.contract
        offer = Offer(
            run=self._view.run,
            view=self._view.number + 1,  # type: ignore[arg-type]  # a ViewNumber again
            bundle=self._bundle.digest,
            bundle_bytes=len(self._bundle.manifest_bytes),
            microbatch_size=contract.microbatch_size,
            form=contract.form,
            threads=contract.threads,
            in_parts=delays_gradients(self._view.plan.schedule),
            optimizer=contract.optimizer.name,
        )
        with contextlib.suppress(PeerLost):
            self._services.outlet.send(device, offer)
            self._offered.add(device)

    def gone(self, device: DeviceId) -> None:
        """A device went away: when it returns it is asked again."""
        self._offered.discard(device)
        self._newcomers.pop(device, None)
        self._again_at_s.pop(device, None)

    def answered(self, device: DeviceId, answer: Profiled | Declined) -> None:
        """Take a newcomer's answer."""
        if device not in self._offered:
            return
        reason = answer.reason if isinstance(answer, Declined) else self._objection(device, answer)
        if reason is not None:
            self._refused(device, reason)
            return
        if isinstance(answer, Profiled) and device not in self._newcomers:
            self._newcomers[device] = answer.profile
            self._admit(f"{self._services.directory.name_of(device)} joins")

    def _refused(self, device: DeviceId, reason: str) -> None:
        self.declined[device] = reason
        wait_s = self._waits_s.get(device, limits.ADMISSION_RETRY_S)
        self._waits_s[device] = min(2 * wait_s, limits.ADMISSION_RETRY_MAX_S)
        self._again_at_s[device] = trio.current_time() + wait_s
        self._signal.notify()

    def _objection(self, device: DeviceId, answer: Profiled | Declined) -> str | None:
        if isinstance(answer, Declined):
            return answer.reason
        profile = answer.profile
        if profile.device != device or not is_plausible(profile, self._bundle.manifest.kinds):
            return "its measurement does not fit the model"
        unlinked = set(self._view.members) - {*answer.linked, device}
        if unlinked:
            names = ", ".join(map(self._services.directory.name_of, sorted(unlinked)))
            return f"it has no link with {names}"
        if profile.build not in self._view.contract.builds:
            return "its runtime build is not in the run's numerics contract"
        return None
