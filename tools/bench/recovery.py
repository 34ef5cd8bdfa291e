"""What logging and replication cost: figures from turns with and without them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from p2ptrain import limits
from p2ptrain.planner.replica_interval import ReplicaInterval, StageCosts, replica_interval
from p2ptrain.units import NS_PER_S
from tools.bench.ratios import Spread, spread

OVERHEAD_MAX: Final = 0.03
FLOAT32_BYTES: Final = 4
ADAM_VECTORS: Final = 3
"""Parameters and two moments."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryTurn:
    """One turn: whole replica intervals after those that warm up."""

    wall_s: float
    cpu_s: float
    """Of all peers together."""
    steps: int
    sets: int
    """Replica sets of which every segment was durable elsewhere, as the home peer said."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """What the boundary tensors and the replicas of one pair of peers take of a link."""

    bytes_per_s: float
    set_bytes: int
    """Of one peer's share of a replica set."""
    step_bytes: int
    """Of boundary tensors in one direction and step."""
    step_tensors: int
    """Boundary tensors in one direction and step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkCost:
    """What a set's transfer adds to training on a link, per step of the interval."""

    transfer_s: float
    """Of one set, at the link's rate, while training goes on."""
    delay_share_max: float
    """Of the step time: every tensor that is sent meanwhile waits for one whole chunk."""
    serial_share: float
    """Of the step time, if nothing overlapped: more than this it can never be."""


def overheads(with_: Sequence[float], without: Sequence[float]) -> Spread:
    """The share that `with_` takes more than `without`, one figure per round."""
    return spread([a / b - 1.0 for a, b in zip(with_, without, strict=True)])


def link_cost(link: Link, *, step_s: float, interval: int) -> LinkCost:
    """What replica sets every `interval` steps of `step_s` add on a link.

    No bulk frame is begun while a tensor waits (PROTOCOL.md section 2), so a tensor waits for one
    chunk at most, and the transfer takes what the tensors leave of the link.
    """
    left = max(link.bytes_per_s - link.step_bytes / step_s, link.bytes_per_s * 0.01)
    transfer_s = link.set_bytes / left
    chunk_s = limits.BULK_CHUNK_BYTES_MAX / link.bytes_per_s
    delay_s = transfer_s / step_s * link.step_tensors * chunk_s
    span_s = interval * step_s
    return LinkCost(
        transfer_s=transfer_s,
        delay_share_max=delay_s / span_s,
        serial_share=link.set_bytes / link.bytes_per_s / span_s,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Transformer:
    """A model of equal blocks, cut evenly."""

    parameters: int
    width: int
    sequence: int
    samples: int
    """Of a minibatch."""
    peers: int
    flops_per_s: float
    """Of one peer."""


BERT_BASE: Final = Transformer(
    parameters=102_000_000, width=768, sequence=32, samples=16, peers=4, flops_per_s=100e9
)
"""With a vocabulary of 21,128, on four small computers."""


def predicted_interval(model: Transformer, *, bytes_per_s: float) -> ReplicaInterval:
    """What the planner's rule gives for a model whose every stage is one `peers`-th of it.

    Compute is six floating-point operations per parameter and token; a peer logs one activation
    or one cotangent for each token at each of its two boundaries, in float32.
    """
    tokens = model.samples * model.sequence
    compute_s = 6 * model.parameters / model.peers * tokens / model.flops_per_s
    return interval_of(
        parameters=model.parameters // model.peers,
        log_bytes=2 * FLOAT32_BYTES * tokens * model.width,
        step_s=compute_s,
        bytes_per_s=bytes_per_s,
    )


def interval_of(
    *, parameters: int, log_bytes: int, step_s: float, bytes_per_s: float
) -> ReplicaInterval:
    """What the planner's rule gives for equal stages that compute for a whole step each."""
    step_ns = round(step_s * NS_PER_S)
    stage = StageCosts(
        state_bytes=FLOAT32_BYTES * ADAM_VECTORS * parameters,
        log_bytes=log_bytes,
        compute_ns=step_ns,
        bytes_per_s=round(bytes_per_s),
    )
    return replica_interval([stage], step_ns=step_ns)
