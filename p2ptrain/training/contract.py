"""The numerics contract of a run: everything that decides the bits of the loss curve.

It is fixed when the run starts, saved with every checkpoint and immutable across views
(DESIGN section 10). Two runs with equal contracts have equal loss curves, wherever their stages
are placed.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from typing import Final

from p2ptrain import limits
from p2ptrain.ids import Digest
from p2ptrain.training.owners import DataOwner
from p2ptrain.wire.codec import to_plain

CONTRACT_VERSION: Final = 2
CODECS_OF_RUNS: Final = ("fp32", "bf16", "int8")
"""How boundary tensors go between peers (PROTOCOL.md section 6.7)."""
PARALLELISMS: Final = ("pipeline", "auto", "data", "tensor", "sequence", "hybrid")
"""Pipelines have the bits of one peer; under the others the order of sums follows from the plan."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeBuild:
    """What computes on a peer; peers with different builds agree within tolerance only."""

    runtime: str
    """onnxruntime-training or onnxruntime."""
    version: str
    numpy: str
    machine: str
    """x86_64, aarch64."""
    isa: str
    """Instruction-set class: avx512, avx2, neon, ..."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerChoice:
    """The update rule and its hyperparameters; `peak_learning_rate` after the warm-up."""

    name: str = "adamw"
    """adamw or sgd."""
    peak_learning_rate: float = 3e-3
    final_learning_rate: float = 3e-4
    warmup_steps: int = 20
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    momentum: float = 0.9
    clip_norm: float = 1.0
    """Global gradient norm is scaled down to this; 0 switches clipping off."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contract:
    """One run's numerics contract; valid by construction."""

    bundle: Digest
    seed: int
    steps: int
    microbatch_size: int
    microbatches: int
    form: str
    codec: str
    """One of CODECS_OF_RUNS."""
    threads: int
    dropout: float | None
    """Overrides every dropout site's probability; None keeps the bundle's own."""
    optimizer: OptimizerChoice
    training_data: Digest
    heldout_data: Digest
    evaluate_every: int
    """Steps between held-out evaluations; 0: only before the first and after the last."""
    heldout_microbatches: int
    """Microbatches of one held-out evaluation."""
    builds: tuple[RuntimeBuild, ...]
    """The set of runtime builds that take part, sorted."""
    rematerialise: bool = False
    """Keep only each segment's inputs for the backward, which runs the forward again."""
    parallelism: str = "pipeline"
    """One of PARALLELISMS: which plans the run may have."""
    owners: tuple[DataOwner, ...] = ()
    """Whose data it trains on, by rank, where each feeds its own; else the home peer feeds all."""
    version: int = CONTRACT_VERSION

    def __post_init__(self) -> None:
        problem = _problem(self)
        if problem is not None:
            raise ValueError(problem)

    @property
    def minibatch_size(self) -> int:
        """Samples per step."""
        return self.microbatch_size * self.microbatches

    def at_size(self, microbatch_size: int, *, rematerialise: bool) -> Contract:
        """The same with microbatches of another size, in each step as many samples or, where they
        do not divide evenly, a few more; fewer where that would be too many microbatches."""
        count = min(-(-self.minibatch_size // microbatch_size), limits.MICROBATCHES_MAX)
        return replace(
            self, microbatch_size=microbatch_size, microbatches=count, rematerialise=rematerialise
        )

    @property
    def exactness(self) -> str:
        """`exact` or `within tolerance`, and why, in one phrase."""
        if len(self.builds) > 1:
            return f"within tolerance: {len(self.builds)} different runtime builds take part"
        if self.owners:
            return "exact for these owners: each feeds its own data, and sums follow their order"
        if self.parallelism != "pipeline":
            return (
                "within tolerance: several peers may share a stage "
                f"(--parallelism {self.parallelism}), so sums follow the plan"
            )
        if self.codec != "fp32":
            return (
                f"exact for one placement: {self.codec} rounds what crosses between peers, so "
                "other cuts give other bits"
            )
        return "exact: one runtime build on every peer"

    @property
    def digest(self) -> Digest:
        plain = to_plain(self)
        if self.parallelism == "pipeline":
            del plain["parallelism"]  # runs from before there was a choice keep their digests
        if not self.owners:
            del plain["owners"]  # and so do those from before data had owners
        document = json.dumps(plain, sort_keys=True, separators=(",", ":"))
        return Digest(hashlib.sha256(document.encode()).hexdigest())


def _problem(contract: Contract) -> str | None:
    if contract.version != CONTRACT_VERSION:
        return f"contract version {contract.version} is unknown"
    if contract.steps < 1 or contract.microbatch_size < 1 or contract.threads < 1:
        return "steps, microbatch size and threads are at least 1"
    if not 1 <= contract.microbatches <= limits.MICROBATCHES_MAX:
        return f"microbatches must be between 1 and {limits.MICROBATCHES_MAX}"
    if not 1 <= contract.heldout_microbatches <= limits.MICROBATCHES_MAX:
        return f"held-out microbatches must be between 1 and {limits.MICROBATCHES_MAX}"
    if contract.evaluate_every < 0:
        return "steps between evaluations are 0 or more"
    if contract.dropout is not None and not 0.0 <= contract.dropout < 1.0:
        return "dropout is a probability below 1"
    if contract.form not in ("portable", "training"):
        return f"unknown graph form {contract.form!r}"
    if contract.codec not in CODECS_OF_RUNS:
        return f"unknown codec {contract.codec!r}"
    if contract.parallelism not in PARALLELISMS:
        return f"unknown parallelism {contract.parallelism!r}"
    if contract.optimizer.name not in ("adamw", "sgd"):
        return f"unknown optimizer {contract.optimizer.name!r}"
    if contract.seed < 0 or contract.seed >= 1 << 63:
        return "the seed is an integer from 0 to 2^63 - 1"
    return _owners_problem(contract) if contract.owners else None


def _owners_problem(contract: Contract) -> str | None:
    devices = [owner.device for owner in contract.owners]
    if len(devices) < 2 or len(set(devices)) != len(devices):
        return "a run on its owners' data has two owners or more, each once"
    if sum(owner.microbatches for owner in contract.owners) != contract.microbatches:
        return "the owners' microbatches are those of a step"
    if contract.heldout_microbatches < contract.microbatches:
        return "an evaluation has a microbatch of every owner, so as many as a step"
    if contract.parallelism != "data":
        return "owners of data are replicas of the whole model"
    return None
