"""The ways in which a new run could be done, where its owner leaves that to the planner.

Microbatch size, rematerialisation and codec are in the numerics contract, so each way is a contract
of its own, fixed once the run begins. The first way is the one without a choice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from p2ptrain import limits
from p2ptrain.bundle.manifest import Manifest
from p2ptrain.planner.delaying import against_delaying
from p2ptrain.planner.input import LeftOut
from p2ptrain.planner.kinds import kinds_at_start
from p2ptrain.planner.plan import Plan
from p2ptrain.planner.profile import PeerProfile
from p2ptrain.runtime.reports import TrainRequest
from p2ptrain.schedule.actions import AUTO, delays_gradients
from p2ptrain.training.contract import CODECS_OF_RUNS, Contract

SIZE: Final = 4
"""Samples of a microbatch where the planner may choose: then the minibatch has so many per
microbatch that is asked for, however it is divided."""
SIZES: Final = (1, 2, 4, 8)
"""As far from SIZE as measured times reach."""
ROUNDING_PERCENT: Final = 110
"""A codec that rounds has to shorten the step by a tenth."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One plan under one contract."""

    contract: Contract
    plan: Plan
    left_out: tuple[LeftOut, ...] = ()
    profiles: tuple[PeerProfile, ...] = ()
    """For the contract's microbatch size."""


def may_delay(schedule: str, manifest: Manifest, contract: Contract) -> bool:
    """Whether backwards have to be measured in parts: of pipelines that may delay gradients."""
    if schedule != AUTO and not delays_gradients(schedule):
        return False
    pipelined = "pipeline" in kinds_at_start(contract.parallelism)
    return pipelined and against_delaying(manifest, contract) is None


def asked_size(request: TrainRequest) -> int:
    """Samples of a microbatch before anything is chosen."""
    return SIZE if request.microbatch_size is None else request.microbatch_size


def other_sizes(request: TrainRequest) -> tuple[int, ...]:
    """Microbatch sizes that peers are asked about beside the one that they measure."""
    if request.microbatch_size is not None:
        return ()
    whole = SIZE * request.microbatches
    fits = (size for size in SIZES if size != SIZE and whole % size == 0)
    return tuple(size for size in fits if whole // size <= limits.MICROBATCHES_MAX)


def contracts(request: TrainRequest, contract: Contract) -> tuple[Contract, ...]:
    """What the run could be, `contract` first."""
    codecs = CODECS_OF_RUNS if request.codec == AUTO else (contract.codec,)
    again = (False, True) if request.rematerialise is None else (contract.rematerialise,)
    sizes = (contract.microbatch_size, *other_sizes(request))
    return tuple(
        dataclasses.replace(_divided(contract, size), codec=codec, rematerialise=rematerialise)
        for size in sizes
        for rematerialise in again
        for codec in codecs
    )


def _divided(contract: Contract, size: int) -> Contract:
    """The same samples per step and per evaluation in microbatches of another size."""
    heldout = contract.heldout_microbatches * contract.microbatch_size
    return dataclasses.replace(
        contract,
        microbatch_size=size,
        microbatches=contract.minibatch_size // size,
        heldout_microbatches=min(max(1, heldout // size), limits.MICROBATCHES_MAX),
    )


def best(ways: Iterable[Way]) -> Way:
    """The way with the best step, the first among equals."""
    return min(ways, key=_value)


def chosen(way: Way, count: int) -> str:
    """What was chosen, for people."""
    contract = way.contract
    again = "rematerialised" if contract.rematerialise else "not rematerialised"
    return (
        f"chosen of {count} ways: {contract.microbatches} microbatches of "
        f"{contract.microbatch_size}, {contract.codec}, {again}"
    )


def _value(way: Way) -> int:
    plan = way.plan
    value = plan.step_uj if plan.goal == "energy" and plan.step_uj is not None else plan.step_ns
    return value * (100 if way.contract.codec == "fp32" else ROUNDING_PERCENT)
