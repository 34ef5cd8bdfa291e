"""One shard of the whole model: forward, backward and update on slices, blocking.

The counterpart of `StageWorker` for what several peers compute together. What needs all of them
(`forward`, `evaluate`, `backward`, `sum_gradients`) is a generator that yields meetings and is sent
what comes of them (`training.exchanges`); a shard comes to them in the same order as all others.
One microbatch is in flight: its forward, then its backward.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from p2ptrain.bundle.manifest import Tensor
from p2ptrain.engine.contract import Array, Buffer, Engine
from p2ptrain.errors import ConfigError, InvariantBroken
from p2ptrain.runtime.compute.segment_memory import SegmentMemory
from p2ptrain.runtime.compute.segment_runner import (
    Boundary,
    ConstantBuffers,
    Fed,
    StageSetting,
)
from p2ptrain.runtime.compute.shard_segment import ShardSegment, compile_parts, runs_backward
from p2ptrain.runtime.compute.shard_sums import ShardSums
from p2ptrain.runtime.compute.stage_updater import StageUpdater
from p2ptrain.runtime.compute.starting_values import starting_value
from p2ptrain.runtime.compute.whole_segment import WholeSegment
from p2ptrain.store.bundles import Bundle
from p2ptrain.training.barrier import stage_tensor_indices
from p2ptrain.training.boundaries import cotangent_positions
from p2ptrain.training.contract import Contract
from p2ptrain.training.exchanges import Exchanges
from p2ptrain.training.layout import flat_layout
from p2ptrain.training.segment_image import SegmentImage
from p2ptrain.training.segment_state import SegmentState, StateHeader
from p2ptrain.training.shard_cuts import KindCuts, Share, sharding_of, tensor_cuts
from p2ptrain.training.shard_shapes import ShardPlace
from p2ptrain.training.shard_states import cut_state, no_residuals, slice_shapes


class ShardWorker:
    """Slices of parameters, optimizer state and gradients, and the graphs, of one shard."""

    def __init__(
        self,
        *,
        engine: Engine,
        bundle: Bundle,
        contract: Contract,
        share: Share,
        weights: Mapping[str, Array] | None = None,
    ) -> None:
        """Compile, allocate and bind; what is trained is zero until drawn or loaded.

        Args:
            engine: With the contract's threads.
            bundle: Of the model.
            contract: Of the run.
            share: Which shard of how many.
            weights: As `StageWorker` has them, of all segments.

        Raises:
            ConfigError: shards cannot keep the contract.
            PlanInfeasible: the bundle cannot be sharded so.
            BundleError: the weights do not fit the manifest.
            GraphError, EngineError: the bundle cannot run here.
        """
        check_shards(bundle, contract)
        self._engine, self._bundle, self._manifest = engine, bundle, bundle.manifest
        self._contract, self._share, self._weights = contract, share, weights
        self._sharding = sharding_of(bundle.manifest, share.mode)
        self._rule = bundle.manifest.updates[contract.optimizer.name]
        self._cuts = {
            name: KindCuts(bundle.manifest, self._sharding.kinds.get(name), share.weights)
            for name in bundle.manifest.kinds
        }
        self._tensor_cuts = {
            name: cut
            for index in self.segments
            for name, cut in tensor_cuts(bundle.manifest, share, index).items()
        }
        self._memories = {index: self._make_memory(index) for index in self.segments}
        self._segments = self._make_segments()
        self._updater = StageUpdater(engine, bundle, contract.optimizer, self._memories.values())
        self._sums = ShardSums(
            bundle.manifest,
            self._sharding,
            self._tensor_cuts,
            share,
            memories=self._memories,
            sites=[segment.sites for segment in self._segments],
        )
        self._begun = False
        self._accumulated = 0
        self._summed = False
        self._steps: dict[int, int] = {}

    @property
    def segments(self) -> range:
        """The whole model's."""
        return range(len(self._manifest.segments))

    @property
    def share(self) -> Share:
        """Which shard this is."""
        return self._share

    @property
    def contract(self) -> Contract:
        """Of the run."""
        return self._contract

    @property
    def tensor_indices(self) -> tuple[int, ...]:
        """Manifest indices of all tensors, ascending: the order of `square_sums`."""
        return stage_tensor_indices(self._manifest, self.segments)

    @property
    def has_whole_states(self) -> bool:
        """Whether every shard has every parameter whole, and so each segment's state."""
        return not self._tensor_cuts

    @property
    def applied_step(self) -> int | None:
        """Updates applied to every segment; None before all were drawn or loaded, and while they
        were loaded from different steps."""
        steps = {self._steps.get(index) for index in self.segments}
        return steps.pop() if len(steps) == 1 else None

    @property
    def gradients_complete(self) -> bool:
        """Every backward of the step is done and gradients are summed: only its update is
        missing."""
        return self._accumulated == self._contract.microbatches and self._summed

    def draw_parameters(self) -> None:
        """Start afresh: the bundle's weights, else seeded values; optimizer state zero.

        A step under way is abandoned.
        """
        self.abandon_step()
        for memory in self._memories.values():
            memory.start(self._starting_slice)
        self._steps = dict.fromkeys(self.segments, 0)

    def load(self, segment_index: int, state: SegmentState) -> None:
        """Take over this shard's slices of one segment's whole saved state and abandon a step
        under way.

        Raises:
            CheckpointError: it does not fit; the segment is to be loaded or drawn again.
        """
        slices = cut_state(self._manifest, self._share, segment_index, state)
        self.load_slices(segment_index, slices)

    def load_slices(self, segment_index: int, state: SegmentState) -> None:
        """As `load`, from what `state` of the same shard gave."""
        self.abandon_step()
        self._steps.pop(segment_index, None)
        self._memories[segment_index].load_state(state)
        self._steps[segment_index] = state.step

    def state(self, segment_index: int, step: int) -> SegmentState:
        """A copy of this shard's slices of one segment's state after `step` updates;
        `training.shard_states` joins those of all shards."""
        state = self._memories[segment_index].copy_state(step)
        residuals = no_residuals(self._manifest, self._contract, segment_index)
        return dataclasses.replace(state, residuals=residuals)

    def image(self, header: StateHeader) -> SegmentImage:
        """The file of this shard's slices of a segment as they are now, without residuals."""
        slices = slice_shapes(self._manifest, self._share, header.segment)
        image = SegmentImage(self._manifest, header, self._rule.state, None, slices)
        self._memories[header.segment].copy_into(image.state)
        return image

    def forward(
        self,
        *,
        step: int,
        microbatch: int,
        inputs: tuple[Array, ...],
        labels: Array,
        loss_weight: float,
    ) -> Exchanges[float]:
        """Run all segments on one microbatch and keep what its backward needs.

        Args:
            step: Counted from 1; with `microbatch` it decides the dropout masks.
            microbatch: Index within the step.
            inputs: One array per data port, in port order, whole.
            labels: Of the labels port's shape, whole.
            loss_weight: Factor of the summed loss, as `training.loss` gives it.

        Returns:
            The loss of the whole microbatch, the same at every shard. It may be infinite or NaN:
            abandon the step.

        Raises:
            EngineError: the runtime failed; the microbatch is lost.
        """
        if self._begun:
            raise InvariantBroken("a shard has one microbatch in flight")
        self._begun = True
        fed = Fed(inputs=inputs, labels=labels, loss_weight=loss_weight)
        loss: float | None = None
        for segment in self._segments:
            loss = yield from segment.forward(step=step, microbatch=microbatch, fed=fed)
        return _there(loss)

    def evaluate(
        self, *, inputs: tuple[Array, ...], labels: Array, loss_weight: float
    ) -> Exchanges[float]:
        """The loss of one microbatch without dropout and with the last update's running values;
        nothing is kept for a backward."""
        if self._begun:
            raise InvariantBroken("evaluation while a microbatch is in flight")
        fed = Fed(inputs=inputs, labels=labels, loss_weight=loss_weight)
        loss: float | None = None
        for segment in self._segments:
            loss = yield from segment.evaluate(fed=fed)
        return _there(loss)

    def backward(self) -> Exchanges[None]:
        """Run all segments backwards on the microbatch in flight and add its gradients to the
        sum. Microbatches come in their order, which is part of the contract."""
        if not self._begun:
            raise InvariantBroken("a backward before its forward")
        for segment in reversed(self._segments):
            yield from segment.backward(first=self._accumulated == 0)
        self._begun = False
        self._accumulated += 1

    def sum_gradients(self) -> Exchanges[None]:
        """Add up over shards the gradients of which each has a term, then tied ones over their
        copies: once, after the last backward of a step and before `square_sums`."""
        if self._begun or self._summed or self._accumulated == 0:
            raise InvariantBroken("gradients are summed once, after every backward of a step")
        yield from self._sums.run()
        self._summed = True

    def square_sums(self) -> NDArray[np.float64]:
        """Square sums of this shard's gradients, one per tensor as `tensor_indices` orders; those
        of all shards add up to the model's.

        Each shard reports its slices, the first one also what is not sliced. Frozen tensors and
        copies of tied ones give 0; what is not finite gives infinity or NaN.
        """
        self._check_summed()
        tensors = [self._manifest.tensors[index] for index in self.tensor_indices]
        return self._updater.square_sums(tensors, self._reports)

    def update(self, *, step: int, learning_rate: float, clip_scale: float) -> None:
        """Apply the step's update to this shard's slices, and start a new sum; arguments as those
        of `StageWorker.update`."""
        self._check_summed()
        self._updater.apply(step=step, learning_rate=learning_rate, clip_scale=clip_scale)
        self._accumulated, self._summed = 0, False
        self._steps = dict.fromkeys(self.segments, step)

    def abandon_step(self) -> None:
        """Forget the microbatch in flight, gradients and what the step's forwards made of running
        values: parameters and committed running values stay as they are."""
        for memory in self._memories.values():
            memory.abandon_running()
        self._begun, self._accumulated, self._summed = False, 0, False

    def _check_summed(self) -> None:
        if self._begun or not self._summed:
            raise InvariantBroken("gradients were not summed before they were used")

    def _reports(self, tensor: Tensor) -> bool:
        sliced = tensor.name in self._tensor_cuts
        return tensor.tied_to is None and (sliced or self._share.rank == 0)

    def _starting_slice(self, tensor: Tensor) -> Array:
        """Of a tensor whose shape may be a slice's."""
        cut, whole = self._tensor_cuts.get(tensor.name), self._manifest.tensor(tensor.name)
        value = starting_value(
            self._manifest, whole, seed=self._contract.seed, weights=self._weights
        )
        return value if cut is None else cut.slice(value, self._share.rank)

    def _make_memory(self, index: int) -> SegmentMemory:
        slices = slice_shapes(self._manifest, self._share, index)
        layout = flat_layout(self._manifest, index, slices)
        return SegmentMemory(self._engine, layout, self._rule.state)

    def _frozen(self, segment_index: int) -> dict[str, Array]:
        """The constants of a segment's graphs, by local name."""
        kind = self._manifest.kinds[self._manifest.segments[segment_index].kind]
        tensors = self._manifest.segment_tensors(segment_index)
        return {
            value.name: self._starting_slice(tensor)
            for value, tensor in zip(kind.parameters, tensors, strict=True)
            if tensor.binding == "frozen"
        }

    def _make_segments(self) -> list[ShardSegment | WholeSegment]:
        memories = self._memories.values()
        longest = max(memory.gradients.size for memory in memories)
        running = max(memory.running.size for memory in memories)
        setting = StageSetting(
            engine=self._engine,
            manifest=self._manifest,
            contract=self._contract,
            slots=1,
            delayed=0,
            scratch=self._engine.allocate((longest,), np.float32).host(),
            running_scratch=self._engine.allocate((running,), np.float32).host(),
            constants=ConstantBuffers(self._engine),
            kind_stashes={},
        )
        edges = [self._boundary(index) for index in range(len(self.segments) + 1)]
        kind_values: dict[str, dict[str, Buffer]] = {}
        return [self._make_segment(setting, index, edges, kind_values) for index in self.segments]

    def _make_segment(
        self, setting: StageSetting, index: int, edges: list[Boundary],
        kind_values: dict[str, dict[str, Buffer]],
    ) -> ShardSegment | WholeSegment:  # fmt: skip
        kind = self._manifest.segments[index].kind
        sharded, memory = self._sharding.kinds.get(kind), self._memories[index]
        constants = self._frozen(index)
        if sharded is None:
            return WholeSegment.make(
                setting, self._bundle, index, constants, memory, (edges[index], edges[index + 1])
            )
        programs = compile_parts(
            self._engine,
            self._bundle,
            sharded,
            constants,
            runs_backward=runs_backward(self._manifest, index),
        )
        return ShardSegment(
            setting,
            place=ShardPlace(
                sharded=sharded, cuts=self._cuts[kind], rank=self._share.rank, segment_index=index
            ),
            programs=programs,
            memory=memory,
            entering=edges[index],
            leaving=edges[index + 1],
            kind_values=kind_values.setdefault(kind, {}),
        )

    def _boundary(self, index: int) -> Boundary:
        """One place for each value before a segment, as this shard has it; none at the ends."""
        if index == 0 or index == len(self.segments):
            return Boundary(activations=(), cotangents=())
        manifest = self._manifest
        values = manifest.boundary(index - 1)
        names = [manifest.segments[i].kind for i in (index - 1, index)]
        cuts = self._cuts[names[0]].cuts
        differentiable = cotangent_positions(*(manifest.kinds[name] for name in names))
        rings = []
        for value in values:
            shape = manifest.shape(value, batch=self._contract.microbatch_size)
            if (cut := cuts.get(value.name)) is not None:
                shape = cut.shape(shape, self._share.rank)
            rings.append((shape, np.dtype(value.dtype)))
        return Boundary(
            activations=tuple((self._engine.allocate(*ring),) for ring in rings),
            cotangents=tuple(
                (self._engine.allocate(*ring),) if has_cotangent else None
                for ring, has_cotangent in zip(rings, differentiable, strict=True)
            ),
        )


def check_shards(bundle: Bundle, contract: Contract) -> None:
    """Refuse a contract that shards cannot keep.

    Raises:
        ConfigError: the sentence says which part of it.
    """
    if contract.form != "portable":
        raise ConfigError(
            f"a model is sharded in its portable form, not in {contract.form}",
            hint="train with --form portable, or without sharding",
        )
    if contract.rematerialise:
        raise ConfigError(
            "shards keep their stash: what they exchange in a forward is not exchanged again",
            hint="train without rematerialisation, or without sharding",
        )
    if contract.optimizer.name not in bundle.manifest.updates:
        raise ConfigError(f"the bundle has no optimizer {contract.optimizer.name!r}")


def _there(loss: float | None) -> float:
    if loss is None:
        raise InvariantBroken("the last segment has no loss")
    return loss
