"""What a stage exchanges beside boundary tensors: what the run feeds it, and tied gradients."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from p2ptrain.bundle.manifest import Manifest, Port
from p2ptrain.ids import DeviceId
from p2ptrain.planner.plan import Plan
from p2ptrain.training.contract import Contract
from p2ptrain.training.routing import Route
from p2ptrain.training.ties import TieGroup, TieHolder, tie_groups

LOSS_WEIGHT_DTYPE = "float64"


@dataclass(frozen=True, slots=True, kw_only=True)
class FedValue:
    """One array of a microbatch as the data holder sends it."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TieKey:
    """How a tied gradient is named on the wire: one copy of a tensor, where it lives."""

    segment: int
    tensor_index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrivals:
    """The tensors that one stage may expect, exactly."""

    fed: Mapping[str, tuple[FedValue, ...]]
    """By kind: `input` for the first stage, `labels` for the last; position is the index."""
    microbatches: Mapping[str, Collection[int]]
    """By phase: of which of them these come."""
    tied: Mapping[TieKey, tuple[int, ...]]
    """Shapes of the gradients of copies that other stages hold; all float32."""
    codec: str = "fp32"
    """Of activations and cotangents; everything else comes raw."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TieSend:
    """One copy whose gradient a stage sends after its last backward, and to whom."""

    tensor: str
    key: TieKey
    devices: tuple[DeviceId, ...]


def arrivals(
    manifest: Manifest,
    contract: Contract,
    plan: Plan,
    device: DeviceId,
    *,
    stage: int | None = None,
) -> Arrivals:
    """What a device may expect for its stage; of two, for `stage`, and tied gradients for the
    first of them, which stand for both."""
    route = Route(plan, device, stage=stage)
    stage_index, own_stages = route.stage_index, plan.stages_of(device)
    fed: dict[str, tuple[FedValue, ...]] = {}
    batch = contract.microbatch_size
    if stage_index == 0:
        fed["input"] = tuple(_fed(manifest, port, batch) for port in manifest.data_ports)
    if stage_index == len(plan.stages) - 1:
        weight = FedValue(shape=(1,), dtype=LOSS_WEIGHT_DTYPE)
        fed["labels"] = (_fed(manifest, manifest.labels_port, batch), weight)
    counts = {"train": contract.microbatches, "evaluate": contract.heldout_microbatches}
    own = {phase: frozenset(route.own(count)) for phase, count in counts.items()}
    awaited = [
        holder
        for group in tie_groups(manifest)
        if stage_index == own_stages[0] and _stages(plan, group).intersection(own_stages)
        for holder in group.holders
        if plan.stage_of_segment(holder.segment) not in own_stages
    ]
    tied = {_key(manifest, holder): manifest.tensor(holder.tensor).shape for holder in awaited}
    return Arrivals(fed=fed, microbatches=own, tied=tied, codec=contract.codec)


def tied_sends(
    manifest: Manifest, plan: Plan, stage_index: int, rank: int = 0
) -> tuple[TieSend, ...]:
    """Whose gradients a stage sends after the last backward of a step: to all peers of every other
    stage that holds a copy of the same tensor. Two stages of one device send together.

    Where several peers have the stage, each has the same gradients: the first of them sends, the
    others (`rank`) send to nobody.
    """
    sends = []
    own_stages = plan.stages_of(plan.stages[stage_index].device)
    for group in tie_groups(manifest):
        others = sorted(_stages(plan, group) - set(own_stages))
        peers = (device for other in others for device in plan.stages[other].devices)
        devices = tuple(dict.fromkeys(peers))
        own = [h for h in group.holders if plan.stage_of_segment(h.segment) in own_stages]
        sends += [
            TieSend(
                tensor=holder.tensor,
                key=_key(manifest, holder),
                devices=devices if rank == 0 else (),
            )
            for holder in own
            if devices
        ]
    return tuple(sends)


def _stages(plan: Plan, group: TieGroup) -> set[int]:
    return {plan.stage_of_segment(holder.segment) for holder in group.holders}


def _key(manifest: Manifest, holder: TieHolder) -> TieKey:
    names = [tensor.name for tensor in manifest.tensors]
    return TieKey(segment=holder.segment, tensor_index=names.index(holder.tensor))


def _fed(manifest: Manifest, port: Port, batch: int) -> FedValue:
    return FedValue(shape=manifest.shape(port.value, batch=batch), dtype=port.value.dtype)
