"""Questions for the planner's what-if tests: random groups, and BERT-base as a description."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from p2ptrain.bundle.manifest import (
    Initialiser,
    Manifest,
    Port,
    Segment,
    SegmentKind,
    ShardGroup,
    Symbol,
    Tensor,
    Value,
)
from p2ptrain.planner.input import LinkEstimate, StageMemory
from p2ptrain.planner.kinds import KINDS, Kind
from p2ptrain.planner.objective import Objective
from p2ptrain.planner.profile import KindCost, PeerProfile, Power
from p2ptrain.planner.question import Device, Question
from tests.planning_cases import contract, device, fast_links, manifest, profile, stage_memory

POWER = Power(idle_uw=2_000_000, busy_uw=6_000_000, pj_per_byte=100_000)


def devices(profiles: Sequence[PeerProfile], *, power: Power = POWER) -> tuple[Device, ...]:
    """These peers, all with the same watts."""
    return tuple(Device(profile=each, power=power) for each in profiles)


def equal_devices(
    letters: str, *, segment_count: int, slowness: Sequence[int] = (), memory_bytes: int = 1 << 40
) -> tuple[Device, ...]:
    """Devices whose segments take 1 ms forward and 2 ms backward, times their slowness."""
    slow = slowness or [1] * len(letters)
    return devices([
        profile(
            letter, [(10**6 * s, 2 * 10**6 * s)] * segment_count, memory_bytes=memory_bytes
        )
        for letter, s in zip(letters, slow, strict=True)
    ])  # fmt: skip


def ending_slowly(one: Device, *, norm_ns: int, update_ns: int) -> Device:
    """The device, on which the end of a step takes this long for each segment."""
    kinds = {
        name: dataclasses.replace(cost, norm_ns=norm_ns, update_ns=update_ns)
        for name, cost in one.profile.kinds.items()
    }
    return dataclasses.replace(one, profile=dataclasses.replace(one.profile, kinds=kinds))


def question(
    taking_part: tuple[Device, ...],
    *,
    segment_count: int,
    links: tuple[LinkEstimate, ...] | None = None,
    microbatches: int = 8,
    schedule: str = "1f1b",
    kinds: tuple[Kind, ...] = KINDS,
    objective: Objective | None = None,
    memory: StageMemory = stage_memory,
) -> Question:
    """A chain of segments on these devices, with free links unless given."""
    return Question(
        manifest=manifest(segment_count),
        contract=contract(microbatches=microbatches),
        devices=taking_part,
        links=fast_links([each.profile for each in taking_part]) if links is None else links,
        stage_memory=memory,
        objective=objective or Objective(),
        schedules=(schedule,),
        kinds=kinds,
    )


LAYERS, HIDDEN, HEADS, COLUMNS, VOCABULARY, POSITIONS = 12, 768, 12, 3072, 21_128, 512


def bert_base(*, sequence: int) -> Manifest:
    """BERT-base with pooler, as a bundle would describe it: half blocks, heads and columns."""
    boundary = Value(name="x", shape=("batch", "sequence", str(HIDDEN)))
    port = Port(value=boundary, role="boundary", differentiable=True)
    ids = Value(name="ids", shape=("batch", "sequence"), dtype="int64")
    loss = Port(value=Value(name="loss", shape=()), role="loss", differentiable=True)
    fed = Port(value=ids, role="data", differentiable=False)
    shapes = {"embedding": _EMBEDDING, "head": _HEAD}
    for layer in range(LAYERS):
        shapes |= {f"attention{layer}": _ATTENTION, f"mlp{layer}": _MLP}
    order = ["embedding", *(f"{half}{i}" for i in range(LAYERS) for half in ("attention", "mlp"))]
    order.append("head")
    kinds, segments, tensors = {}, [], []
    for name in order:
        values = tuple(Value(name=key, shape=()) for key in shapes[name])
        kinds[name] = SegmentKind(
            name=name,
            forms={},
            inputs=(fed,) if name == "embedding" else (port,),
            outputs=(loss,) if name == "head" else (port,),
            parameters=values,
            masks=(),
            forward_flops=1,
            backward_flops=2,
        )
        own = {value.name: f"{name}.{value.name}" for value in values}
        segments.append(Segment(name=name, kind=name, parameters=own))
        tensors += [_tensor(own[key], *shapes[name][key]) for key in own]
    return dataclasses.replace(
        manifest(1),
        symbols={
            "batch": Symbol(size=None, kind="batch"),
            "sequence": Symbol(size=sequence, kind="sequence"),
            "heads": Symbol(size=HEADS, kind="heads"),
            "columns": Symbol(size=COLUMNS, kind="columns"),
        },
        kinds=kinds,
        segments=tuple(segments),
        tensors=tuple(tensors),
    )


_Shape = tuple[tuple[int, ...], ShardGroup | None]
_WIDTH = HIDDEN // HEADS


def _heads(axis: int) -> ShardGroup:
    return ShardGroup(symbol="heads", axis=axis, block=_WIDTH)


def _columns(axis: int) -> ShardGroup:
    return ShardGroup(symbol="columns", axis=axis, block=1)


_NORM: dict[str, _Shape] = {"norm.weight": ((HIDDEN,), None), "norm.bias": ((HIDDEN,), None)}
_EMBEDDING: dict[str, _Shape] = {
    "token": ((VOCABULARY, HIDDEN), None),
    "position": ((POSITIONS, HIDDEN), None),
    "type": ((2, HIDDEN), None),
    **_NORM,
}
_HEAD: dict[str, _Shape] = {"pooler": ((HIDDEN, HIDDEN), None), "pooler.bias": ((HIDDEN,), None)}
_ATTENTION: dict[str, _Shape] = {
    **{f"{name}.weight": ((HIDDEN, HIDDEN), _heads(0)) for name in ("query", "key", "value")},
    **{f"{name}.bias": ((HIDDEN,), _heads(0)) for name in ("query", "key", "value")},
    "projection.weight": ((HIDDEN, HIDDEN), _heads(1)),
    "projection.bias": ((HIDDEN,), None),
    **_NORM,
}
_MLP: dict[str, _Shape] = {
    "up.weight": ((COLUMNS, HIDDEN), _columns(0)),
    "up.bias": ((COLUMNS,), _columns(0)),
    "down.weight": ((HIDDEN, COLUMNS), _columns(1)),
    "down.bias": ((HIDDEN,), None),
    **_NORM,
}


def _tensor(name: str, shape: tuple[int, ...], shard: ShardGroup | None) -> Tensor:
    return Tensor(
        name=name,
        shape=shape,
        dtype="float32",
        binding="trainable",
        initialiser=Initialiser(kind="zeros"),
        decay=True,
        shard=shard,
    )


def bert_question(letters: str, kind: Kind, *, memory_bytes: int = 1 << 40) -> Question:
    """16 samples of 32 tokens as 4 microbatches of 4, on equal devices over 100 Mbit/s."""
    described = bert_base(sequence=32)
    peers = [
        dataclasses.replace(
            profile(letter, [], memory_bytes=memory_bytes),
            kinds=dict.fromkeys(described.kinds, KindCost(forward_ns=10**7, backward_ns=2 * 10**7)),
        )
        for letter in letters
    ]
    links = tuple(
        LinkEstimate(first=device(a), second=device(b), latency_ns=0, bytes_per_s=12_500_000)
        for i, a in enumerate(letters)
        for b in letters[i + 1 :]
    )
    return Question(
        manifest=described,
        contract=contract(microbatches=4, microbatch_size=4),
        devices=devices(peers),
        links=links,
        stage_memory=lambda segments, holds: len(segments) * (10 + holds.in_flight),
        kinds=(kind,),
    )
