"""Bytes by run and kind, as far as they only have to be added up."""

from __future__ import annotations

import pytest

from p2ptrain.ids import DeviceId
from p2ptrain.wire.flows import NO_RUN, RUNS_COUNTED_MAX, Carried, Flow, FlowCounter, carried

NEAR, FAR = DeviceId("a" * 26), DeviceId("b" * 26)


def test_bytes_add_up_by_run_and_kind() -> None:
    one, other = FlowCounter(), FlowCounter()
    one.add(Flow("r", "activation"), 5)
    one.add(Flow("r", "activation"), 7)
    one.add(Flow("s", "activation"), 1)
    other.add(Flow("r", "control"), 2)
    one.merge(other)
    assert one.of("r") == {"activation": 12, "control": 2}
    assert one.of("s") == {"activation": 1}
    assert one.of("t") == {}


def test_old_runs_become_bytes_of_no_run() -> None:
    counter = FlowCounter()
    for number in range(RUNS_COUNTED_MAX + 3):
        counter.add(Flow(f"run {number}", "state"), 10)
    assert counter.of("run 2") == {}
    assert counter.of("run 3") == {"state": 10}
    assert counter.of(NO_RUN) == {"state": 30}


def test_session_counts_from_where_it_began() -> None:
    begun = carried({NEAR: {"activation": 5, "control": 3}}, ())
    now = {FAR: {"state": 9}, NEAR: {"activation": 5, "control": 4, "log": 0}}
    assert carried(now, begun) == (
        Carried(to=NEAR, kind="control", bytes=1),
        Carried(to=FAR, kind="state", bytes=9),
    )


@pytest.mark.parametrize(("kind", "count"), [("gossip", 1), ("state", -1)])
def test_impossible_counts_are_refused(kind: str, count: int) -> None:
    with pytest.raises(ValueError, match="unknown kind"):
        Carried(to=NEAR, kind=kind, bytes=count)
