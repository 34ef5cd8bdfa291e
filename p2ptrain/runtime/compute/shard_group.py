"""All shards of a model in one process: what a replay of lost shards runs, blocking.

Every rank computes what it computes on a peer of its own, and terms are added in rank order, so
the bits are those of the peers.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce

import numpy as np
from numpy.typing import NDArray

from p2ptrain.bundle.manifest import Loss
from p2ptrain.bundle.sharding import Mode
from p2ptrain.engine.contract import Array, Engine
from p2ptrain.errors import InvariantBroken
from p2ptrain.runtime.compute.shard_worker import ShardWorker
from p2ptrain.store.bundles import Bundle
from p2ptrain.training.contract import Contract
from p2ptrain.training.exchanges import together
from p2ptrain.training.segment_state import SegmentState
from p2ptrain.training.shard_cuts import Share
from p2ptrain.training.shard_states import join_states


class ShardGroup:
    """One worker for each rank, in step with each other."""

    def __init__(
        self,
        *,
        engine: Engine,
        bundle: Bundle,
        contract: Contract,
        mode: Mode,
        shares: tuple[int, ...],
        weights: Mapping[str, Array] | None = None,
    ) -> None:
        """As `ShardWorker`; `shares` are the weights of the plan's stage, by rank."""
        self._manifest = bundle.manifest
        self.workers = [
            ShardWorker(
                engine=engine,
                bundle=bundle,
                contract=contract,
                share=Share(mode=mode, weights=shares, rank=rank),
                weights=weights,
            )
            for rank in range(len(shares))
        ]

    @property
    def loss(self) -> Loss:
        """What the model ends in."""
        return self._manifest.loss

    @property
    def segments(self) -> range:
        """The whole model's."""
        return self.workers[0].segments

    @property
    def applied_step(self) -> int | None:
        """As a worker's; None while they differ."""
        steps = {worker.applied_step for worker in self.workers}
        return steps.pop() if len(steps) == 1 else None

    def draw_parameters(self) -> None:
        """Start afresh."""
        for worker in self.workers:
            worker.draw_parameters()

    def load(self, segment_index: int, state: SegmentState) -> None:
        """Take over one segment's whole state; errors as those of a worker."""
        for worker in self.workers:
            worker.load(segment_index, state)

    def state(self, segment_index: int, step: int) -> SegmentState:
        """One segment's whole state after `step` updates."""
        states = [worker.state(segment_index, step) for worker in self.workers]
        share = self.workers[0].share
        return join_states(self._manifest, share, segment_index, states)

    def forward(
        self,
        *,
        step: int,
        microbatch: int,
        inputs: tuple[Array, ...],
        labels: Array,
        loss_weight: float,
    ) -> float:
        """The loss of one microbatch."""
        return together([
            worker.forward(
                step=step,
                microbatch=microbatch,
                inputs=inputs,
                labels=labels,
                loss_weight=loss_weight,
            )
            for worker in self.workers
        ])[0]  # fmt: skip

    def evaluate(self, *, inputs: tuple[Array, ...], labels: Array, loss_weight: float) -> float:
        """The loss of one microbatch without dropout."""
        return together([
            worker.evaluate(inputs=inputs, labels=labels, loss_weight=loss_weight)
            for worker in self.workers
        ])[0]  # fmt: skip

    def backward(self) -> None:
        """Of the microbatch in flight."""
        together([worker.backward() for worker in self.workers])

    def sum_gradients(self) -> None:
        """Once, after the last backward of a step."""
        together([worker.sum_gradients() for worker in self.workers])

    def square_sums(self) -> NDArray[np.float64]:
        """Of the model's gradients: each rank's, added in rank order."""
        return reduce(np.add, [worker.square_sums() for worker in self.workers])

    def update(self, *, step: int, learning_rate: float, clip_scale: float) -> None:
        """Apply a step's update."""
        for worker in self.workers:
            worker.update(step=step, learning_rate=learning_rate, clip_scale=clip_scale)

    def abandon_step(self) -> None:
        """Forget what a step has begun."""
        for worker in self.workers:
            worker.abandon_step()


class WholeStates:
    """States of segments without anything that runs them: what others ask a replayer for, and what
    its own next part is made of, while that takes the memory."""

    def __init__(self, segments: range) -> None:
        """Of these segments, none of which is there yet."""
        self.segments = segments
        self._states: dict[int, SegmentState] = {}

    @property
    def applied_step(self) -> int | None:
        """Of every segment; None before all are there."""
        steps = {state.step for state in self._states.values()}
        return steps.pop() if set(self._states) == set(self.segments) and len(steps) == 1 else None

    def load(self, segment_index: int, state: SegmentState) -> None:
        """Keep one segment's."""
        self._states[segment_index] = state

    def state(self, segment_index: int, step: int) -> SegmentState:
        """One segment's; `step` is that of all."""
        if step != self.applied_step:
            raise InvariantBroken(f"states of step {self.applied_step}, not {step}")
        return self._states[segment_index]


def joined_states(group: ShardGroup, step: int) -> WholeStates:
    """What shards that have made `step` have come to, copied."""
    states = WholeStates(group.segments)
    for index in group.segments:
        states.load(index, group.state(index, step))
    return states
