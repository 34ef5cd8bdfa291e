"""How a step's record comes to be held by a quorum."""

from __future__ import annotations

from dataclasses import replace

import pytest

from p2ptrain.errors import InvariantBroken, RemoteProtocolError
from tests.sim.plans import device
from tests.sim.run_views import first_view, make_step
from tests.unit.test_run_machine import Net, lose, three

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


def test_record_of_a_step_for_which_the_own_stage_gave_nothing_is_an_impossible_message() -> None:
    net = Net(A, B, view=first_view(A, B, home=A))
    plan = net.present(A).plan.digest
    net.machines[A].told(0, plan=plan)
    with pytest.raises(RemoteProtocolError, match="step 1 was recorded without our stage's"):
        net.complete(1, B)
    assert net.machines[A].records == ()
    net.machines[A].told(1, plan=plan)
    net.wait(10.0)  # B says it again
    assert [net.committed(each) for each in (A, B)] == [[1], [1]]


def test_what_a_stage_told_in_an_older_view_says_nothing_about_this_one() -> None:
    net = three()
    before = net.present(A).plan.digest
    net.machines[A].told(0, plan=before)
    lose(net, C)
    net.wait(0.5)
    net.propose(A, A, B)
    net.machines[A].told(0, plan=before)
    net.complete(1, B)  # A may have no stage in this view, or have been restarted in it
    assert [net.committed(each) for each in (A, B)] == [[1], [1]]


def test_step_that_comes_out_differently_than_it_was_recorded_stops_the_peer() -> None:
    net = three()
    net.cut = {C}
    net.complete(1, B)
    other = replace(make_step(1), loss=make_step(1).loss + 1.0)
    with pytest.raises(InvariantBroken, match="step 1 comes out differently here"):
        net.machines[A].complete(other, net.now, plan=net.present(A).plan.digest)
