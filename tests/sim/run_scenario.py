"""One seed's story of a run: chaos, healing, and steps that go on, checked throughout."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from p2ptrain.agreement.run_events import Stance
from p2ptrain.agreement.run_rules import Rules
from p2ptrain.agreement.view import View, is_quorum
from p2ptrain.ids import DeviceId, Lineage, ViewNumber
from p2ptrain.planner.keepers import data_holders, replica_keepers
from p2ptrain.planner.plan import Plan
from p2ptrain.recovery.planning import Losses, last_whole_set, restoration
from p2ptrain.recovery.restoration import Restoration
from p2ptrain.recovery.successor import Succession, successor_plans
from p2ptrain.training.step_record import StepRecord
from tests.sim.run_checkers import Violation
from tests.sim.run_node import RunNode
from tests.sim.run_shell import Flaws, place
from tests.sim.run_views import CONTRACT, make_profile, staged_plan
from tests.sim.run_world import RunWorld, Shape

CHAOS_S = 30.0
HEAL_BOUND_S = 40.0
STEPS_AFTER_HEALING = 3
RECALL_S = 8.0


@dataclass(frozen=True, kw_only=True)
class RunOutcome:
    """What one seed did, for the campaign's summary."""

    seed: int
    commits: int
    steps: int
    views: int
    replays: int
    claims: int
    checked_claims: int
    messages: int
    returns: int
    """Disks that came back as they once were."""
    forced: bool
    """More was lost than can be restored: a person went back to the last whole set."""
    ended: bool
    """The data itself was lost with the disks that had it."""


def run_story(
    seed: int, *, rules: Rules | None = None, flaws: Flaws | None = None, fault: str = ""
) -> RunOutcome:
    """Run the whole story for one seed; Violation when a rule is broken.

    `fault`: the only one that happens besides what happens to messages; empty: all do.
    """
    world = RunWorld(seed=seed, shape=shape_of(seed), rules=rules, flaws=flaws)
    chaos(world, fault)
    world.heal()
    forced, ended = False, world.newest_view() is None
    if not ended and not goes_on(world):
        check_stuck(world)
        forced, ended = True, not force(world)
        if not ended and not goes_on(world):
            raise Violation("a forced lineage does not go on")
    checker = world.checker
    return RunOutcome(
        seed=seed, commits=checker.commit_count, steps=checker.reference.newest,
        views=len(checker.views), replays=world.replay_count, claims=checker.claim_count,
        checked_claims=checker.checked_count, messages=world.message_count,
        returns=world.return_count, forced=forced, ended=ended,
    )  # fmt: skip


def shape_of(seed: int) -> Shape:
    """Two to four stages, up to two in reserve, perhaps one that joins later."""
    rng = random.Random(f"shape {seed}")
    stages = tuple(rng.choice((1, 2)) for _ in range(rng.choice((2, 2, 3, 3, 4))))
    shape = Shape(
        stages=stages,
        reserves=rng.choice((0, 0, 1, 2)),
        outsiders=rng.choice((0, 0, 1)),
        ties=((0, sum(stages) - 1),) if rng.random() < 0.5 else (),
        replica_every=rng.choice((3, 5, 8)),
        keep_data_here=rng.random() < 0.15,
        log_bytes_max=rng.choice((1 << 20, 1 << 20, 400)),
    )
    count = len(stages) + shape.reserves + shape.outsiders
    return replace(shape, slow_disks=frozenset(i for i in range(count) if rng.random() < 0.15))


def chaos(world: RunWorld, fault: str) -> None:
    """Lossy links and a fault every few seconds."""
    faults = {name: FAULTS[name] for name in FAULTS if fault in (name, "")}
    rng = world.rng
    world.loss, world.doubling, world.delay_s = 0.1, 0.05, 0.03
    world.corruption, world.crash_after_write, world.done_loss = 0.05, 0.002, 0.01
    world.run(rng.uniform(1.0, 4.0))
    end = world.now + CHAOS_S
    while world.now < end:
        node = rng.choice(list(world.nodes.values()))
        acts, weights = zip(*faults.values(), strict=True)
        rng.choices(acts, weights)[0](world, node)
        world.run(rng.uniform(0.5, 6.0))


