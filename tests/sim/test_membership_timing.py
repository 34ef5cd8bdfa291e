"""How soon silence is death, and that being busy is not silence."""

from __future__ import annotations

import pytest

from p2ptrain import limits
from tests.sim.world import Node, Rules, World

SEEDS = range(6)
ALL_BUSY_BOUND_S = 9.5
"""(1.1 to ask + 1.5 to answer + 3 to contradict) scaled by at most 1.75, minus what is not."""


def meeting(seed: int, count: int) -> World:
    world = World(seed=seed, count=count, rules=Rules())
    assert world.run(10.0, until=world.all_see_all)
    return world


def work(world: World, node: Node, *, longest_s: float, rest_s: float, until_s: float) -> None:
    """Its loop stands still again and again, as when compute threads take all cores."""
    if world.now >= until_s:
        return
    busy_s = world.rng.uniform(0.1, longest_s)
    world.pause(node)
    world.at(busy_s, lambda: world.resume(node))
    again = lambda: work(world, node, longest_s=longest_s, rest_s=rest_s, until_s=until_s)  # noqa: E731 a callback
    world.at(busy_s + world.rng.uniform(0.01, rest_s), again)


@pytest.mark.parametrize("seed", SEEDS)
def test_busy_peer_is_not_even_suspected(seed: int) -> None:
    world = meeting(seed, 2 + seed % 4)
    since, busy = world.now, next(iter(world.nodes.values()))
    work(world, busy, longest_s=0.9, rest_s=0.1, until_s=since + 40.0)
    world.run(42.0)
    world.membership_checker.require_no_suspicion(since=since)


@pytest.mark.parametrize("seed", SEEDS)
def test_loop_that_stands_still_for_four_seconds_is_no_death(seed: int) -> None:
    world = meeting(seed, 2 + seed % 4)
    world.run(world.rng.uniform(0.0, 1.0))
    since, busy = world.now, next(iter(world.nodes.values()))
    world.pause(busy)
    world.run(4.0)
    world.resume(busy)
    world.run(10.0)
    world.membership_checker.require_no_down(since=since)


@pytest.mark.parametrize("seed", SEEDS)
def test_stopped_peer_is_dead_in_time_while_all_others_are_busy(seed: int) -> None:
    world = meeting(seed, 3 + seed % 4)
    stopped, *others = world.nodes.values()
    for node in others:
        work(world, node, longest_s=0.6, rest_s=0.2, until_s=world.now + 60.0)
    world.run(world.rng.uniform(5.0, 10.0))
    since = world.now
    world.pause(stopped)
    world.run(ALL_BUSY_BOUND_S + 1.0)  # whoever is paused just then says so on waking
    world.membership_checker.require_down(
        stopped.device, {n.device for n in others}, since=since, within_s=ALL_BUSY_BOUND_S
    )
    world.membership_checker.require_no_down(since=since, but=stopped.device)


def test_bounds_follow_from_the_limits() -> None:
    longest_s = 1.1 * limits.PROBE_INTERVAL_S
    longest_s += 2.0 * limits.PROBE_TIMEOUT_S + limits.SUSPECT_MIN_S
    assert longest_s < 6.0
    assert longest_s * limits.LAG_SCALE_MAX < 10.0
