"""How a step's record comes to be held by a quorum."""

from __future__ import annotations

from tests.sim.plans import device
from tests.sim.run_views import first_view, make_step
from tests.unit.test_run_machine import Net, three

A, B, C = (device(index) for index in range(3))


def test_step_is_committed_by_a_quorum_exactly_once() -> None:
    net = three()
    net.cut = {B, C}
    net.complete(1, A)
    assert net.committed(A) == []
    net.cut = set()
    net.complete(1, B)
    assert [net.committed(each) for each in (A, B, C)] == [[1], [1], [1]]
    assert net.machines[C].records == (make_step(1),)  # held because others hold it
    net.complete(1, C)
    assert net.committed(C) == [1]


def test_record_of_one_member_is_enough_for_all_that_hear_it() -> None:
    net = Net(A, B, view=first_view(A, B, home=A))
    net.complete(1, B)  # A, without which there is no quorum, lacks somebody's `done`
    assert [net.committed(each) for each in (A, B)] == [[1], [1]]
