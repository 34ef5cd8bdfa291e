"""A group in which nobody has a link with everybody: what gossip and common neighbours must do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from p2ptrain.ids import DeviceId
from p2ptrain.membership.machine import Membership
from p2ptrain.membership.states import State
from tests.sim.checkers import Violation
from tests.sim.world import Node, Rules, World

MEET_BOUND_S = 20.0
REFUSED_BOUND_S = 4.0
SILENCE_BOUND_S = 9.0
SWIM_SILENCE_BOUND_S = 20.0
"""Above 16 members each is probed by one of the others about once a second, in random order."""
RETURN_BOUND_S = 8.0
STAYS_S = 10.0
COUNTS = (8, 12, 24)


@dataclass(frozen=True, kw_only=True)
class MeshOutcome:
    """What one seed did."""

    count: int
    meet_s: float
    refused_s: float
    silence_s: float
    return_s: float
    left_s: float


def ring(count: int) -> frozenset[tuple[int, int]]:
    """Everybody has links with the two next on either side."""
    pairs = [tuple(sorted((i, (i + step) % count))) for i in range(count) for step in (1, 2)]
    return frozenset((a, b) for a, b in pairs)


def run_mesh(seed: int, rules: Rules | None = None) -> MeshOutcome:
    """Run the story for one seed; Violation when a rule is broken."""
    count = COUNTS[seed % len(COUNTS)]
    world = World(seed=seed, count=count, rules=rules or Rules(), mesh=ring(count))
    meet_s = _meet(world)
    world.loss = 0.02
    victim = world.rng.choice(list(world.nodes.values()))
    refused_s = die_after_news(world, victim)
    silence_s, return_s = stop_and_return(world, victim)
    left_s = leave(world, victim)
    return MeshOutcome(
        count=count, meet_s=meet_s, refused_s=refused_s, silence_s=silence_s,
        return_s=return_s, left_s=left_s,
    )  # fmt: skip


def _meet(world: World) -> float:
    took_s = _run_until(world, MEET_BOUND_S, world.all_see_all)
    if took_s is None:
        raise Violation("not everybody knows everybody")
    return took_s


def _run_until(world: World, within_s: float, condition: Callable[[], bool]) -> float | None:
    """Seconds until the condition held, looked at twenty times a second; None: it did not."""
    since = world.now
    while world.now < since + within_s:
        world.run(0.05)
        if condition():
            return world.now - since
    return None


def _until_all_hold(world: World, victim: Node, state: State, within_s: float) -> float:
    took_s = _run_until(world, within_s, lambda: world.all_hold(victim.device, state))
    if took_s is None:
        raise Violation(f"not everybody holds {victim.device[:4]} {state.value}")
    return took_s


def die_after_news(world: World, victim: Node) -> float:
    """It says something and is killed: its last words still travel when it is known to be dead."""
    assert isinstance(victim.membership, Membership)
    world.delay_s = 0.3
    victim.membership.update_own(activity="last words")
    world.settle(victim)
    world.run(0.3)
    world.crash(victim)
    since, held_s, seen = world.now, 0.0, set[DeviceId]()
    while world.now < since + STAYS_S:
        world.run(0.05)
        _require_no_revival(world, victim, seen)
        if not held_s and world.all_hold(victim.device, State.DEAD):
            held_s = world.now - since
    if not 0.0 < held_s <= REFUSED_BOUND_S:
        raise Violation(f"not everybody holds {victim.device[:4]} dead in time")
    world.delay_s = 0.02
    world.membership_checker.require_no_down(since=0.0, but=victim.device)
    world.start(victim)
    _meet(world)
    return held_s


def _require_no_revival(world: World, victim: Node, seen: set[DeviceId]) -> None:
    """Whoever once held it dead goes on doing so; `seen` remembers who did."""
    for node in world.nodes.values():
        if node.active and victim.device in world.sees(node, State.DEAD):
            seen.add(node.device)
        elif node.device in seen:
            raise Violation("old words of a dead peer brought it back to life")


def stop_and_return(world: World, victim: Node) -> tuple[float, float]:
    """SIGSTOP: all hold it dead in time; after SIGCONT all believe its own word, near and far."""
    since = world.now
    world.pause(victim)
    small = len(world.nodes) <= 16
    bound_s = SILENCE_BOUND_S if small else SWIM_SILENCE_BOUND_S
    silence_s = _until_all_hold(world, victim, State.DEAD, bound_s)
    world.run(world.rng.uniform(0.0, 10.0))
    world.resume(victim)
    return_s = _until_all_hold(world, victim, State.ALIVE, RETURN_BOUND_S)
    world.run(STAYS_S)
    world.membership_checker.require_no_down(since=since, but=victim.device)
    _meet(world)
    return silence_s, return_s


def leave(world: World, victim: Node) -> float:
    """It says that it goes, and goes: near and far it has left, and nobody calls it dead."""
    assert isinstance(victim.membership, Membership)
    victim.membership.update_own(leaving=True)
    world.settle(victim)
    world.run(2.0)
    since = world.now
    world.crash(victim)
    left_s = _until_all_hold(world, victim, State.LEFT, REFUSED_BOUND_S)
    kinds = {kind for at, _, who, kind in world.membership_checker.kinds if at >= since}
    if kinds != {"left"}:
        raise Violation(f"a peer that left went {kinds}")
    return left_s
