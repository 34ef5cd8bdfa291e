"""Whole replica sets and what they protect, on three stages of two segments."""

from __future__ import annotations

from dataclasses import replace

import pytest

from p2ptrain import limits
from p2ptrain.agreement.view import View
from p2ptrain.errors import RemoteProtocolError
from p2ptrain.ids import DeviceId
from p2ptrain.planner.keepers import replica_keepers
from p2ptrain.planner.plan import StageShare
from p2ptrain.recovery.protection import (
    Protected,
    Provisional,
    Safeguards,
    is_kept_in_vain,
    protection,
)
from p2ptrain.recovery.replica_sets import ReplicaSets
from p2ptrain.training.messages import ReplicaStored, stamp_of
from tests.sim.plans import device, digest_of
from tests.sim.run_views import followed, staged_view

A, B, C, D = (device(index) for index in range(4))
VIEW = staged_view((A, 2), (B, 2), (C, 2))
SEGMENTS = range(6)
KEEPERS = {A: (4, 5), B: (0, 1), C: (2, 3)}


def stored(step: int, segment: int, view: View = VIEW, text: str = "") -> ReplicaStored:
    state = digest_of(text or f"{segment} at {step}")
    return ReplicaStored(stamp=stamp_of(view.plan), step=step, segment=segment, state=state)


def told(sets: ReplicaSets, step: int, keepers: dict[DeviceId, tuple[int, ...]] = KEEPERS) -> None:
    for keeper, segments in keepers.items():
        for segment in segments:
            sets.stored(stored(step, segment), keeper)


def begun(view: View = VIEW) -> ReplicaSets:
    sets = ReplicaSets()
    sets.begin(view)
    return sets


def test_set_is_whole_once_every_segment_is_elsewhere() -> None:
    sets = begun()
    assert (sets.whole_step(VIEW.members), sets.releasable_step()) == (0, 0)  # drawn
    told(sets, 10, {A: (4, 5), B: (0, 1), C: (2,)})
    assert sets.releasable_step() == 0
    sets.stored(stored(10, 3), B)  # its owner: not elsewhere
    assert sets.releasable_step() == 0
    sets.stored(stored(10, 3), C)
    assert (sets.releasable_step(), sets.keepers(10, 3)) == (10, (B, C))
    told(sets, 20, {A: (4, 5)})
    assert sets.releasable_step() == 10  # the previous one until the next is whole
    sets.forget_before(10)
    assert sets.keepers(10, 3) == (B, C)


def test_copy_on_a_member_that_is_away_does_not_protect() -> None:
    sets = begun()
    told(sets, 10)
    assert sets.whole_step({A, B}) == 0
    assert sets.releasable_step() == 10


def test_copies_of_strangers_and_of_other_states_do_not_count() -> None:
    sets = begun()
    told(sets, 10)
    sets.stored(stored(20, 0), D)
    assert sets.keepers(20, 0) == ()
    assert sets.releasable_step() == 10
    sets.stored(stored(10, 0, text="other bits"), C)
    assert sets.releasable_step() == 0  # which of the two is right?
    with pytest.raises(RemoteProtocolError, match="not there"):
        sets.stored(stored(10, 6), C)


def test_resumed_session_is_whole_only_with_its_first_set() -> None:
    sets = begun(replace(VIEW, resume_step=40))
    assert sets.releasable_step() is None
    told(sets, 40)
    assert sets.releasable_step() == 40


def test_only_a_set_made_in_the_present_view_counts() -> None:
    sets = begun()
    told(sets, 10)
    view = followed(VIEW, (A, 2), (B, 4), resume_step=15)
    sets.begin(view)
    keepers = {A: (2, 3, 4, 5), B: (0, 1)}
    told(sets, 10, keepers)  # keepers say again what they keep
    assert sets.releasable_step() is None
    assert sets.keepers(10, 0) == (B,)
    told(sets, 20, keepers)
    assert sets.whole_step(view.members) == 20


def known(**changes: object) -> Safeguards:
    good = Safeguards(
        present=(A, B, C), whole_step=10, data_copies=(A, C), log_full=False, record_count=10,
        newest_step=15, replicated_step=15,
    )  # fmt: skip
    return replace(good, **changes)  # type: ignore[arg-type]  # by field name


PLAN = replace(VIEW.plan, replicas=(C, A, B))


def test_everything_in_place_protects() -> None:
    assert protection(PLAN, known()) == Protected(replica_step=10)
    alone = replace(PLAN, keep_data_here=True, holders=(PLAN.home,))
    assert protection(alone, known(data_copies=())) == Protected(replica_step=10)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"present": (A,)}, "this device trains alone"),
        ({"whole_step": None}, "the next replica set is not yet whole"),
        ({"data_copies": (A, D)}, "the run's data has no second copy yet"),
        ({"log_full": True}, "a log of sent tensors has reached its bound"),
        ({"record_count": limits.STEP_RECORDS_MAX + 1}, "more steps since the last replica set "
         "than can be replayed"),
        ({"replicated_step": 14}, "step 15 is recorded on one device only"),
    ],
)  # fmt: skip
def test_each_weakness_makes_steps_provisional(changes: dict[str, object], reason: str) -> None:
    assert protection(PLAN, known(**changes)) == Provisional(reason=reason)


