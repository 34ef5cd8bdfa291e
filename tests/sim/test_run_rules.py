"""One story for each rule of commit and recovery, told by hand."""

from __future__ import annotations

import pytest

from p2ptrain.agreement.run_events import Stance
from p2ptrain.agreement.run_rules import Rules
from p2ptrain.agreement.view import View
from p2ptrain.ids import DeviceId
from p2ptrain.recovery.protection import Protected, Provisional
from p2ptrain.recovery.restoration import Replay
from tests.sim.checkers import Violation
from tests.sim.plans import device
from tests.sim.run_mutations import TrustDisk
from tests.sim.run_node import RunNode
from tests.sim.run_scenario import check_stuck, force
from tests.sim.run_world import RunWorld, Shape

A, B, C, D, E = (device(index) for index in range(5))


def world_of(*stages: int, seed: int = 1, rules: Rules | None = None, **shape: object) -> RunWorld:
    world = RunWorld(seed=seed, rules=rules, shape=Shape(stages=stages, **shape))  # type: ignore[arg-type]
    world.checker.check_every_claim = True
    return world


def commits(world: RunWorld, count: int, within_s: float = 60.0) -> None:
    """So many further steps are committed."""
    goal = world.checker.reference.newest + count
    assert world.run(within_s, until=lambda: world.checker.reference.newest >= goal)


def reaches(world: RunWorld, number: int, within_s: float = 20.0) -> View:
    """Everybody who is up knows a view of at least this number; gives the newest."""

    def known() -> bool:
        views = [node.machine.view for node in world.nodes.values() if node.up]
        return all(view is not None and view.number >= number for view in views)

    assert world.run(within_s, until=known)
    view = world.newest_view()
    assert view is not None
    return view


def replays(view: View) -> tuple[Replay, ...]:
    assert view.restoration is not None
    return view.restoration.replays


def protected(world: RunWorld, owner: DeviceId = A) -> bool:
    return isinstance(world.nodes[owner].protection(), Protected)


def first_logged(node: RunNode) -> int:
    return min(held.first_step for held in node.stage.log.inventory())


def updates(world: RunWorld, owner: DeviceId) -> list[int]:
    return sorted(step for device, _, _, step in world.checker.applied if device == owner)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("victim", [A, B, C], ids=["first", "middle", "last"])
def test_rule_1_nobody_rolls_back(victim: DeviceId, seed: int) -> None:
    """Survivors make each update once, whenever the loss comes; the newest record is kept."""
    world = world_of(2, 1, 2, seed=seed, reserves=1, ties=((0, 4),))
    commits(world, 9)
    world.run(world.rng.uniform(0.0, 0.4))
    newest = max(node.machine.statistics().newest_step for node in world.nodes.values())
    world.crash(world.nodes[victim])
    view = reaches(world, 2)
    assert view.resume_step >= newest - 1
    commits(world, 5)
    for survivor in {A, B, C} - {victim}:
        made = updates(world, survivor)
        assert made == list(range(1, made[-1] + 1))  # each once: the checker refuses a second
        assert made[-1] >= view.resume_step + 4


def test_rule_1_promise_fences_and_tells_the_newest_record() -> None:
    world = world_of(1, 1, 1, reserves=1)
    commits(world, 5)
    world.crash(world.nodes[B])
    assert world.run(10.0, until=lambda: world.nodes[A].machine.promised)
    before = world.checker.reference.newest
    view = reaches(world, 2)
    assert world.checker.reference.newest == max(before, view.resume_step)
    assert view.records[-1].step == view.resume_step


def becomes_protected(world: RunWorld, owner: DeviceId = A) -> bool:
    """Between a step and its acknowledgement elsewhere it is not, so this may take a moment."""
    return world.run(10.0, until=lambda: protected(world, owner))


