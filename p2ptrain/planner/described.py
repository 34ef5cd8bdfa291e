"""A question about described devices: times from operations and bytes instead of measurements."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from p2ptrain.bundle.manifest import Manifest
from p2ptrain.errors import ConfigError
from p2ptrain.ids import DeviceId, Digest
from p2ptrain.planner.delaying import against_delaying
from p2ptrain.planner.device_file import DeviceSpec
from p2ptrain.planner.input import LinkEstimate
from p2ptrain.planner.objective import Objective
from p2ptrain.planner.profile import KindCost, PeerProfile, Power
from p2ptrain.planner.question import Device, Question
from p2ptrain.planner.segment_costs import model_costs
from p2ptrain.schedule.actions import Held, choices
from p2ptrain.training.contract import Contract, OptimizerChoice, RuntimeBuild
from p2ptrain.training.memory import MemoryModel
from p2ptrain.units import NS_PER_S, UJ_PER_J

DESCRIBED: Final = RuntimeBuild(runtime="described", version="", numpy="", machine="", isa="")
MEMORY_BYTES_PER_S: Final = 5_000_000_000
"""Assumed where a file has no memory_gbytes_per_s."""
GRADIENT_PASSES: Final = 3
"""Times that an update moves a value through memory: parameter and gradient in, parameter out."""
STATE_PASSES: Final = 2
"""And as often for each vector of the optimizer's state: AdamW has two, and moves seven."""
NO_DATA: Final = Digest("0" * 64)
JOULES_PER_WH: Final = 3600


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What is to be trained, and how."""

    steps: int
    microbatches: int
    microbatch_size: int
    codec: str = "fp32"
    optimizer: str = "adamw"
    rematerialise: bool = False


def described_question(
    manifest: Manifest,
    specs: Sequence[DeviceSpec],
    links: tuple[LinkEstimate, ...],
    work: Work,
    objective: Objective,
    schedule: str,
) -> Question:
    """The question; a segment's time is its operations at the device's rate, and the bytes it
    keeps and hands on at the rate of its memory.

    Raises:
        ConfigError: the model has no such optimizer.
    """
    contract = _contract(manifest, work)
    model = MemoryModel(manifest, contract)

    def memory(segments: range, holds: Held) -> int:
        return model.stage(segments, holds).total

    return Question(
        manifest=manifest,
        contract=contract,
        devices=tuple(_device(manifest, contract, spec) for spec in specs),
        stage_memory=memory,
        links=links,
        objective=objective,
        schedules=choices(schedule, delayable=against_delaying(manifest, contract) is None),
    )


def owner_of(asked: str | None, names: Sequence[str], *, private: bool) -> DeviceId | None:
    """The device with the data; None where nobody asks and it makes no difference.

    Args:
        asked: Its name; None: the first, where the plan is private.
        names: Of all devices, in the order of their file.
        private: Whether its data stays with it.

    Raises:
        ConfigError: there is no such device.
    """
    if asked is None:
        return DeviceId(names[0]) if private else None
    if asked not in names:
        raise ConfigError(
            f"--home: there is no device {asked!r:.40}", hint=f"devices: {', '.join(names)}"
        )
    return DeviceId(asked)


def _contract(manifest: Manifest, work: Work) -> Contract:
    if work.optimizer not in manifest.updates:
        raise ConfigError(
            f"the model has no optimizer {work.optimizer!r:.40}",
            hint=f"choose one of: {', '.join(sorted(manifest.updates))}",
        )
    return Contract(
        bundle=manifest.digest,
        seed=0,
        steps=work.steps,
        microbatch_size=work.microbatch_size,
        microbatches=work.microbatches,
        form="portable",
        codec=work.codec,
        threads=1,
        dropout=None,
        optimizer=OptimizerChoice(name=work.optimizer),
        training_data=NO_DATA,
        heldout_data=NO_DATA,
        evaluate_every=0,
        heldout_microbatches=1,
        builds=(DESCRIBED,),
        rematerialise=work.rematerialise,
    )


def _device(manifest: Manifest, contract: Contract, spec: DeviceSpec) -> Device:
    rate = MEMORY_BYTES_PER_S
    if spec.memory_gbytes_per_s is not None:
        rate = max(1, round(spec.memory_gbytes_per_s * 1e9))
    battery = spec.battery_wh
    return Device(
        profile=PeerProfile(
            device=DeviceId(spec.name),
            kinds=_kinds(manifest, contract, round(spec.gflops * 1e9), rate),
            memory_bytes=spec.memory_bytes,
            host=spec.name,
            cores=1,
            build=DESCRIBED,
        ),
        power=Power(
            idle_uw=round(spec.idle_watts * UJ_PER_J),
            busy_uw=round(spec.busy_watts * UJ_PER_J),
            pj_per_byte=round(spec.joules_per_byte * 1e12),
        ),
        battery_uj=None if battery is None else round(battery * JOULES_PER_WH * UJ_PER_J),
    )


def _kinds(
    manifest: Manifest, contract: Contract, flops_per_s: int, bytes_per_s: int
) -> dict[str, KindCost]:
    batch, found = contract.microbatch_size, dict[str, KindCost]()
    segments = model_costs(manifest, contract).segments
    passes = GRADIENT_PASSES + STATE_PASSES * len(manifest.updates[contract.optimizer.name].state)
    for index, segment in enumerate(manifest.segments):
        kind = manifest.kinds[segment.kind]
        if kind.name in found:
            continue
        moved = manifest.stash_bytes(index, form=contract.form, batch=batch)
        moved += manifest.boundary_bytes(index, batch=batch)
        moved_ns = moved * NS_PER_S // bytes_per_s
        forward_ns = kind.forward_flops * batch * NS_PER_S // flops_per_s + moved_ns
        backward_ns = kind.backward_flops * batch * NS_PER_S // flops_per_s + moved_ns
        cost = KindCost(
            forward_ns=forward_ns,
            backward_ns=backward_ns,
            cotangents_ns=backward_ns - backward_ns // 2,  # each part is half the products
            gradients_ns=backward_ns // 2,
            norm_ns=segments[index].gradient_bytes * NS_PER_S // bytes_per_s,
            update_ns=passes * segments[index].gradient_bytes * NS_PER_S // bytes_per_s,
        )
        if contract.rematerialise:
            cost = dataclasses.replace(cost, backward_ns=forward_ns + backward_ns)
        found[kind.name] = cost
    return found
