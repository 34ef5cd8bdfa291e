"""Run stage workers in one process, by a schedule: what peers do over links, without links."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from p2ptrain.bundle.manifest import Manifest
from p2ptrain.engine.contract import Array, Engine
from p2ptrain.ids import Digest
from p2ptrain.runtime.compute.replay import OnSent
from p2ptrain.runtime.compute.stage import StageWorker
from p2ptrain.schedule.actions import Action, all_actions, delayed_microbatches, held
from p2ptrain.store.bundles import Bundle
from p2ptrain.training.clipping import Clip, clip_scale
from p2ptrain.training.contract import Contract
from p2ptrain.training.feed import Feed, Samples
from p2ptrain.training.learning_rate import learning_rate
from p2ptrain.training.loss import loss_weight
from p2ptrain.training.replay_inputs import sent_places
from p2ptrain.training.sampling import Windows, heldout_windows, training_windows
from p2ptrain.training.segment_state import SegmentState, StateHeader, state_digest
from p2ptrain.training.step_record import StepRecord
from p2ptrain.training.step_tensors import expected_tensors
from p2ptrain.training.tensor_codec import decode, encode_all, hand_over

NO_DIGEST = Digest("0" * 64)


@dataclass(frozen=True, slots=True)
class TextSamples:
    """Windows of a text: tokens, and for a model of two inputs which of them it may look at."""

    tokens: NDArray[np.uint8]
    context: int
    input_count: int
    digest: Digest = NO_DIGEST

    def training(self, *, seed: int, step: int, first_sample: int, count: int) -> Feed:
        taken = training_windows(
            self.tokens,
            seed=seed,
            step=step,
            first_sample=first_sample,
            count=count,
            context=self.context,
        )
        return self._feed(taken)

    def heldout(self, *, sample_count: int, first_sample: int, count: int) -> Feed:
        taken = heldout_windows(
            self.tokens,
            sample_count=sample_count,
            first_sample=first_sample,
            count=count,
            context=self.context,
        )
        return self._feed(taken)

    def _feed(self, windows: Windows) -> Feed:
        inputs = (windows.inputs, windows.inputs % 7 != 0)
        return Feed(inputs=inputs[: self.input_count], labels=windows.labels)


@dataclass(slots=True)
class LocalPipeline:
    """Stages over consecutive segments, cut where `cuts` says."""

    bundle: Bundle
    contract: Contract
    workers: list[StageWorker]
    segments: list[range]
    samples: Samples
    schedule: str = "1f1b"
    sequence: int = 0
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    records: list[StepRecord] = field(default_factory=list)
    on_sent: OnSent | None = None
    """Told of everything that one stage sends another in training."""

    @classmethod
    def make(
        cls,
        engine: Engine,
        bundle: Bundle,
        contract: Contract,
        cuts: tuple[int, ...],
        data: NDArray[np.uint8] | Samples,
        weights: Mapping[str, Array] | None = None,
        schedule: str = "1f1b",
    ) -> LocalPipeline:
        edges = [0, *cuts, len(bundle.manifest.segments)]
        segments = [range(a, b) for a, b in itertools.pairwise(edges)]
        actions = all_actions(schedule, len(segments), contract.microbatches)
        workers = [
            StageWorker(
                engine=engine,
                bundle=bundle,
                segments=part,
                contract=contract,
                holds=held(schedule, own),
                weights=weights,
            )
            for part, own in zip(segments, actions, strict=True)
        ]
        for worker in workers:
            worker.draw_parameters()
        samples = _samples(data, bundle.manifest)
        return cls(bundle, contract, workers, segments, samples, schedule)

    def train(self, first_step: int, last_step: int) -> None:
        """Steps `first_step` to `last_step`, both included and counted from 1."""
        for step in range(first_step, last_step + 1):
            self.losses.append(self._microbatches(step))
            self._log_ties(step)
            self.sum_ties()
            clip = self._clip()
            self.norms.append(clip.norm)
            self.records.append(
                StepRecord(
                    step=step,
                    loss=self.losses[-1],
                    gradient_norm=clip.norm,
                    clip_scale=clip.scale,
                )
            )
            rate = learning_rate(self.contract.optimizer, step=step, steps=self.contract.steps)
            for worker in self.workers:
                worker.update(step=step, learning_rate=rate, clip_scale=clip.scale)

    def sum_ties(self) -> None:
        """Exchange tied gradients, as stages do over links."""
        held = [
            {name: worker.gradient(name).copy() for name in worker.held_ties}
            for worker in self.workers
        ]
        for stage, worker in enumerate(self.workers):
            others = (part for other, part in enumerate(held) if other != stage)
            worker.sum_ties({name: array for part in others for name, array in part.items()})

    def _log_ties(self, step: int) -> None:
        if self.on_sent is None:
            return
        manifest = self.bundle.manifest
        for worker, part in zip(self.workers, self.segments, strict=True):
            for place in sent_places(manifest, part):
                if place.kind == "tied":
                    copies = expected_tensors(manifest, self.contract, "tied", place.segment)
                    names = [manifest.tensors[copy.index].name for copy in copies]
                    arrays = tuple(worker.gradient(name) for name in names)
                    self.on_sent("tied", step, 0, place.segment, arrays)

    def evaluate(self) -> float:
        """Mean held-out loss over the contract's microbatches."""
        c = self.contract
        total = 0.0
        for index in range(c.heldout_microbatches):
            feed = self.samples.heldout(
                sample_count=c.heldout_microbatches * c.microbatch_size,
                first_sample=index * c.microbatch_size,
                count=c.microbatch_size,
            )
            for stage in range(len(self.workers)):
                loss = self._forward(stage, 1, index, feed, training=False)
            total += loss or 0.0
            self.sequence += 1
        return total

    def digest(self, step: int) -> str:
        return state_digest(state.digest() for state in self.states(step))

    def states(self, step: int) -> list[SegmentState]:
        return [
            worker.state(index, step)
            for worker, part in zip(self.workers, self.segments, strict=True)
            for index in part
        ]

    def load(self, states: list[SegmentState]) -> None:
        for worker, part in zip(self.workers, self.segments, strict=True):
            for index in part:
                worker.load(index, states[index])

    def header(self, segment: int, step: int) -> StateHeader:
        return StateHeader(
            run="r" * 26, lineage=0, view=1, plan="3" * 64, step=step, segment=segment,
            bundle=self.bundle.digest,
        )  # fmt: skip

    def _microbatches(self, step: int) -> float:
        """One step by the schedule: every stage goes on as soon as its input is there."""
        count, stages = self.contract.microbatches, len(self.workers)
        feeds = [self._feed(step, index) for index in range(count)]
        lists = all_actions(self.schedule, stages, count)
        done: set[tuple[int, str, int]] = set()
        position, loss, start = [0] * stages, 0.0, self.sequence
        while any(at < len(own) for at, own in zip(position, lists, strict=True)):
            for stage, own in enumerate(lists):
                action = own[position[stage]] if position[stage] < len(own) else None
                if action is None or not self._arrived(action, done):
                    continue
                self.sequence = start + action.microbatch
                loss += self._act(action, step, feeds, delayed_microbatches(own))
                done.add((stage, action.kind, action.microbatch))
                position[stage] += 1
        self.sequence = start + count
        return loss

    def _arrived(self, action: Action, done: set[tuple[int, str, int]]) -> bool:
        """Whether what an action needs from its neighbour is there."""
        source = {"F": action.stage - 1, "B": action.stage + 1, "W": -1}[action.kind]
        ends = not 0 <= source < len(self.workers)
        return ends or (source, action.kind, action.microbatch) in done

    def _act(self, action: Action, step: int, feeds: list[Feed], delayed: Collection[int]) -> float:
        stage, index, sequence = action.stage, action.microbatch, self.sequence
        if action.kind == "F":
            return self._forward(stage, step, index, feeds[index], training=True) or 0.0
        if action.kind == "B":
            self._backward(stage, step, index, sequence, parted=index in delayed)
        else:
            self.workers[stage].backward_gradients(microbatch=index, sequence=sequence)
        return 0.0

    def _feed(self, step: int, microbatch: int) -> Feed:
        c = self.contract
        return self.samples.training(
            seed=c.seed,
            step=step,
            first_sample=microbatch * c.microbatch_size,
            count=c.microbatch_size,
        )

    def _forward(
        self, stage: int, step: int, index: int, feed: Feed, *, training: bool
    ) -> float | None:
        worker, last = self.workers[stage], stage == len(self.workers) - 1
        count = self.contract.microbatches if training else self.contract.heldout_microbatches
        loss = worker.forward(
            step=step,
            microbatch=index,
            sequence=self.sequence,
            training=training,
            inputs=feed.inputs if stage == 0 else None,
            labels=feed.labels if last else None,
            loss_weight=loss_weight(count * feed.labels.size),
        )
        if not last:
            codec = self.contract.codec
            entry = self.workers[stage + 1].entry(self.sequence)
            hand_over(codec, worker.exit(self.sequence), entry)
            if training and self.on_sent is not None:
                segment = self.segments[stage][-1]
                arrays = encode_all(codec, worker.exit(self.sequence))
                self.on_sent("activation", step, index, segment, arrays)
        return loss

    def _backward(self, stage: int, step: int, index: int, sequence: int, *, parted: bool) -> None:
        worker = self.workers[stage]
        run = worker.backward_cotangents if parted else worker.backward
        run(microbatch=index, sequence=sequence)
        if stage > 0:
            before = self.workers[stage - 1]
            segment = self.segments[stage][0] - 1
            sent = worker.encoded_cotangent(segment, microbatch=index, sequence=sequence)
            targets = before.exit_cotangent(sequence)
            for encoded, target in zip(sent, targets, strict=True):
                if self.contract.codec == "fp32":
                    np.copyto(target, encoded)
                else:
                    decode(self.contract.codec, encoded, target)
            if self.on_sent is not None:
                self.on_sent("cotangent", step, index, segment, sent)

    def _clip(self) -> Clip:
        sums: dict[int, float] = {}
        for worker in self.workers:
            sums |= dict(zip(worker.tensor_indices, worker.square_sums(), strict=True))
        ordered = [sums[index] for index in sorted(sums)]
        return clip_scale(ordered, self.contract.optimizer.clip_norm)


def _samples(data: NDArray[np.uint8] | Samples, manifest: Manifest) -> Samples:
    if isinstance(data, np.ndarray):
        return TextSamples(data, manifest.data.context, len(manifest.data_ports))
    return data