def test_rule_2_lone_survivor_is_provisional_and_protected_again_with_company() -> None:
    world = world_of(1, 1, replica_every=3)
    commits(world, 4)
    assert becomes_protected(world)
    world.crash(world.nodes[B])
    reaches(world, 2)
    commits(world, 3)
    assert world.nodes[A].protection() == Provisional(reason="this device trains alone")
    world.start(world.nodes[B])
    reaches(world, 3)
    assert isinstance(world.nodes[A].protection(), Provisional)
    commits(world, 8)
    assert becomes_protected(world)


def test_rule_2_and_4_after_a_replay_a_new_set_and_a_second_data_copy_protect() -> None:
    world = world_of(1, 1, 1, reserves=1, replica_every=5)
    commits(world, 7)
    assert becomes_protected(world, B)
    world.crash(world.nodes[A])  # the home peer, which holds the data
    view = reaches(world, 2)
    assert view.plan.home == D  # the second copy was with the member without a stage
    assert len(view.plan.holders) == 2
    verdict = world.nodes[B].protection()
    assert verdict == Provisional(reason="the next replica set is not yet whole")
    commits(world, 8)
    assert becomes_protected(world, B)
    assert world.nodes[view.plan.holders[1]].disk.has_data


def test_rule_3_logs_stay_until_the_whole_set_is_elsewhere() -> None:
    world = world_of(1, 1, 1, reserves=1, replica_every=4)
    world.train_until(6)
    world.run(5.0)
    assert first_logged(world.nodes[B]) == 5  # the set of step 4 is whole
    world.corruption = 1.0  # nothing that arrives can be kept
    world.train_until(11)
    world.run(8.0)
    assert world.checker.reference.newest == 11
    for node in world.nodes.values():
        assert node.stage.sets.releasable_step() == 4
        assert node.machine.records[0].step == 4
        assert any(step == 4 for _, step in node.disk.replicas)
    assert first_logged(world.nodes[B]) == 5
    world.corruption = 0.0
    world.run(5.0)
    assert first_logged(world.nodes[B]) == 9
    assert all(step == 8 for node in world.nodes.values() for _, step in node.disk.replicas)


@pytest.mark.parametrize("victim", [A, B, C, D], ids=["first", "second", "third", "last"])
def test_rule_4_only_the_lost_stage_is_replayed_from_its_newest_replica(victim: DeviceId) -> None:
    world = world_of(2, 2, 2, 2, reserves=1, replica_every=5, ties=((0, 7),))
    commits(world, 13)
    world.run(0.5)
    lost = world.first.plan.stages[world.first.plan.members.index(victim)]
    world.crash(world.nodes[victim])
    view = reaches(world, 2)
    (replay,) = replays(view)
    assert list(replay.span.segments) == list(lost.segments)
    assert (replay.step, replay.replayer) == (10, E)
    commits(world, 3)
    assert world.replay_count == 1
    assert updates(world, E)[0] == view.resume_step + 1  # what it replayed, it did not make again


def test_rule_5_logs_hold_across_views_and_moved_cuts() -> None:
    world = world_of(1, 1, 1, 1, replica_every=4)
    commits(world, 6)
    world.leave(world.nodes[B])  # its segment goes to a neighbour
    moved = reaches(world, 2)
    assert replays(moved) == ()
    assert len(moved.plan.stages) == 3
    before = [held for held in world.nodes[D].stage.log.inventory() if held.kind == "cotangent"]
    assert before[0].first_step <= moved.resume_step < before[0].last_step + 2
    commits(world, 8)
    world.run(0.5)
    taker = next(stage for stage in moved.plan.stages if stage.segment_count == 2)
    world.crash(world.nodes[taker.device])
    view = reaches(world, 3)
    (replay,) = replays(view)
    assert replay.span.count == 2
    assert replay.step >= moved.resume_step  # of the set that was made after the move
    commits(world, 3)


