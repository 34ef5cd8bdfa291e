"""A silent link is closed when others say that its other end lives, and not after our own pause."""

from __future__ import annotations

from p2ptrain import limits
from p2ptrain.membership.standings import MemberView
from p2ptrain.membership.states import State
from p2ptrain.runtime.device.link_watch import LOOK_EVERY_S, LOOKS, LinkWatch
from tests.sim.plans import device

SILENT_S = limits.LINK_SILENT_S + 1


def view(heard_s: float | None, *, state: State = State.ALIVE, linked: bool = True) -> MemberView:
    return MemberView(
        device=device(1), record=None, state=state, reason="", linked=linked, state_s=9.0,
        last_heard_s=heard_s, round_trip_s=None, last_down="",
    )  # fmt: skip


def looks(*seen: tuple[float, MemberView]) -> list[bool]:
    watch = LinkWatch()
    return [watch.look([each], now) == (device(1),) for now, each in seen]


def test_silence_is_judged_after_looks_in_a_row() -> None:
    times = [index * LOOK_EVERY_S for index in range(LOOKS + 2)]
    assert looks(*((now, view(SILENT_S)) for now in times)) == [False] * LOOKS + [True] * 2


def test_one_word_begins_the_count_again() -> None:
    seen = [view(SILENT_S)] * LOOKS + [view(0.1)] + [view(SILENT_S)] * 2
    assert not any(looks(*((index * LOOK_EVERY_S, each) for index, each in enumerate(seen))))


def test_after_a_pause_of_our_own_nobody_is_blamed() -> None:
    times = [0.0, 1.0, 2.0, 32.0, 33.0, 34.0]
    assert not any(looks(*((now, view(SILENT_S)) for now in times)))


def test_the_dead_the_unlinked_and_the_unknown_are_not_judged() -> None:
    for each in (view(SILENT_S, state=State.DEAD), view(SILENT_S, linked=False), view(None)):
        assert not any(looks(*((index * LOOK_EVERY_S, each) for index in range(9))))
