"""Who could not take part in a run is asked again: what kept it out may be over."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import trio
import trio.testing

from p2ptrain.ids import DeviceId, ViewNumber
from p2ptrain.planner.profile import PeerProfile
from p2ptrain.runtime.runs.admission import Admission
from p2ptrain.runtime.services import Services
from p2ptrain.store.bundles import Bundle
from p2ptrain.training.messages import Declined, Offer, Profiled
from tests.planning_cases import device, profile
from tests.sim.run_views import staged_view

HOME, MEMBER, LEFT_OUT = device("a"), device("b"), device("c")
VIEW = staged_view((HOME, 1), (MEMBER, 1))


class Group:
    """A home peer that sends offers, at moments of a clock that stands still meanwhile."""

    def __init__(self) -> None:
        self.offered_at_s: list[float] = []
        self.wanted: list[str] = []
        self.began_s = trio.current_time()
        measured = replace(profile("c", [(1, 1)]), build=VIEW.contract.builds[0])
        self.profile: PeerProfile = measured
        directory = SimpleNamespace(
            alive=lambda: [SimpleNamespace(device=LEFT_OUT)],
            leaving=tuple,
            name_of=lambda device: str(device)[:1],
        )
        blobs = SimpleNamespace(publish=lambda content, flow: None, withdraw=lambda digest: None)
        services = SimpleNamespace(
            directory=directory, blobs=blobs, outlet=SimpleNamespace(send=self._send)
        )
        manifest = SimpleNamespace(kinds=measured.kinds)
        bundle = SimpleNamespace(
            manifest_bytes=b"", digest="0" * 64, graphs=dict, manifest=manifest
        )
        self.admission = Admission(
            view=VIEW,
            bundle=cast(Bundle, bundle),
            services=cast(Services, services),
            admit=self.wanted.append,
        )

    def _send(self, to: DeviceId, offer: Offer) -> None:
        assert to == LEFT_OUT
        self.offered_at_s.append(round(trio.current_time() - self.began_s, 3))

    def answer(self, *linked: DeviceId) -> None:
        answer = Profiled(
            run=VIEW.run, view=ViewNumber(2), profile=self.profile, linked=tuple(linked)
        )
        self.admission.answered(LEFT_OUT, answer)


async def test_who_lacked_a_link_joins_once_it_has_it(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    group = Group()
    group.admission.begin()
    nursery.start_soon(group.admission.run)
    assert group.offered_at_s == [0.0]
    group.answer(HOME)
    assert group.admission.declined == {LEFT_OUT: "it has no link with b"}
    await trio.sleep(6.0)  # of the mocked clock
    assert group.offered_at_s == [0.0, 5.0]
    group.answer(HOME, MEMBER)
    assert group.wanted == ["c joins"]
    assert group.admission.profiles == (group.profile,)


async def test_who_declines_is_asked_more_and_more_seldom_until_the_view_ends(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    group = Group()
    group.admission.begin()
    nursery.start_soon(group.admission.run)
    for _ in range(6):
        declined = Declined(run=VIEW.run, view=ViewNumber(2), reason="busy")
        group.admission.answered(LEFT_OUT, declined)
        await trio.sleep(61.0)  # of the mocked clock
    asked_at_s = range(0, 6 * 61, 61)
    waits_s = [b - a for a, b in zip(asked_at_s, group.offered_at_s[1:], strict=True)]
    assert waits_s == [5.0, 10.0, 20.0, 40.0, 60.0, 60.0]
    group.admission.answered(LEFT_OUT, declined)
    group.admission.close()
    await trio.sleep(100.0)  # of the mocked clock
    assert len(group.offered_at_s) == 7


async def test_who_goes_away_is_asked_when_it_comes_back(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    group = Group()
    group.admission.begin()
    nursery.start_soon(group.admission.run)
    group.answer(HOME)
    group.admission.gone(LEFT_OUT)
    await trio.sleep(30.0)  # of the mocked clock
    assert group.offered_at_s == [0.0]
    group.admission.arrived(LEFT_OUT)
    assert group.offered_at_s == [0.0, 30.0]
