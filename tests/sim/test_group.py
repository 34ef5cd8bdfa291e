"""Simulated groups: the rules hold for many seeds, and every broken rule is noticed."""

from __future__ import annotations

import re

import pytest

from p2ptrain.ids import DeviceId
from tests.sim.checkers import Violation
from tests.sim.mesh_scenario import run_mesh
from tests.sim.mutations import MESH_MUTATIONS, MUTATIONS
from tests.sim.run import main, replay_command
from tests.sim.scenario import run_seed
from tests.sim.world import Rules, World

SEEDS = 36
MUTATION_SEEDS = 40
MESH_MUTATION_SEEDS = 6


@pytest.mark.parametrize("first", range(0, SEEDS, 6))
def test_group_keeps_its_rules(first: int) -> None:
    decided = 0
    for seed in range(first, first + 6):
        try:
            decided += run_seed(seed).decided
        except AssertionError as error:
            pytest.fail(f"seed {seed}: {error}; replay: {replay_command(seed, 'group')}")
    assert decided >= 6


def test_member_that_lost_nine_messages_in_a_row_is_told_in_the_end() -> None:
    assert run_seed(5325).decided > 0


@pytest.mark.parametrize("name", MUTATIONS)
def test_broken_rule_is_noticed(name: str) -> None:
    rules, expected = MUTATIONS[name]
    for seed in range(MUTATION_SEEDS):
        try:
            run_seed(seed, rules)
        except Violation as violation:
            if expected in str(violation):
                return
    pytest.fail(f"{MUTATION_SEEDS} seeds did not notice: {name}")


@pytest.mark.parametrize("first", range(0, 6, 3))
def test_sparse_group_keeps_its_rules(first: int) -> None:
    for seed in range(first, first + 3):
        run_mesh(seed)


@pytest.mark.parametrize("name", MESH_MUTATIONS)
def test_broken_rule_is_noticed_in_a_sparse_group(name: str) -> None:
    rules, expected = MESH_MUTATIONS[name]
    for seed in range(MESH_MUTATION_SEEDS):
        try:
            run_mesh(seed, rules)
        except Violation as violation:
            if re.search(expected, str(violation)):
                return
    pytest.fail(f"{MESH_MUTATION_SEEDS} seeds did not notice: {name}")


def test_same_seed_gives_the_same_story() -> None:
    assert run_seed(3) == run_seed(3)
    assert run_seed(3) != run_seed(9)


def test_campaign_prints_how_to_replay_a_failing_seed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["--story", "group", "--seeds", "1", "--first", "4"]) == 0
    assert "group: 1 seeds, 0 violations" in capsys.readouterr().out

    def broken(seed: int) -> None:
        raise Violation("two plans decided")

    monkeypatch.setattr("tests.sim.run.run_seed", broken)
    assert main(["--story", "group", "--seeds", "1", "--first", "4"]) == 1
    printed = capsys.readouterr().out
    assert "seed 4: two plans decided" in printed
    assert "replay: python -m tests.sim.run --story group --seeds 1 --first 4" in printed


@pytest.mark.parametrize("seed", range(5))
def test_busy_peer_blames_nobody_and_is_not_declared_dead(seed: int) -> None:
    world = World(seed=seed, count=4, rules=Rules())
    assert world.run(10.0, until=world.all_see_all)
    world.loss, since = 0.02, world.now
    busy = next(iter(world.nodes.values()))
    while world.now < since + 40.0:
        world.pause(busy)
        world.run(world.rng.uniform(0.3, 1.5))
        world.resume(busy)
        world.run(0.2)
    world.membership_checker.require_no_down(since=since)


def test_minority_side_of_a_partition_decides_nothing() -> None:
    world = World(seed=1, count=3, rules=Rules())
    assert world.run(10.0, until=world.all_see_all)
    alone, *rest = world.nodes.values()
    world.island[alone.device] = 1
    world.propose(alone, tuple(world.nodes))
    world.run(12.0)
    assert world.agreement_checker.decided == {}
    (failure,) = world.failed
    gone: set[DeviceId] = {node.device for node in rest}
    assert set(failure.devices) <= gone
    assert failure.reason.endswith("is gone")


def test_crash_between_write_and_send_loses_no_acceptance() -> None:
    world = World(seed=2, count=2, rules=Rules())
    assert world.run(10.0, until=world.all_see_all)
    proposer, member = world.nodes.values()
    world._crash_after_write = 1.0
    key = world.propose(proposer, tuple(world.nodes))
    world.run(3.0)
    assert not proposer.running
    assert not member.running
    assert len(proposer.disk) == len(member.disk) == 1
    world._crash_after_write = 0.0
    world.start(proposer)
    world.start(member)
    assert world.run(10.0, until=world.all_see_all)
    assert proposer.agreement is not None
    assert proposer.agreement.next_view(key[0], key[1]) == 2  # type: ignore[arg-type]
    second = world.propose(proposer, tuple(world.nodes))
    told = {(d, second) for d in world.nodes}
    assert world.run(10.0, until=lambda: told <= world.agreement_checker.told)
