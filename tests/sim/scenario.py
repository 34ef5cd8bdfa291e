"""One seed's story: chaos, healing, agreement, a death, a pause, one-way cuts; all checked."""

from __future__ import annotations

from dataclasses import dataclass

from p2ptrain.ids import DeviceId
from tests.sim.checkers import Violation
from tests.sim.world import Node, Rules, World

CHAOS_S = 30.0
HEAL_BOUND_S = 20.0
# A round trip fails with probability 0.36 under 20 % loss and is tried every 5 s at the latest.
DECIDE_BOUND_S = 60.0
DEATH_BOUND_S = 2.0
SILENCE_BOUND_S = 6.0
RETURN_BOUND_S = 3.0


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one seed did, for the campaign's summary."""

    seed: int
    count: int
    messages: int
    proposals: int
    decided: int
    heal_s: float
    death_s: float
    silence_s: float


def run_seed(seed: int, rules: Rules | None = None) -> Outcome:
    """Run the whole story for one seed; Violation when a rule is broken."""
    world = World(seed=seed, count=2 + seed % 6, rules=rules or Rules())
    chaos(world)
    heal_s = heal(world)
    agree_afresh(world)
    death_s = kill_one(world)
    silence_s = stop_one(world)
    deafen(world)
    return Outcome(
        seed=seed, count=len(world.nodes), messages=world.message_count,
        proposals=world.proposal_count, decided=len(world.agreement_checker.decided),
        heal_s=heal_s, death_s=death_s, silence_s=silence_s,
    )  # fmt: skip


def chaos(world: World) -> None:
    """Faults every second or two, proposals in between, for CHAOS_S."""
    rng = world.rng
    world.loss, world.doubling, world.delay_s = 0.1, 0.05, 0.1
    world.refusal, world._crash_after_write = 0.03, 0.03
    end = world.now + CHAOS_S
    world.run(2.0)
    while world.now < end:
        world.run(rng.uniform(0.2, 2.0))
        if rng.random() < 0.4:
            _fault(world)
        active = [node for node in world.nodes.values() if node.active]
        if active and rng.random() < 0.7:
            # Two at once now and then: rivals for one view.
            for node in rng.sample(active, min(len(active), rng.choice((1, 1, 2)))):
                if node.active:
                    world.propose(node, _members(world, node))


def _members(world: World, node: Node) -> tuple[DeviceId, ...]:
    """The proposer and the first device, which stands for the data holder, and perhaps more."""
    first = next(iter(world.nodes))
    others = [d for d in world.nodes if world.rng.random() < 0.5 or d == first]
    return (node.device, *(d for d in others if d != node.device))


def _fault(world: World) -> None:
    rng = world.rng
    node = rng.choice(list(world.nodes.values()))
    draw = rng.random()
    if draw < 0.25:
        world.island = {d: rng.randrange(2) for d in world.nodes}
    elif draw < 0.45:
        world.island = dict.fromkeys(world.nodes, 0)
    elif draw < 0.75:
        (world.crash if node.running else world.start)(node)
    elif node.running:
        (world.resume if node.paused else world.pause)(node)


def heal(world: World) -> float:
    """Everything works again: all see all alive within the bound; gives the seconds."""
    world.island = dict.fromkeys(world.nodes, 0)
    world.loss, world.doubling, world.delay_s = 0.02, 0.01, 0.02
    world.refusal, world._crash_after_write = 0.0, 0.0
    for node in world.nodes.values():
        if not node.running:
            world.start(node)
        elif node.paused:
            world.resume(node)
    since = world.now
    if not world.run(HEAL_BOUND_S, until=world.all_see_all):
        raise Violation("after healing not everybody sees everybody alive")
    return world.now - since


def agree_afresh(world: World) -> None:
    """Under heavy loss a fresh proposal is decided and told to all within the bound."""
    world.loss = 0.2
    proposer = world.rng.choice(list(world.nodes.values()))
    members = (proposer.device, *(d for d in world.nodes if d != proposer.device))
    checker, end = world.agreement_checker, world.now + DECIDE_BOUND_S
    while world.now < end:
        failures = len(world.failed)
        key = world.propose(proposer, members)
        told = {(d, key) for d in world.nodes}
        world.run(
            end - world.now,
            until=lambda t=told, f=failures: t <= checker.told or len(world.failed) > f,
        )
        if told <= checker.told:
            world.loss = 0.02
            return
    raise Violation("after healing a fresh proposal is not decided")


def kill_one(world: World) -> float:
    """kill -9: all survivors report it within DEATH_BOUND_S; it comes back."""
    victim = world.rng.choice(list(world.nodes.values()))
    survivors = set(world.nodes) - {victim.device}
    since = world.now
    world.crash(victim)
    world.run(DEATH_BOUND_S)
    checker = world.membership_checker
    slowest = checker.require_down(victim.device, survivors, since=since, within_s=DEATH_BOUND_S)
    checker.require_no_down(since=since, but=victim.device)
    world.start(victim)
    if not world.run(HEAL_BOUND_S, until=world.all_see_all):
        raise Violation("a restarted peer is not seen by everybody")
    return slowest


def stop_one(world: World) -> float:
    """SIGSTOP: reported within SILENCE_BOUND_S, back by itself, and it blames nobody."""
    world.run(30.0, until=None)
    victim = world.rng.choice(list(world.nodes.values()))
    others = set(world.nodes) - {victim.device}
    since, checker = world.now, world.membership_checker
    world.pause(victim)
    world.run(world.rng.uniform(SILENCE_BOUND_S, 30.0))
    slowest = checker.require_down(victim.device, others, since=since, within_s=SILENCE_BOUND_S)
    resumed = world.now
    world.resume(victim)
    world.run(1.0)
    checker.require_no_suspicion(since=resumed, by=victim.device)
    world.run(RETURN_BOUND_S + 2.0)
    checker.require_up(victim.device, others, since=resumed, within_s=RETURN_BOUND_S)
    checker.require_no_down(since=since, but=victim.device)
    return slowest


def deafen(world: World) -> None:
    """One link is cut one way, then both, then all ways to one peer: nobody else is blamed."""
    if len(world.nodes) < 3:
        return
    checker, devices = world.membership_checker, list(world.nodes)
    speaker, deaf = world.rng.sample(devices, 2)
    world.loss, since = 0.0, world.now
    world.mute = {(speaker, deaf)}
    world.run(10.0)
    world.mute = {(speaker, deaf), (deaf, speaker)}
    world.run(10.0)
    checker.require_no_suspicion(since=since)  # others ask for both
    world.mute = {(device, deaf) for device in devices if device != deaf}
    since = world.now
    world.run(15.0)
    checker.require_no_down(since=since, but=deaf, deaf=deaf)
    world.mute = set()
    if not world.run(HEAL_BOUND_S, until=world.all_see_all):
        raise Violation("after one-way cuts not everybody sees everybody alive")