def test_rule_6_second_loss_pauses_and_names_whose_return_suffices() -> None:
    world = world_of(1, 1, 1, reserves=2, replica_every=5)
    commits(world, 7)
    world.run(0.5)
    keeper = world.first.plan.replicas[1]
    assert keeper is not None
    world.crash(world.nodes[B])
    world.crash(world.nodes[keeper])
    world.run(12.0)
    left = [node for node in world.nodes.values() if node.up]
    paused = [node.machine.standing for node in left if node.machine.standing.reason]
    assert paused
    assert all("is lost: it takes" in standing.reason for standing in paused)
    assert any(B[:8] in standing.reason for standing in paused)
    steps = world.checker.reference.newest
    world.start(world.nodes[keeper])  # its disk has the replica
    commits(world, 3)
    assert world.checker.reference.newest >= steps + 3
    assert world.newest_view().lineage == 0  # type: ignore[union-attr]


def test_live_stage_without_logs_is_replayed_with_the_lost_one_beside_it() -> None:
    world = world_of(1, 1, 1, reserves=2, replica_every=5)
    commits(world, 7)
    world.run(0.5)
    newest = world.checker.reference.newest
    world.nodes[A].stage.log.release(newest)
    world.crash(world.nodes[B])
    commits(world, 3)
    view = world.newest_view()
    assert view is not None
    assert (view.lineage, view.number) == (0, 2)
    assert view.restoration is not None
    (replay,) = view.restoration.replays
    assert (replay.span.first, replay.span.count, replay.step) == (0, 2, 5)
    assert view.resume_step >= newest


def test_rule_6_forcing_falls_back_to_the_last_whole_set() -> None:
    world = world_of(1, 1, 1, reserves=2, replica_every=5)
    world.train_until(8)
    world.run(5.0)
    keeper = world.first.plan.replicas[1]
    assert keeper is not None
    logs = [world.nodes[each] for each in (A, C)]
    world.crash(world.nodes[B], disk=False)
    world.crash(world.nodes[keeper], disk=False)
    world.run(12.0)
    assert {node.machine.standing.stance for node in logs if node.up} <= {Stance.PAUSED}
    world.heal()
    world.train_until(100)
    check_stuck(world)
    assert force(world)
    commits(world, 3)
    assert world.newest_view().lineage == 1  # type: ignore[union-attr]
    assert world.checker.resumes[1, 1] == 0  # only those two had the segment after step 0


def test_rule_7_full_log_makes_steps_provisional_and_drops_nothing() -> None:
    world = world_of(1, 1, 1, reserves=1, replica_every=8, log_bytes_max=100)
    commits(world, 7)
    node = world.nodes[B]
    assert node.stage.log.full
    assert node.protection() == Provisional(reason="a log of sent tensors has reached its bound")
    assert first_logged(node) == 1
    commits(world, 2)
    assert world.run(5.0, until=lambda: not node.stage.log.full)  # the set of step 8 is whole
    assert world.run(5.0, until=lambda: protected(world, B))


def test_rule_8_returning_peer_discards_what_it_had() -> None:
    """Its states and records belong to steps that were made again without it."""
    world = world_of(1, 1, 1, reserves=1, replica_every=5)
    commits(world, 6)
    world.partition({each: int(each == B) for each in world.nodes})
    reaches_without(world, B, 2)
    commits(world, 6)
    old = dict(world.nodes[B].stage.states)
    assert world.nodes[B].machine.standing.stance is Stance.PAUSED
    assert "no quorum (1 of 4" in world.nodes[B].machine.standing.reason
    world.partition(dict.fromkeys(world.nodes, 0))
    view = reaches(world, 3)
    assert B in view.members
    assert all(source.device != B for source in view.restoration.sources)  # type: ignore[union-attr]
    commits(world, 3)
    assert world.nodes[B].machine.records[-1].step > max(step for step, _ in old.values())


def reaches_without(world: RunWorld, absent: DeviceId, number: int) -> None:
    others = [node for each, node in world.nodes.items() if each != absent]
    assert world.run(
        20.0, until=lambda: all(n.machine.view and n.machine.view.number >= number for n in others)
    )


def test_graceful_leave_loses_no_step_and_replays_nothing() -> None:
    world = world_of(1, 2, 1, reserves=1)
    commits(world, 5)
    world.leave(world.nodes[B])
    view = reaches(world, 2)
    assert B not in view.members
    assert replays(view) == ()
    commits(world, 5)
    assert world.replay_count == 0