def test_stage_without_a_keeper_makes_steps_provisional() -> None:
    lone = replace(PLAN, replicas=(C, None, B))
    assert protection(lone, known()) == Provisional(reason="no other device keeps a replica")


def shared_view(*stages: tuple[DeviceId, ...]) -> View:
    """Of two segments each; several devices of a stage are replicas."""
    base = staged_view(*((devices[0], 2) for devices in stages))
    made = tuple(
        replace(
            stage, split="replicas",
            shares=tuple(
                StageShare(device=d, weight=1, step_compute_ns=1, memory_bytes=1) for d in devices
            ),
        ) if len(devices) > 1 else stage
        for stage, devices in zip(base.plan.stages, stages, strict=True)
    )  # fmt: skip
    members = tuple(sorted({each for devices in stages for each in devices}))
    keepers = replica_keepers(made, members)
    return replace(base, plan=replace(base.plan, stages=made, members=members, replicas=keepers))


def test_siblings_need_no_copy_of_what_each_of_them_has() -> None:
    sets, view = ReplicaSets(), shared_view((A, B), (C,))
    sets.begin(view)
    assert view.plan.replicas == (None, A)
    assert sets.whole_step((A, B, C)) == 0
    for segment in (2, 3):
        sets.stored(stored(7, segment, view), A)
    assert sets.whole_step((A, B, C)) == 7
    assert sets.whole_step((A, C)) is None, "the last one of its stage may be lost next"
    safe = known(present=(A, B, C), whole_step=7)
    assert protection(view.plan, safe) == Protected(replica_step=7)


def test_who_leaves_replicas_keeps_what_it_has_until_a_later_set_is_whole() -> None:
    view = replace(shared_view((A, B), (C,)), resume_step=8)
    assert view.plan.replicas == (None, A)
    held = {step: is_kept_in_vain(view, step) for step in (None, 7, 8)}
    assert held == {None: False, 7: False, 8: True}


@pytest.mark.parametrize("keepers", [(), (None, None), (B, None)])
def test_nothing_is_kept_for_a_set_that_nobody_will_make(
    keepers: tuple[DeviceId | None, ...],
) -> None:
    view = staged_view((A, 2), (B, 2))
    alone = replace(view, plan=replace(view.plan, replicas=keepers))
    assert is_kept_in_vain(alone, None)


def test_where_every_stage_has_siblings_the_newest_step_is_whole() -> None:
    sets, view = ReplicaSets(), shared_view((A, B), (C, D))
    sets.begin(view)
    sets.committed(12)
    sets.committed(11)
    assert (sets.whole_step((A, B, C, D)), sets.releasable_step()) == (12, 12)
    assert sets.whole_step((A, B, D)) is None
    sets.begin(replace(view, resume_step=4, records=()))
    assert sets.releasable_step() == 4


def test_of_tensor_shards_a_set_is_whole_once_two_keep_it() -> None:
    """With any one of them a slice is lost, and perhaps a copy."""
    shared = shared_view((A, B, C))
    (stage,) = shared.plan.stages
    stage = replace(stage, split="tensor")
    members = shared.members
    keepers = replica_keepers((stage,), members)
    view = replace(shared, plan=replace(shared.plan, stages=(stage,), replicas=keepers))
    assert keepers == (B,)
    sets = begun(view)
    assert sets.whole_step(members) == 0
    for segment in stage.segments:
        sets.stored(stored(9, segment, view), A)
        assert sets.releasable_step() == 0
    for segment in stage.segments:
        sets.stored(stored(9, segment, view), B)
    assert sets.releasable_step() == sets.whole_step(members) == 9
    assert sets.whole_step((A, C)) == 0
    safe = known(present=members, whole_step=9)
    assert protection(view.plan, safe) == Protected(replica_step=9)


def test_shards_that_were_cut_anew_are_protected_by_a_set_of_their_own_only() -> None:
    """Steps of before were made by others, so older sets are of no use after the next one."""
    shared = shared_view((A, B))
    (stage,) = shared.plan.stages
    stage = replace(stage, split="tensor")
    keepers = replica_keepers((stage,), shared.members)
    plan = replace(shared.plan, stages=(stage,), replicas=keepers)
    view = replace(shared, plan=plan, resume_step=9, exact_from=9)
    sets = begun(view)
    for step in (4, 12):
        assert sets.whole_step((A, B)) is None
        safe = known(present=(A, B), whole_step=sets.whole_step((A, B)), data_copies=(A, B))
        assert protection(plan, safe) == Provisional(reason="the next replica set is not yet whole")
        for keeper in (A, B):
            for segment in stage.segments:
                sets.stored(stored(step, segment, view), keeper)
    assert sets.whole_step((A, B)) == 12
    assert sets.whole_step((A,)) is None