def _crash(world: RunWorld, node: RunNode) -> None:
    if node.up:
        world.crash(node, disk=world.rng.random() > 0.12)
        world.at(world.rng.uniform(0.3, 8.0), lambda: _start(world, node))


def _start(world: RunWorld, node: RunNode) -> None:
    if not node.up:
        world.start(node)


def _split(world: RunWorld, node: RunNode) -> None:
    world.partition({device: world.rng.randrange(2) for device in world.nodes})


def _isolate(world: RunWorld, node: RunNode) -> None:
    world.partition({device: int(device == node.device) for device in world.nodes})


def _join_up(world: RunWorld, node: RunNode) -> None:
    world.deaf.clear()
    world.partition(dict.fromkeys(world.nodes, 0))


def _deafen(world: RunWorld, node: RunNode) -> None:
    """One direction of one link, or everything that one device sends."""
    others = [device for device in world.nodes if device != node.device]
    chosen = others if world.rng.random() < 0.3 else [world.rng.choice(others)]
    world.deaf |= {(node.device, other) for other in chosen}
    world.refresh()


def _freeze(world: RunWorld, node: RunNode) -> None:
    world.freeze(node, world.rng.uniform(0.5, 7.0))


def _slow(world: RunWorld, node: RunNode) -> None:
    node.slowness_s = world.rng.choice((0.0, 0.05, 0.3))


def _go_back(world: RunWorld, node: RunNode) -> None:
    """A disk comes back as it was some seconds ago, perhaps of the one that links two camps.

    Everybody who has heard what it forgets stays there and can say so: where nobody can, nothing
    helps. So a device that decides alone, as the home peer of two may, keeps its disk.
    """
    rng = world.rng
    if world.leaving or not all(each.up and not each.frozen for each in world.nodes.values()):
        return
    chance, world.crash_after_write = world.crash_after_write, 0.0
    _join_up(world, node)
    others = [each for each in world.nodes if each != node.device]
    camps = {each: rng.randrange(2) for each in others}
    if rng.random() < 0.7:
        world.deaf = {(a, b) for a in others for b in others if camps[a] != camps[b]}
        world.refresh()
    image = node.disk.copy()
    had_company = not _decides_alone(node)
    world.run(rng.uniform(0.2, 6.0))
    if had_company and not _decides_alone(node):
        world.crash_to(node, image)
        world.run(rng.uniform(0.05, 1.5))
        _start(world, node)
        world.run(RECALL_S)
    world.crash_after_write = chance


def _decides_alone(node: RunNode) -> bool:
    view = node.machine.view
    return view is not None and is_quorum(view.plan, [node.device])


def _leave(world: RunWorld, node: RunNode) -> None:
    if node.up and len(world.leaving) < len(world.nodes) - 1:
        world.leave(node)
        world.at(world.rng.uniform(6.0, 12.0), lambda: _return(world, node))


def _return(world: RunWorld, node: RunNode) -> None:
    world.leaving.discard(node.device)
    _start(world, node)


FAULTS: dict[str, tuple[Callable[[RunWorld, RunNode], None], float]] = {
    "crash": (_crash, 5.0), "split": (_split, 1.5), "isolate": (_isolate, 2.0),
    "join up": (_join_up, 5.0), "deafen": (_deafen, 1.0), "freeze": (_freeze, 2.0),
    "slow": (_slow, 1.0), "leave": (_leave, 1.5), "old disk": (_go_back, 3.0),
}  # fmt: skip
"""What happens, and how often."""


def goes_on(world: RunWorld) -> bool:
    """Everybody becomes a member of one view, and new steps are committed in it."""
    if not world.run(HEAL_BOUND_S, until=world.agreed):
        return False
    goal = world.checker.reference.newest + STEPS_AFTER_HEALING
    return world.run(HEAL_BOUND_S, until=lambda: world.checker.reference.newest >= goal)