def test_joiner_is_admitted_at_a_commit_and_the_steps_go_on() -> None:
    world = world_of(1, 1, outsiders=1)
    world.run(5.0, until=lambda: world.agreed())
    assert world.newest_view().members == (A, B, C)  # type: ignore[union-attr]
    commits(world, 5)
    made = updates(world, A)
    assert made == list(range(1, made[-1] + 1))


def test_of_two_devices_home_goes_on_alone_and_the_other_pauses() -> None:
    world = world_of(1, 1)
    commits(world, 4)
    world.partition({A: 0, B: 1})
    commits(world, 4)
    assert world.nodes[A].machine.view.members == (A,)  # type: ignore[union-attr]
    standing = world.nodes[B].machine.standing
    assert standing.stance is Stance.PAUSED
    assert standing.missing == (A,)


def test_data_that_stays_pauses_the_run_until_its_home_returns() -> None:
    world = world_of(1, 1, 1, keep_data_here=True, replica_every=3)
    commits(world, 5)
    world.crash(world.nodes[A])
    world.run(10.0)
    paused = world.checker.reference.newest
    assert world.nodes[B].machine.standing.reason == "the data is not here"
    world.run(10.0)
    assert world.checker.reference.newest == paused
    world.start(world.nodes[A])
    commits(world, 4)
    assert world.newest_view().plan.home == A  # type: ignore[union-attr]


def test_rule_1_who_kept_records_in_memory_returns_as_a_new_member() -> None:
    world = world_of(1, 1, 1, reserves=1, slow_disks=frozenset({3}))
    commits(world, 5)
    journal = world.nodes[D].machine.view
    world.crash(world.nodes[D])
    world.start(world.nodes[D])
    assert world.nodes[D].machine.view == journal  # it knows the run
    assert world.nodes[D].machine.records == ()
    assert world.nodes[D].machine.standing.stance is Stance.ABSTAINING
    view = reaches(world, 2)
    assert D in view.members
    commits(world, 3)
    assert world.nodes[D].machine.standing.stance is Stance.MEMBER
    assert world.nodes[D].machine.records[-1].step >= view.resume_step


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("stages", [(1, 1), (1, 1, 1)], ids=["two", "three"])
def test_rule_1_done_that_was_lost_to_one_member_holds_nobody_up(
    stages: tuple[int, ...], seed: int
) -> None:
    """Who has them all records the step, and the others, the tie-breaker too, go by that."""
    world = world_of(*stages, seed=seed)
    world.done_loss = 1.0
    commits(world, 12)
    assert world.newest_view() == world.first


def disk_goes_back(world: RunWorld) -> None:
    """C accepts what A or B decides, then forgets it. Whoever decided is slow to say so, and the
    other one asks C for its vote."""
    commits(world, 3)
    image = world.nodes[C].disk.copy()
    world.deaf = {(A, B), (B, A)}
    world.refresh()
    ahead = [world.nodes[A], world.nodes[B]]
    assert world.run(20.0, until=lambda: any(n.machine.statistics().view == 2 for n in ahead))
    ahead.sort(key=lambda node: node.machine.statistics().view)
    assert ahead[0].machine.statistics().view == 1
    ahead[1].slowness_s = 2.5
    world.crash_to(world.nodes[C], image)
    world.start(world.nodes[C])
    world.run(12.0)
    ahead[1].slowness_s = 0.0


@pytest.mark.parametrize("seed", range(4))
def test_old_disk_has_no_vote_where_it_had_voted(seed: int) -> None:
    world = world_of(1, 1, 1, seed=seed)
    disk_goes_back(world)
    world.heal()
    commits(world, 5)
    assert world.run(20.0, until=world.agreed)
    assert {node.machine.standing.stance for node in world.nodes.values()} == {Stance.MEMBER}


def test_old_disk_that_is_trusted_decides_another_view() -> None:
    with pytest.raises(Violation, match="two views are decided"):
        disk_goes_back(world_of(1, 1, 1, rules=TrustDisk()))
