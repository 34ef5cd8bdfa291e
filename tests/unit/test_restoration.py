"""What is restored from where: tables of inventories over a chain of four stages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

from p2ptrain import limits
from p2ptrain.ids import DeviceId
from p2ptrain.planner.plan import Plan, StageShare
from p2ptrain.recovery.inventory import (
    HeldLog,
    HeldState,
    Inventory,
    LiveShard,
    LiveStage,
    LogKind,
    SegmentSpan,
)
from p2ptrain.recovery.planning import Losses, Unrecoverable, last_whole_set, restoration
from p2ptrain.recovery.restoration import Replay, Restoration, SpanAt, TiedAt
from p2ptrain.runtime.views.restoring import replay_limit_s
from p2ptrain.units import NS_PER_S
from tests.sim.plans import device
from tests.sim.run_views import make_step, staged_plan, staged_view

A, B, C, D, E = (device(index) for index in range(5))
BASE = staged_view((A, 2), (B, 2), (C, 2), (D, 2), reserves=(E,))
BASE = replace(BASE, plan=replace(BASE.plan, replicas=(C, D, A, B)))
ALL = (A, B, C, D, E)
STEP, REPLICA = 15, 10
RECORDS = tuple(make_step(step) for step in range(1, STEP + 1))


def span(first: int, count: int = 2) -> SegmentSpan:
    return SegmentSpan(first=first, count=count)


def log(kind: LogKind, segment: int, first: int = 1, last: int = STEP) -> HeldLog:
    return HeldLog(kind=kind, segment=segment, first_step=first, last_step=last)


def member(
    first: int | None, *, keeps: tuple[int, ...] = (), step: int = STEP, data: bool = False
) -> Inventory:
    """A stage of two segments with its logs since the replicas, which it keeps of others."""
    logs = () if first is None else (
        log("activation", first + 1, REPLICA + 1), log("cotangent", first - 1, REPLICA + 1),
        log("tied", first, REPLICA + 1),
    )  # fmt: skip
    return Inventory(
        live=None if first is None else LiveStage(
            span=span(first), step=step, gradients_complete=step < STEP
        ),
        states=tuple(HeldState(span=span(at), step=REPLICA) for at in keeps),
        logs=logs, has_data=data, linked=ALL,
    )  # fmt: skip


WHOLE: Mapping[DeviceId, Inventory] = {
    A: member(0, keeps=(4,), data=True), B: member(2, keeps=(6,)), C: member(4, keeps=(0,)),
    D: member(6, keeps=(2,), data=True), E: member(None),
}  # fmt: skip


def without(*gone: DeviceId, **changes: Inventory) -> dict[DeviceId, Inventory]:
    changed = {device("abcde".index(name)): held for name, held in changes.items()}
    return {each: held for each, held in {**WHOLE, **changed}.items() if each not in gone}


def plan_of(*stages: tuple[DeviceId, int]) -> Plan:
    return staged_plan(BASE.plan, *stages, replicas=())


def restored(
    promises: Mapping[DeviceId, Inventory], *stages: tuple[DeviceId, int],
    ties: tuple[tuple[int, ...], ...] = (), resume_step: int = STEP, first_record: int = 1,
) -> Restoration | Unrecoverable:  # fmt: skip
    return restoration(
        Losses(
            base=BASE, plan=plan_of(*stages), promises=promises, resume_step=resume_step,
            records=RECORDS[first_record - 1 : resume_step], tie_segments=ties,
        )
    )  # fmt: skip


def at(first: int, count: int, owner: DeviceId) -> SpanAt:
    return SpanAt(span=span(first, count), device=owner)


def test_nothing_lost_needs_no_replay() -> None:
    found = restored(WHOLE, (A, 2), (B, 2), (C, 2), (D, 2))
    assert found == Restoration(
        replays=(), sources=(at(0, 2, A), at(2, 2, B), at(4, 2, C), at(6, 2, D))
    )


def test_stage_that_has_not_applied_the_step_is_live_if_its_gradients_are_complete() -> None:
    late = member(4, keeps=(0,), step=STEP - 1)
    found = restored(without(c=late), (A, 2), (B, 2), (C, 2), (D, 2))
    assert isinstance(found, Restoration)
    assert found.replays == ()
    assert late.live is not None
    torn = replace(late, live=replace(late.live, gradients_complete=False))
    found = restored(without(c=torn), (A, 2), (B, 2), (C, 2), (D, 2))
    assert isinstance(found, Restoration)
    assert [replay.span for replay in found.replays] == [span(4)]


def test_moved_segments_come_from_whoever_has_them() -> None:
    found = restored(WHOLE, (A, 4), (C, 2), (D, 2))  # b leaves and still answers
    assert isinstance(found, Restoration)
    assert found.replays == ()
    assert found.sources == (at(0, 2, A), at(2, 2, B), at(4, 2, C), at(6, 2, D))


def test_lost_middle_stage_is_replayed_whole_by_its_successor() -> None:
    found = restored(without(B), (A, 2), (E, 2), (C, 2), (D, 2), ties=((0, 3), (1, 5)))
    assert isinstance(found, Restoration)
    assert found.replays == (
        Replay(
            span=span(2), step=REPLICA, replayer=E, replicas=(at(2, 2, D),), activations_from=A,
            cotangents_from=C, tied_from=(TiedAt(segment=0, device=A),), data_from=None,
        ),
    )  # fmt: skip
    assert found.sources == (at(0, 2, A), at(2, 2, E), at(4, 2, C), at(6, 2, D))


@pytest.mark.parametrize(
    ("gone", "stages", "expected"),
    [
        (A, ((E, 2), (B, 2), (C, 2), (D, 2)), (0, E, None, B, D)),
        (D, ((A, 2), (B, 2), (C, 4)), (6, C, C, None, A)),
    ],
    ids=["first", "last"],
)
def test_ends_of_the_model_are_fed_by_a_data_holder(
    gone: DeviceId, stages: tuple[tuple[DeviceId, int], ...],
    expected: tuple[int, DeviceId, DeviceId | None, DeviceId | None, DeviceId],
) -> None:  # fmt: skip
    found = restored(without(gone), *stages)
    assert isinstance(found, Restoration)
    (replay,) = found.replays
    first, replayer, activations, cotangents, data = expected
    assert (replay.span.first, replay.replayer) == (first, replayer)
    assert (replay.activations_from, replay.cotangents_from) == (activations, cotangents)
    assert replay.data_from == data


def test_neighbouring_losses_are_one_replay_and_others_are_two() -> None:
    kept = member(None, keeps=(2, 4))
    found = restored(without(B, C, e=kept), (A, 2), (E, 4), (D, 2))
    assert isinstance(found, Restoration)
    assert [replay.span for replay in found.replays] == [span(2, 4)]
    assert found.replays[0].replicas == (at(2, 4, E),)  # its own copies before others'
    assert found.replays[0].cuts == (3,)  # there was a link between the two that are lost
    found = restored(without(A, C, e=member(None, keeps=(0, 4))), (E, 2), (B, 4), (D, 2))
    assert isinstance(found, Restoration)
    assert [(r.span, r.replayer) for r in found.replays] == [(span(0), E), (span(4), B)]
    assert [replay.cuts for replay in found.replays] == [(), ()]


def test_young_run_is_drawn_and_replayed_from_its_beginning() -> None:
    young = {
        each: replace(
            held, states=(), live=None if held.live is None else replace(held.live, step=3),
            logs=tuple(replace(each_log, first_step=1, last_step=3) for each_log in held.logs),
        )
        for each, held in without(B).items()
    }  # fmt: skip
    found = restored(young, (A, 2), (E, 2), (C, 2), (D, 2), resume_step=3)
    assert isinstance(found, Restoration)
    assert (found.replays[0].step, found.replays[0].replicas) == (0, ())
    begun = restored(without(*ALL), (A, 8), resume_step=0)
    assert isinstance(begun, Restoration)
    assert (begun.replays[0].span, begun.replays[0].data_from) == (span(0, 8), None)


def test_replica_of_the_very_step_needs_no_logs() -> None:
    bare = {
        each: replace(held, logs=(), states=tuple(replace(s, step=STEP) for s in held.states))
        for each, held in without(B).items()
    }
    found = restored(bare, (A, 2), (E, 2), (C, 2), (D, 2))
    assert isinstance(found, Restoration)
    assert found.replays[0].activations_from is None


def test_older_replica_is_taken_where_the_newer_one_is_not_whole_or_not_logged() -> None:
    older = HeldState(span=span(2), step=8)
    newer = HeldState(span=span(2, 1), step=14)
    deep = tuple(replace(each, first_step=9) for each in WHOLE[A].logs)
    promises = without(
        B, a=replace(WHOLE[A], logs=deep), d=replace(WHOLE[D], states=(older, newer)),
        c=replace(WHOLE[C], logs=(log("cotangent", 3, 9),)),
    )  # fmt: skip
    found = restored(promises, (A, 2), (E, 2), (C, 2), (D, 2))
    assert isinstance(found, Restoration)
    assert found.replays[0].step == 8


MIDDLE = ((A, 2), (E, 2), (C, 2), (D, 2))
LACKING: dict[
    str,
    tuple[Mapping[DeviceId, Inventory], tuple[tuple[DeviceId, int], ...], tuple[DeviceId, ...]],
] = {
    "its only replica": (without(B, D), ((A, 2), (E, 2), (C, 4)), (B, D)),
    "the activations": (without(B, a=replace(WHOLE[A], logs=())), MIDDLE, (B,)),
    "a step of the cotangents": (
        without(B, c=replace(WHOLE[C], logs=(log("cotangent", 3, REPLICA + 2),))), MIDDLE, (B,),
    ),
    "a link to its replica": (without(B, e=replace(WHOLE[E], linked=(A, C))), MIDDLE, (B,)),
    "both replicas of two neighbours": (
        without(B, C, a=replace(WHOLE[A], states=()), d=replace(WHOLE[D], states=())),
        ((A, 2), (E, 4), (D, 2)), (B, C),
    ),
    "replicas here and there": (
        without(B, D, c=replace(WHOLE[C], logs=())), ((A, 2), (E, 2), (C, 4)), (B, D),
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", LACKING)
def test_run_pauses_and_names_who_would_help(what: str) -> None:
    promises, stages, needed = LACKING[what]
    found = restored(promises, *stages)
    assert isinstance(found, Unrecoverable)
    assert found.devices_needed == needed
    names = ", ".join(each[:8] for each in needed)
    assert f"is lost: it takes {names} back, or --force-view to go back to step" in found.sentence


def test_missing_records_and_missing_data_stop_a_replay() -> None:
    stages = ((A, 2), (E, 2), (C, 2), (D, 2))
    assert isinstance(restored(without(B), *stages, first_record=12), Unrecoverable)
    assert isinstance(restored(without(B), *stages, first_record=11), Restoration)
    dry = without(A, d=replace(WHOLE[D], has_data=False))
    assert isinstance(restored(dry, (E, 2), (B, 2), (C, 2), (D, 2)), Unrecoverable)


def test_missing_tied_gradients_stop_a_replay() -> None:
    silent = replace(WHOLE[D], logs=tuple(x for x in WHOLE[D].logs if x.kind != "tied"))
    stages = ((A, 2), (E, 2), (C, 2), (D, 2))
    assert isinstance(restored(without(B, d=silent), *stages, ties=((2, 6),)), Unrecoverable)
    assert isinstance(restored(without(B, d=silent), *stages), Restoration)


def test_restarted_owner_names_the_keeper_of_its_replica() -> None:
    promises = without(D, b=replace(WHOLE[B], live=None, logs=()))
    found = restored(promises, (A, 2), (B, 2), (C, 4))
    assert isinstance(found, Unrecoverable)
    assert D in found.devices_needed


def test_last_whole_set_is_what_forcing_goes_back_to() -> None:
    assert last_whole_set(WHOLE, 8) == REPLICA
    assert last_whole_set(without(D), 8) == 0


def shared_log(kind: LogKind, segment: int, first: int, last: int, *own: int) -> HeldLog:
    return HeldLog(
        kind=kind, segment=segment, first_step=first, last_step=last, microbatches=tuple(own)
    )


EVERY = tuple(range(BASE.contract.microbatches))
EVEN, ODD = EVERY[::2], EVERY[1::2]


def test_a_stage_beside_replicas_is_replayed_from_the_logs_of_each_of_them() -> None:
    """A and E shared the stage before the lost one, and changed their shares once."""
    change = REPLICA + 3
    logs = (
        shared_log("activation", 1, REPLICA + 1, change, *EVEN),
        shared_log("activation", 1, change + 1, STEP, *ODD),
    )
    others = (
        shared_log("activation", 1, REPLICA + 1, change, *ODD),
        shared_log("activation", 1, change + 1, STEP, *EVEN),
    )
    promises = without(B, a=replace(WHOLE[A], logs=logs), e=replace(WHOLE[E], logs=others))
    found = restored(promises, (A, 2), (E, 2), (C, 2), (D, 2))
    assert isinstance(found, Restoration)
    (replay,) = found.replays
    assert (replay.step, replay.activations_from, replay.cotangents_from) == (REPLICA, None, C)
    for step in range(REPLICA + 1, STEP + 1):
        first, second = (EVEN, ODD) if step <= change else (ODD, EVEN)
        assert replay.givers("activation", step) == ((A, first), (E, second))
        assert replay.givers("cotangent", step) == ((C, ()),)
    assert len(replay.parts) == 4
    gap = without(
        B, a=replace(WHOLE[A], logs=logs), e=replace(WHOLE[E], logs=others[:1])
    )  # fmt: skip
    assert isinstance(restored(gap, (A, 2), (E, 2), (C, 2), (D, 2)), Unrecoverable)


def test_replay_does_not_reach_back_to_where_several_shared_the_stage() -> None:
    """They had added up in another order: one peer would not get their bits."""
    stages = ((A, 2), (E, 2), (C, 2), (D, 2))
    lost = Losses(
        base=replace(BASE, exact_from=REPLICA, resume_step=REPLICA), plan=plan_of(*stages),
        promises=without(B), resume_step=STEP, records=RECORDS[:STEP],
    )  # fmt: skip
    assert isinstance(restoration(lost), Restoration)
    later = replace(lost.base, exact_from=REPLICA + 1, resume_step=REPLICA + 1)
    assert isinstance(restoration(replace(lost, base=later)), Unrecoverable)
    shares = tuple(
        StageShare(device=d, weight=1, step_compute_ns=1, memory_bytes=1) for d in (B, E)
    )
    together = replace(BASE.plan.stages[1], split="replicas", shares=shares)
    plan = replace(
        BASE.plan, stages=(BASE.plan.stages[0], together, *BASE.plan.stages[2:]), replicas=()
    )
    both_gone = replace(
        lost,
        base=replace(BASE, plan=plan),
        promises=without(B, E),
        plan=plan_of((A, 2), (C, 4), (D, 2)),
    )
    refused = restoration(both_gone)
    assert isinstance(refused, Unrecoverable)
    assert refused.devices_needed == (B,)


def widened(
    promises: Mapping[DeviceId, Inventory], *stages: tuple[DeviceId, int],
    ties: tuple[tuple[int, ...], ...] = (), first_record: int = REPLICA + 1,
) -> Restoration | Unrecoverable:  # fmt: skip
    """With live segments that may be made again, once it has failed without."""
    lost = Losses(
        base=BASE, plan=plan_of(*stages), promises=promises, resume_step=STEP,
        records=RECORDS[first_record - 1 :], tie_segments=ties,
    )  # fmt: skip
    assert isinstance(restoration(lost), Unrecoverable)
    return restoration(replace(lost, remakes_live=True))


def unlogged(held: Inventory, *kinds: LogKind) -> Inventory:
    return replace(held, logs=tuple(each for each in held.logs if each.kind not in kinds))


def test_live_stage_without_logs_is_replayed_with_the_lost_one_beside_it() -> None:
    before = without(B, a=unlogged(WHOLE[A], "activation"))
    found = widened(before, *MIDDLE)
    assert isinstance(found, Restoration)
    assert found.replays == (
        Replay(
            span=span(0, 4), step=REPLICA, replayer=A, replicas=(at(0, 2, C), at(2, 2, D)),
            activations_from=None, cotangents_from=C, tied_from=(), data_from=A, cuts=(1,),
        ),
    )  # fmt: skip
    assert found.sources == (at(0, 4, A), at(4, 2, C), at(6, 2, D))
    after = without(B, c=unlogged(WHOLE[C], "cotangent"))
    found = widened(after, *MIDDLE)
    assert isinstance(found, Restoration)
    (replay,) = found.replays
    assert (replay.span, replay.activations_from, replay.cotangents_from) == (span(2, 4), A, D)


def test_no_more_is_replayed_than_up_to_the_next_log() -> None:
    """Inside a live stage, too, where an earlier view had a cut there."""
    logs = (log("cotangent", 4, REPLICA + 1), *WHOLE[C].logs[:1])
    found = widened(without(B, c=replace(WHOLE[C], logs=logs)), *MIDDLE)
    assert isinstance(found, Restoration)
    assert [replay.span for replay in found.replays] == [span(2, 3)]
    assert found.sources == (at(0, 2, A), at(2, 3, E), at(5, 1, C), at(6, 2, D))


def test_whole_young_model_is_replayed_from_its_beginning_without_any_replica_or_log() -> None:
    bare = {each: replace(held, states=(), logs=()) for each, held in without(B).items()}
    assert isinstance(widened(bare, *MIDDLE), Unrecoverable)  # the first records are gone
    found = widened(bare, *MIDDLE, first_record=1)
    assert isinstance(found, Restoration)
    (replay,) = found.replays
    assert (replay.span, replay.step, replay.replayer) == (span(0, 8), 0, A)
    assert found.sources == (at(0, 8, A),)
    dry = {each: replace(held, has_data=False) for each, held in bare.items()}
    assert isinstance(widened(dry, *MIDDLE, first_record=1), Unrecoverable)


def test_wider_replay_begins_at_the_newest_step_of_which_all_of_it_is_kept() -> None:
    promises = without(B, a=unlogged(WHOLE[A], "activation"))
    promises[E] = replace(WHOLE[E], states=(HeldState(span=span(0, 3), step=STEP - 2),))
    found = widened(promises, *MIDDLE)
    assert isinstance(found, Restoration)
    assert [(replay.span, replay.step) for replay in found.replays] == [(span(0, 4), REPLICA)]
    promises[E] = replace(WHOLE[E], states=(HeldState(span=span(0, 4), step=STEP - 2),))
    found = widened(promises, *MIDDLE)
    assert isinstance(found, Restoration)
    assert [(replay.span, replay.step) for replay in found.replays] == [(span(0, 4), STEP - 2)]


def test_tied_copy_without_a_log_is_replayed_together_with_the_lost_one() -> None:
    promises = without(B, a=member(0, keeps=(4, 6), data=True), d=unlogged(WHOLE[D], "tied"))
    found = widened(promises, *MIDDLE, ties=((2, 6),))
    assert isinstance(found, Restoration)
    (replay,) = found.replays
    assert (replay.span, replay.tied_from) == (span(2, 6), ())
    assert (replay.activations_from, replay.data_from) == (A, A)


def test_two_losses_are_one_replay_where_what_is_between_them_has_no_logs() -> None:
    promises = without(B, D, c=unlogged(WHOLE[C], "activation", "cotangent"))
    promises[E] = member(None, keeps=(2, 4))
    promises[A] = member(0, keeps=(4, 6), data=True)
    found = widened(promises, (A, 2), (E, 2), (C, 4))
    assert isinstance(found, Restoration)
    assert [(replay.span, replay.replayer) for replay in found.replays] == [(span(2, 6), E)]


def test_nothing_live_is_replayed_where_the_lost_can_be_without_it() -> None:
    lost = Losses(
        base=BASE, plan=plan_of(*MIDDLE), promises=without(B), resume_step=STEP, records=RECORDS
    )
    assert restoration(replace(lost, remakes_live=True)) == restoration(lost)


def sharded(*devices: DeviceId, weights: tuple[int, ...]) -> Plan:
    shares = tuple(
        StageShare(device=device, weight=weight, step_compute_ns=1, memory_bytes=1)
        for device, weight in zip(devices, weights, strict=True)
    )
    plan = plan_of((devices[0], 8))
    stage = replace(plan.stages[0], split="tensor", shares=shares)
    members = tuple(sorted({plan.home, *devices}))
    return replace(plan, stages=(stage,), members=members, replicas=(), holders=(plan.home,))


def shards_lost(**changes: object) -> Losses:
    """Of three tensor shards the last is gone; two keep everything."""
    keeper = Inventory(
        live=None, states=(HeldState(span=span(0, 8), step=REPLICA),), logs=(), has_data=True,
        linked=ALL,
    )  # fmt: skip
    base = replace(BASE, plan=sharded(A, B, C, weights=(3, 2, 1)))
    lost = Losses(
        base=base, plan=plan_of((B, 8)), promises={A: keeper, B: keeper}, records=RECORDS,
        resume_step=STEP,
    )  # fmt: skip
    return replace(lost, **changes)  # type: ignore[arg-type]  # fields by name


def test_shards_are_replayed_together_by_the_shares_that_had_made_the_steps() -> None:
    found = restoration(shards_lost())
    assert isinstance(found, Restoration)
    (replay,) = found.replays
    assert (replay.span, replay.step, replay.replayer) == (span(0, 8), REPLICA, B)
    assert (replay.shares, replay.data_from) == ((3, 2, 1), B)
    assert found.sources == (SpanAt(span=span(0, 8), device=B),)


def test_shards_of_a_step_that_is_kept_need_no_replay() -> None:
    found = restoration(shards_lost(resume_step=REPLICA, records=RECORDS[:REPLICA]))
    assert isinstance(found, Restoration)
    (replay,) = found.replays
    assert (replay.step, replay.shares) == (REPLICA, ())


def test_shards_do_not_replay_what_others_had_made() -> None:
    lost = shards_lost()
    base = replace(lost.base, exact_from=REPLICA + 1, resume_step=REPLICA + 1)
    assert isinstance(restoration(replace(lost, base=base)), Unrecoverable)


def test_a_loss_while_shards_are_replayed_takes_the_same_shares() -> None:
    first = restoration(shards_lost())
    assert isinstance(first, Restoration)
    base = replace(
        BASE, plan=sharded(A, B, weights=(1, 1)), exact_from=STEP, resume_step=STEP,
        restoration=first, records=RECORDS, previous=BASE.plan.digest,
    )  # fmt: skip
    again = restoration(shards_lost(base=base, plan=plan_of((A, 8))))
    assert isinstance(again, Restoration)
    (replay,) = again.replays
    assert (replay.step, replay.replayer, replay.shares) == (REPLICA, A, (3, 2, 1))


def shards_there(**changes: int) -> Losses:
    """All three shards are asked to go on as they are, after more steps than anybody could make
    again."""
    lost = shards_lost()
    base = replace(lost.base, exact_from=REPLICA + 1, resume_step=REPLICA + 1)
    shards = [
        LiveShard(weights=(3, 2, 1), rank=rank, step=STEP, gradients_complete=False)
        for rank in range(3)
    ]
    shards[2] = replace(shards[2], **changes)  # type: ignore[arg-type]  # fields by name
    promises = {
        each: replace(lost.promises[A], shard=shard)
        for each, shard in zip((A, B, C), shards, strict=True)
    }
    return replace(lost, base=base, plan=base.plan, promises=promises)


@pytest.mark.parametrize(
    "changes", [{}, {"step": STEP - 1, "gradients_complete": True}], ids=["applied", "to apply"]
)
def test_shards_that_all_stay_make_nothing_again(changes: dict[str, int]) -> None:
    whole = SpanAt(span=span(0, 8), device=A)
    assert restoration(shards_there(**changes)) == Restoration(replays=(), sources=(whole,))


@pytest.mark.parametrize("changes", [{"step": STEP - 1}, {"rank": 1}, {"step": STEP - 2}])
def test_a_shard_that_is_not_where_it_shall_be_is_lost(changes: dict[str, int]) -> None:
    assert isinstance(restoration(shards_there(**changes)), Unrecoverable)


def test_shards_that_are_cut_otherwise_do_not_stay() -> None:
    there = shards_there()
    plan = sharded(A, B, C, weights=(1, 1, 1))
    assert isinstance(restoration(replace(there, plan=plan)), Unrecoverable)
    base = replace(there.base, exact_from=0)
    found = restoration(replace(there, base=base, plan=plan))
    assert isinstance(found, Restoration)
    assert [replay.shares for replay in found.replays] == [(3, 2, 1)]


def test_who_waits_for_a_replay_of_shards_counts_every_shard() -> None:
    found = restoration(shards_lost())
    assert isinstance(found, Restoration)
    assert found.replayed_steps(STEP) == 3 * (STEP - REPLICA)
    assert Restoration(replays=(), sources=found.sources).replayed_steps(STEP) == 0
    plan = replace(plan_of((B, 8)), step_ns=NS_PER_S)
    view = replace(BASE, plan=plan, restoration=found, resume_step=STEP, records=RECORDS,
                   previous=BASE.plan.digest)  # fmt: skip
    assert replay_limit_s(view) == limits.REPLAY_PACE_MAX * 3 * (STEP - REPLICA)
    assert replay_limit_s(BASE) == 0.0, "a lineage begins without any"


def test_owner_of_private_data_replays_whatever_takes_its_labels() -> None:
    """It has come back without a state, and the stage before its last one is gone for good."""
    ends = {"private": True, "keep_data_here": True, "replicas": (), "members": (A, B, C)}
    stages = ((A, 2), (B, 2), (C, 2), (A, 2))
    owner = replace(member(None, keeps=(0, 6), data=True), logs=())
    found = restoration(
        Losses(
            base=replace(BASE, plan=staged_plan(BASE.plan, *stages, **ends)),
            plan=staged_plan(BASE.plan, (A, 2), (B, 4), (A, 2), **{**ends, "members": (A, B)}),
            promises={A: owner, B: member(2, keeps=(4,))}, resume_step=STEP, records=RECORDS,
        )
    )  # fmt: skip
    assert isinstance(found, Restoration)
    assert [(replay.span, replay.replayer) for replay in found.replays] == [
        (span(0), A), (span(4, 4), A)
    ]  # fmt: skip
    assert {replay.data_from for replay in found.replays} == {A}
    assert found.sources == (at(0, 2, A), at(2, 2, B), at(4, 4, A))
