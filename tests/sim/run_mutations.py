"""Production rules and shells with one rule broken each: a simulator that misses one is worthless.

The first four are those of the protocol that single-decree Paxos and the fence stand on, the fifth
and sixth of their memory; the other four are rules of recovery.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from p2ptrain.agreement.run_messages import ViewPromise
from p2ptrain.agreement.run_rules import Rules
from p2ptrain.agreement.view import View
from p2ptrain.ids import DeviceId
from tests.sim.run_shell import Flaws


class HalfIsEnough(Rules):
    """Any half of the members decides, on either side of a partition."""

    def is_quorum(self, view: View, devices: Collection[DeviceId]) -> bool:
        return 2 * len(set(view.members) & set(devices)) >= len(view.members)


class IgnoreAccepted(Rules):
    """A proposer prefers its own value to one that may be decided already."""

    def adopted(self, promises: Mapping[DeviceId, ViewPromise]) -> View | None:
        return None


class ResumeAtBase(Rules):
    """The next view resumes where the present one did, whatever has been committed since."""

    def resume_step(self, promises: Mapping[DeviceId, ViewPromise], base: View) -> int:
        return base.resume_step


class NoFence(Rules):
    """Steps go on being recorded after the next view is promised."""

    def may_record(self, *, promised: bool) -> bool:
        return True


class TrustDisk(Rules):
    """A device whose disk went back votes on, whatever others heard from it."""

    def trusts_disk(self) -> bool:
        return True


@dataclass(frozen=True, kw_only=True)
class Mutation:
    """What is broken, and what some seed's violation must say of it."""

    says: tuple[str, ...]
    rules: Rules = field(default_factory=Rules)
    flaws: Flaws = field(default_factory=Flaws)
    first_seed: int = 0
    """Where to begin, for what few seeds notice."""
    fault: str = ""
    """The only one that happens; empty: all do."""


MUTATIONS: dict[str, Mutation] = {
    "plain half as quorum": Mutation(
        rules=HalfIsEnough(), says=("two views are decided", "fenced by", "lost step")
    ),
    "accepted value not adopted": Mutation(
        rules=IgnoreAccepted(),
        first_seed=30,
        says=("two views are decided", "follows a view nobody knows"),
    ),
    "resume not read from promises": Mutation(rules=ResumeAtBase(), says=("lost step",)),
    "commit not fenced by promise": Mutation(rules=NoFence(), says=("lost step", "fenced by")),
    "records in memory counted as durable": Mutation(
        rules=TrustDisk(),
        flaws=Flaws(count_memory=True),
        fault="crash",
        says=("lost step", "fenced by", "was protected, but only"),
    ),
    "log released too early": Mutation(
        flaws=Flaws(release_early=True), says=("was protected, but cannot be restored",)
    ),
    "replica accepted without checking its hash": Mutation(
        flaws=Flaws(trust_replicas=True), says=("wrong states", "replays wrong")
    ),
    "replay with the wrong clip scale": Mutation(
        flaws=Flaws(guess_clip_scale=True), says=("wrong states",)
    ),
    "protected without a second copy": Mutation(
        flaws=Flaws(assume_copies=True), says=("was protected, but cannot be restored",)
    ),
}
