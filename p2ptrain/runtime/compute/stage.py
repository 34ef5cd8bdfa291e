"""A stage's compute: consecutive segments, forward, backward and update, blocking.

Called from one worker thread; only arrays cross to the event loop. `sequence` counts every
microbatch that the stage runs, training or evaluation. Boundary arrays are named by it and stay
valid until the ring wraps round, `holds.at_edges` microbatches later.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from p2ptrain.bundle.manifest import Manifest, Tensor
from p2ptrain.engine.contract import Array, Engine
from p2ptrain.errors import ConfigError, InvariantBroken
from p2ptrain.runtime.compute.segment_memory import FloatArray, SegmentMemory
from p2ptrain.runtime.compute.segment_programs import SegmentPrograms, compile_programs
from p2ptrain.runtime.compute.segment_runner import (
    Boundary,
    ConstantBuffers,
    Fed,
    SegmentRunner,
    StageSetting,
)
from p2ptrain.runtime.compute.stage_residuals import load_residuals, residuals
from p2ptrain.runtime.compute.stage_rings import RingMaker, places
from p2ptrain.runtime.compute.stage_updater import StageUpdater
from p2ptrain.runtime.compute.starting_values import starting_value
from p2ptrain.schedule.actions import ONE, Held
from p2ptrain.store.bundles import Bundle
from p2ptrain.training.barrier import stage_tensor_indices
from p2ptrain.training.contract import Contract
from p2ptrain.training.layout import flat_layout
from p2ptrain.training.segment_image import SegmentImage
from p2ptrain.training.segment_state import SegmentState, StateHeader
from p2ptrain.training.tensor_codec import (
    ErrorFeedback,
    ResidualKey,
    decode,
    encode_all,
    hand_over,
)
from p2ptrain.training.ties import TieGroup, tie_groups, tied_gradient


@dataclass(frozen=True, slots=True, kw_only=True)
class StageStatistics:
    """Microbatches and updates of one stage; a microbatch counts once, whatever its segments."""

    forward_count: int
    evaluation_count: int
    backward_count: int
    update_count: int
    parameter_count: int


class StageWorker:
    """Parameters, optimizer state and graphs of one stage."""

    def __init__(
        self,
        *,
        engine: Engine,
        bundle: Bundle,
        segments: range,
        contract: Contract,
        holds: Held = ONE,
        weights: Mapping[str, Array] | None = None,
        cuts: Collection[int] = (),
    ) -> None:
        """Compile, allocate and bind; what is trained is zero until drawn or loaded.

        Args:
            engine: With the contract's threads.
            bundle: Of the model.
            segments: The stage's.
            contract: Of the run.
            holds: Microbatches that it has room for. With none `delayed` every backward is whole.
            weights: By name, every tensor of these segments that the bundle's weights hold; best
                `numpy.memmap`, whose frozen tensors are then not copied. None draws them like the
                others, which is good for measuring only.
            cuts: Segments inside the stage after which a link was when its steps were made: what
                crosses there is rounded by the contract's codec again.

        Raises:
            ConfigError: the bundle lacks the contract's graph form or optimizer.
            BundleError: the weights do not fit the manifest.
            GraphError, EngineError: the bundle cannot run here.
        """
        manifest = bundle.manifest
        _check_contract(manifest, contract, segments, holds)
        self._engine, self._manifest = engine, manifest
        self._contract, self._segments = contract, segments
        self._held, self._weights = holds, weights
        self._rule = manifest.updates[contract.optimizer.name]
        self._memories = {
            index: SegmentMemory(engine, flat_layout(manifest, index), self._rule.state)
            for index in segments
        }
        rings = self._ring_maker()
        edges = range(segments.start, segments.stop + 1)
        self._boundaries = [rings.boundary(index) for index in edges]
        lossy = contract.codec != "fp32"
        self._cuts = {cut: rings.boundary(cut + 1) for cut in (cuts if lossy else ())}
        self._runners = self._make_runners(bundle)
        self._feedback = ErrorFeedback(contract.codec)
        self._updater = StageUpdater(engine, bundle, contract.optimizer, self._memories.values())
        self._waiting: set[int] = set()
        self._passed_back = self._accumulated = 0
        self._ties = self._find_ties()
        self._ties_summed = self._reduced = False
        self._share, self._has_siblings = contract.microbatches, False
        self._tensor_indices = stage_tensor_indices(manifest, segments)
        self._steps: dict[int, int] = {}
        self._forward_count = self._evaluation_count = self._backward_count = self._update_count = 0

    @property
    def tensor_indices(self) -> tuple[int, ...]:
        """Manifest indices of the stage's tensors, ascending: the order of `square_sums`."""
        return self._tensor_indices

    @property
    def segments(self) -> range:
        """The stage's."""
        return self._segments

    @property
    def holds(self) -> Held:
        """How many microbatches it has room for."""
        return self._held

    @property
    def contract(self) -> Contract:
        """Of the run."""
        return self._contract

    @property
    def rounds_inside(self) -> bool:
        """Whether a lossy codec is applied between two segments of the stage."""
        return bool(self._cuts)

    @property
    def applied_step(self) -> int | None:
        """Updates applied to every segment; None before all were drawn or loaded, and while they
        were loaded from different steps."""
        steps = {self._steps.get(index) for index in self._segments}
        return steps.pop() if len(steps) == 1 else None

    @property
    def gradients_complete(self) -> bool:
        """Every backward of the step is done, over all replicas, and ties are summed: only its
        update is missing."""
        whole = self._accumulated == self._share and not self._waiting
        whole = whole and (self._reduced or not self._has_siblings)
        return whole and (self._ties_summed or not self._ties)

    def statistics(self) -> StageStatistics:
        """What this stage has done since it was made."""
        return StageStatistics(
            forward_count=self._forward_count,
            evaluation_count=self._evaluation_count,
            backward_count=self._backward_count,
            update_count=self._update_count,
            parameter_count=sum(self._manifest.tensors[i].elements for i in self._tensor_indices),
        )

    def take_share(self, microbatches: int, *, has_siblings: bool) -> None:
        """Between two steps: from now on so many of a step's microbatches are run here, and the
        others by siblings, with whose gradients ours are added up before they count."""
        self._share, self._has_siblings = microbatches, has_siblings

    def draw_parameters(self) -> None:
        """Start afresh: the bundle's weights, else seeded values; optimizer state zero.

        A step under way is abandoned.
        """
        self.abandon_step()
        for memory in self._memories.values():
            memory.start(self._starting_value)
        self._feedback.restore({})
        self._steps = dict.fromkeys(self._segments, 0)

    def load(self, segment_index: int, state: SegmentState) -> None:
        """Take over one segment's saved state and abandon a step under way.

        Raises:
            CheckpointError: it does not fit; the segment is to be loaded or drawn again.
        """
        self.abandon_step()
        self._steps.pop(segment_index, None)
        self._memories[segment_index].load_state(state)
        load_residuals(self._feedback, self._manifest, self._contract, segment_index, state)
        self._steps[segment_index] = state.step

    def state(self, segment_index: int, step: int) -> SegmentState:
        """A copy of one segment's state after `step` updates."""
        state = self._memories[segment_index].copy_state(step)
        kept = {name: array.copy() for name, array in self._residuals(segment_index).items()}
        return dataclasses.replace(state, residuals=kept)

    def image(self, header: StateHeader) -> SegmentImage:
        """A segment's file with its present state, between two steps."""
        image = SegmentImage(self._manifest, header, self._rule.state, self._contract)
        self._memories[header.segment].copy_into(image.state)
        for name, residual in self._residuals(header.segment).items():
            np.copyto(image.state.residuals[name], residual)
        return image

    def encoded_cotangent(
        self, segment: int, *, microbatch: int, sequence: int
    ) -> tuple[Array, ...]:
        """What goes over the link for `crossing_cotangent`, once `backward` of that training
        microbatch is done; fp32 is the arrays themselves.

        Raises:
            NumericsError: int8 cannot carry what is not finite; abandon the step.
        """
        arrays, codec = self.crossing_cotangent(segment, sequence), self._contract.codec
        if codec != "int8":
            return encode_all(codec, arrays)
        keys = [
            ResidualKey(segment=segment, index=index, microbatch=microbatch)
            for index in range(len(arrays))
        ]
        return tuple(self._feedback.encode(k, a) for k, a in zip(keys, arrays, strict=True))

    def entry(self, sequence: int) -> tuple[Array, ...]:
        """Where the activations of a microbatch are received; empty for the first stage."""
        return places(self._boundaries[0].activations, sequence)

    def exit(self, sequence: int) -> tuple[Array, ...]:
        """The activations to send after `forward`; empty for the last stage."""
        return places(self._boundaries[-1].activations, sequence)

    def exit_cotangent(self, sequence: int) -> tuple[Array, ...]:
        """Where cotangents are received, one for each differentiable boundary value."""
        return places(self._boundaries[-1].cotangents, sequence)

    def entry_cotangent(self, sequence: int) -> tuple[Array, ...]:
        """The cotangents to send after `backward`; empty for the first stage."""
        return places(self._boundaries[0].cotangents, sequence)

    def crossing(self, segment: int, sequence: int) -> tuple[Array, ...]:
        """What `forward` let out of a segment of this stage, or into its first one from before;
        inner values are overwritten by a later microbatch."""
        return places(self._before(segment + 1).activations, sequence)

    def crossing_cotangent(self, segment: int, sequence: int) -> tuple[Array, ...]:
        """What `backward` gave back across the same boundary, one per differentiable value;
        inner values are overwritten by the next backward."""
        boundary = self._cuts.get(segment) or self._before(segment + 1)
        return places(boundary.cotangents, sequence)

    def forward(
        self,
        *,
        step: int,
        microbatch: int,
        sequence: int,
        training: bool,
        inputs: tuple[Array, ...] | None,
        labels: Array | None,
        loss_weight: float,
    ) -> float | None:
        """Run all segments on one microbatch.

        Args:
            step: Counted from 1; with `microbatch` it decides the dropout masks.
            microbatch: Index within the step.
            sequence: Names the boundary arrays and the stash slot.
            training: False evaluates: no dropout, the last update's running values, nothing kept
                for a backward.
            inputs: One array per data port, in port order, needed by the first stage.
            labels: Of the labels port's shape, needed by the last stage.
            loss_weight: Factor of the summed loss, as `training.loss` gives it.

        Returns:
            The loss on the last stage, else None. It may be infinite or NaN: abandon the step.

        Raises:
            EngineError: the runtime failed; the stage's stash is lost.
        """
        fed = Fed(inputs=inputs, labels=labels, loss_weight=loss_weight)
        loss: float | None = None
        if not training:
            if self._waiting:
                raise InvariantBroken("evaluation while microbatches are in flight")
            for runner in self._runners:
                loss = runner.evaluate(sequence=sequence, fed=fed)
            self._evaluation_count += 1
            return loss
        self._occupy(sequence)
        for segment, runner in zip(self._segments, self._runners, strict=True):
            loss = runner.forward(step=step, microbatch=microbatch, sequence=sequence, fed=fed)
            if (cut := self._cuts.get(segment)) is not None:
                beyond = places(cut.activations, sequence)
                hand_over(self._contract.codec, self.crossing(segment, sequence), beyond)
        self._forward_count += 1
        return loss

    def backward(self, *, microbatch: int, sequence: int) -> None:
        """Run all segments backwards on one microbatch and add its gradients to the sum.

        Calls come in microbatch order: the order of the additions is part of the contract.
        """
        for _ in self.backward_by_segment(microbatch=microbatch, sequence=sequence):
            pass

    def backward_by_segment(self, *, microbatch: int, sequence: int) -> Iterator[int]:
        """As `backward`, one segment whenever the next one is asked for: the last one first."""
        self._check_backward(microbatch, sequence)
        if self._passed_back > self._accumulated:
            raise InvariantBroken(f"microbatch {microbatch} overtakes delayed gradients")
        first = self._accumulated == 0
        each = zip(reversed(self._segments), self._backwards(microbatch, sequence), strict=True)
        for segment, runner in each:
            runner.backward(sequence=sequence, first=first)
            yield segment
        self._passed_back += 1
        self._end_microbatch(sequence)

    def backward_cotangents(self, *, microbatch: int, sequence: int) -> None:
        """The first part of a backward: what the stage before waits for.

        Each such call is followed by `backward_gradients`, at most `delayed` such calls later;
        both in microbatch order. A segment whose backward is not in parts may do all of it here.
        """
        self._check_backward(microbatch, sequence)
        if self._passed_back - self._accumulated >= self._held.delayed:
            raise InvariantBroken(
                f"the gradients of more than {self._held.delayed} microbatches wait"
            )
        first = self._passed_back == 0
        for runner in self._backwards(microbatch, sequence):
            runner.cotangents(sequence=sequence, first=first)
        self._passed_back += 1

    def backward_gradients(self, *, microbatch: int, sequence: int) -> None:
        """The rest of a backward: add the gradients of one microbatch to the sum."""
        if sequence not in self._waiting or self._passed_back <= self._accumulated:
            raise InvariantBroken(f"gradients of microbatch {microbatch} before its cotangents")
        first = self._accumulated == 0
        for runner in reversed(self._runners):
            runner.gradients(sequence=sequence, first=first)
        self._end_microbatch(sequence)

    def _backwards(self, microbatch: int, sequence: int) -> Iterator[SegmentRunner]:
        """The segments from the last to the first; rounds what crosses a cut between two."""
        for segment, runner in zip(reversed(self._segments), reversed(self._runners), strict=True):
            if segment in self._cuts:
                given = places(self._before(segment + 1).cotangents, sequence)
                sent = self.encoded_cotangent(segment, microbatch=microbatch, sequence=sequence)
                for encoded, target in zip(sent, given, strict=True):
                    decode(self._contract.codec, encoded, target)
            yield runner

    def _check_backward(self, microbatch: int, sequence: int) -> None:
        if sequence not in self._waiting:
            raise InvariantBroken(f"backward of microbatch {microbatch} before its forward")

    def _end_microbatch(self, sequence: int) -> None:
        self._waiting.remove(sequence)
        self._accumulated += 1
        self._backward_count += 1

    @property
    def held_ties(self) -> tuple[str, ...]:
        """Tensors of this stage whose gradient is a sum over copies, in segment order."""
        held = {name for group in self._ties for name in group.tensors if self._holds(name)}
        places = (place for m in self._memories.values() for place in m.layout.places)
        return tuple(place.tensor.name for place in places if place.tensor.name in held)

    def gradient(self, name: str) -> FloatArray:
        """The accumulated gradient of a trainable tensor of this stage: a live view."""
        for memory in self._memories.values():
            found = memory.gradient(name)
            if found is not None:
                return found
        raise InvariantBroken(f"the stage has no gradient of {name!r}")

    def gradient_vector(self, segment: int) -> FloatArray:
        """One segment's accumulated gradients as they lie in memory (`training.layout`), live."""
        return self._memories[segment].gradients

    def clear_gradients(self) -> None:
        """The sum over no microbatches, where siblings run all of a step's."""
        for memory in self._memories.values():
            memory.gradients.fill(0.0)

    def gradients_reduced(self) -> None:
        """Every segment's gradients are the sum over all siblings now."""
        self._reduced = True

    def sum_ties(self, elsewhere: Mapping[str, Array]) -> None:
        """Give every copy of a tied tensor here the sum of all copies' gradients.

        Called once after the last backward of a step, before `square_sums`; a stage without ties
        may leave it out.

        Args:
            elsewhere: Gradients of the copies on other stages, by tensor name.

        Raises:
            InvariantBroken: a copy's gradient is missing, or it was called before.
        """
        if self._waiting or self._ties_summed or not self._has_gradients:
            raise InvariantBroken("ties are summed once, after every backward of a step")
        for group in self._ties:
            here = {name: self.gradient(name) for name in group.tensors if self._holds(name)}
            total = tied_gradient(group, {**elsewhere, **here})
            for gradient in here.values():
                np.copyto(gradient, total)
        self._ties_summed = True

    def square_sums(self) -> NDArray[np.float64]:
        """Square sums of the accumulated gradients, one per tensor as `tensor_indices` orders.

        Frozen tensors and copies of tied ones give 0, their owner the whole; a gradient that is
        not finite gives infinity or NaN.
        """
        self._check_ties()
        tensors = [self._manifest.tensors[index] for index in self.tensor_indices]
        return self._updater.square_sums(tensors, lambda tensor: tensor.tied_to is None)

    def update(self, *, step: int, learning_rate: float, clip_scale: float) -> None:
        """Apply the step's update with the accumulated gradients, and start a new sum.

        Args:
            step: The update's number, counted from 1.
            learning_rate: As `training.learning_rate` gives it.
            clip_scale: As `training.clipping` gives it, over all stages.
        """
        if self._waiting or not self._has_gradients:
            raise InvariantBroken("an update needs every backward of its step")
        self._check_ties()
        self._updater.apply(step=step, learning_rate=learning_rate, clip_scale=clip_scale)
        self._feedback.commit()
        self._begin_sum()
        self._steps = dict.fromkeys(self._segments, step)
        self._update_count += 1

    def rehearse_norm(self) -> None:
        """Compute what `square_sums` does, of whatever is there: to be timed."""
        tensors = [self._manifest.tensors[index] for index in self.tensor_indices]
        self._updater.square_sums(tensors, lambda tensor: True)

    def rehearse_update(self) -> None:
        """Apply an update by whatever gradients are there: to be timed. No step counts it, and a
        stage that has rehearsed is not trained."""
        self._updater.apply(step=1, learning_rate=1e-6, clip_scale=1.0)

    def abandon_step(self) -> None:
        """Forget microbatches in flight, gradients and what the step's forwards made of running
        values: parameters and committed running values stay as they are."""
        self._waiting.clear()
        for memory in self._memories.values():
            memory.abandon_running()
        self._feedback.abandon()
        self._begin_sum()

    def _residuals(self, segment_index: int) -> dict[str, FloatArray]:
        return residuals(self._feedback, self._manifest, self._contract, segment_index)

    def _begin_sum(self) -> None:
        self._passed_back = self._accumulated = 0
        self._ties_summed = self._reduced = False

    @property
    def _has_gradients(self) -> bool:
        return self._accumulated > 0 or self._reduced

    def _check_ties(self) -> None:
        if self._ties and not self._ties_summed:
            raise InvariantBroken("tied gradients were not summed before they were used")

    def _find_ties(self) -> tuple[TieGroup, ...]:
        """Groups of which at least one copy is trained here."""
        groups = tie_groups(self._manifest)
        return tuple(g for g in groups if any(self._holds(name) for name in g.tensors))

    def _holds(self, name: str) -> bool:
        places = (place for m in self._memories.values() for place in m.layout.places)
        return any(place.tensor.name == name for place in places)

    def _starting_value(self, tensor: Tensor) -> Array:
        return starting_value(
            self._manifest, tensor, seed=self._contract.seed, weights=self._weights
        )

    def _frozen(self, segment_index: int) -> dict[str, Array]:
        """The constants of a segment's graphs, by local name."""
        kind = self._manifest.kinds[self._manifest.segments[segment_index].kind]
        tensors = self._manifest.segment_tensors(segment_index)
        return {
            value.name: self._starting_value(tensor)
            for value, tensor in zip(kind.parameters, tensors, strict=True)
            if tensor.binding == "frozen"
        }

    def _occupy(self, sequence: int) -> None:
        count = self._held.in_flight
        if sequence % count in {waiting % count for waiting in self._waiting}:
            raise InvariantBroken(f"more than {count} microbatches in flight")
        self._waiting.add(sequence)

    def _before(self, index: int) -> Boundary:
        """The rings before segment `index`, seen from the segment before it."""
        return self._boundaries[index - self._segments.start]

    def _ring_maker(self) -> RingMaker:
        return RingMaker(
            engine=self._engine,
            manifest=self._manifest,
            segments=self._segments,
            batch=self._contract.microbatch_size,
            holds=self._held,
        )

    def _make_runners(self, bundle: Bundle) -> list[SegmentRunner]:
        memories = self._memories.values()
        longest = max(memory.gradients.size for memory in memories)
        running = max(memory.running.size for memory in memories)
        setting = StageSetting(
            engine=self._engine,
            manifest=self._manifest,
            contract=self._contract,
            slots=self._held.in_flight,
            delayed=self._held.delayed,
            scratch=self._engine.allocate((longest,), np.float32).host(),
            running_scratch=self._engine.allocate((running,), np.float32).host(),
            constants=ConstantBuffers(self._engine),
            kind_stashes={},
        )
        return [
            SegmentRunner(
                setting,
                segment_index=index,
                programs=self._programs(bundle, index),
                memory=self._memories[index],
                entering=self._cuts.get(index - 1) or self._boundaries[place],
                leaving=self._boundaries[place + 1],
            )
            for place, index in enumerate(self._segments)
        ]

    def _programs(self, bundle: Bundle, segment_index: int) -> SegmentPrograms:
        kind = self._manifest.kinds[self._manifest.segments[segment_index].kind]
        return compile_programs(
            self._engine,
            bundle,
            kind,
            self._contract,
            self._frozen(segment_index),
            trains=bool(self._memories[segment_index].layout.places),
            delays=self._held.delayed > 0,
        )


def _check_contract(manifest: Manifest, contract: Contract, segments: range, holds: Held) -> None:
    if holds.in_flight < 1 or not segments or segments.step != 1 or segments.start < 0:
        raise InvariantBroken("a stage has segments and at least one microbatch in flight")
    if segments.stop > len(manifest.segments):
        raise InvariantBroken("a stage's segments are the model's")
    if contract.optimizer.name not in manifest.updates:
        raise ConfigError(f"the bundle has no optimizer {contract.optimizer.name!r}")
    for index in segments:
        if contract.form not in manifest.kinds[manifest.segments[index].kind].forms:
            raise ConfigError(f"the bundle has no {contract.form} graphs")