def check_stuck(world: RunWorld) -> None:
    """No progress is right only if votes or states are lost for good: Violation otherwise."""
    base, nodes = world.newest_view(), world.nodes
    assert base is not None
    voters = [
        device for device in base.members
        if nodes[device].machine.standing.stance is not Stance.ABSTAINING
        and nodes[device].machine.view == base
    ]  # fmt: skip
    if not is_quorum(base.plan, voters):
        behind = [d for d in base.members if nodes[d].machine.view != base]
        if behind:
            raise Violation(f"{behind} never hear of view {base.number} after healing")
        return
    if _candidate(world, base, voters, base.lineage) is not None:
        raise Violation(f"no progress after healing in view {base.number}, which could go on")


def _candidate(
    world: RunWorld, base: View, sources: list[DeviceId], lineage: int
) -> tuple[Plan, Restoration, tuple[StepRecord, ...]] | None:
    """A next plan of everybody with the states that these devices hold; None: there is none."""
    nodes = world.nodes
    promises = {device: nodes[device].stage.inventory() for device in sources}
    held = [nodes[device].machine.records for device in sources]
    records = max(held, key=lambda each: each[-1].step if each else 0, default=())
    newest = max(base.resume_step, records[-1].step if records else 0)
    holding = [device for device in sources if nodes[device].disk.has_data]
    succession = Succession(base=base.plan, usable=tuple(nodes), holding=holding, reason="forced")
    plans = successor_plans(succession, place)
    for remakes_live, plan in itertools.product((False, True), plans):
        found = restoration(
            Losses(
                base=base, plan=plan, promises=promises, records=records, resume_step=newest,
                tie_segments=world.model.ties, remakes_live=remakes_live,
            )
        )  # fmt: skip
        if isinstance(found, Restoration):
            number = plan.view if lineage == base.lineage else ViewNumber(1)
            return replace(plan, lineage=Lineage(lineage), view=number), found, records
    return None


def force(world: RunWorld) -> bool:
    """`--force-view`: a new lineage of everybody; False: no data is left.

    With all committed steps if those that remember the run can restore them, else from the last
    whole set.
    """
    nodes, base = world.nodes, world.newest_view()
    assert base is not None
    sources = [
        device for device, node in nodes.items()
        if node.machine.view == base and node.machine.standing.stance is not Stance.ABSTAINING
    ]  # fmt: skip
    kept = _candidate(world, base, sources, base.lineage + 1)
    if kept is None:
        return _fall_back(world, base)
    plan, found, records = kept
    view = View(
        plan=plan, contract=CONTRACT, profiles=tuple(map(make_profile, plan.members)),
        previous=base.plan.digest, records=records, restoration=found,
        resume_step=max(base.resume_step, records[-1].step if records else 0),
    )  # fmt: skip
    nodes[sources[0]].force(view)
    return True


def _fall_back(world: RunWorld, base: View) -> bool:
    """From the last whole set, in stages of one segment as far as there are devices."""
    nodes = world.nodes
    holding = [device for device, node in nodes.items() if node.disk.has_data]
    if not holding:
        return False
    inventories = {device: node.stage.inventory() for device, node in nodes.items()}
    count, devices = world.model.count, tuple(nodes)
    stages = tuple((devices[i % len(devices)], 1) for i in range(min(count, len(devices))))
    stages = (*stages[:-1], (stages[-1][0], count - len(stages) + 1))
    plan = staged_plan(
        replace(base.plan, replicas=()), *stages, lineage=Lineage(base.lineage + 1),
        view=ViewNumber(1), members=tuple(sorted(devices)), home=holding[0],
        holders=(holding[0],),
    )  # fmt: skip
    holders = data_holders(
        plan.home, plan.stages, devices, keep_data_here=base.plan.keep_data_here, holding=holding
    )
    plan = replace(plan, replicas=replica_keepers(plan.stages, devices), holders=holders)
    nodes[holding[0]].force(
        View(
            plan=plan, contract=CONTRACT, profiles=tuple(map(make_profile, plan.members)),
            previous=None, resume_step=last_whole_set(inventories, count), records=(),
            restoration=None,
        )
    )  # fmt: skip
    return True
