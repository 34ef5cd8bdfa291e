"""Run a lost stage's steps again and get the same bits; blocking, in a worker thread.

What came into the stage is read from its neighbours' logs and from a data holder, the clip scale
from the step's record; all else follows from the contract, the step and the state it begins with.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

import numpy as np

from p2ptrain.bundle.manifest import Manifest
from p2ptrain.engine.contract import Array
from p2ptrain.errors import InvariantBroken
from p2ptrain.recovery.inventory import LogKind
from p2ptrain.runtime.compute.shard_group import ShardGroup
from p2ptrain.runtime.compute.stage import StageWorker
from p2ptrain.training.contract import Contract
from p2ptrain.training.learning_rate import learning_rate
from p2ptrain.training.replay_inputs import StepInputs, sent_places
from p2ptrain.training.step_record import StepRecord
from p2ptrain.training.step_tensors import expected_tensors
from p2ptrain.training.tensor_codec import encode_all


class OnSent(Protocol):
    """Takes what the lost stage had sent, to log it again."""

    def __call__(
        self, kind: LogKind, step: int, microbatch: int, segment: int, arrays: tuple[Array, ...]
    ) -> None:
        """One place's tensors of a microbatch as they went over the link, in index order;
        they are overwritten after this returns. Tied gradients have microbatch 0."""


class Replayer:
    """Drives a stage worker through steps whose outcome is recorded.

    One microbatch is in flight at a time: gradients are added in microbatch order under every
    schedule, so the bits are those of the lost stage.
    """

    def __init__(
        self,
        worker: StageWorker,
        *,
        manifest: Manifest,
        contract: Contract,
        on_sent: OnSent,
        cuts: Collection[int] = (),
    ) -> None:
        """Take over a worker that was drawn or loaded.

        Args:
            worker: Over the lost segments, which may have been several stages.
            manifest: Of the model.
            contract: Of the run.
            on_sent: Called in the thread of `run_step`.
            cuts: Segments of the range after which a stage ended when the steps were made.
        """
        self._worker, self._manifest, self._contract = worker, manifest, contract
        self._on_sent = on_sent
        self._sent: dict[LogKind, list[int]] = {"activation": [], "cotangent": [], "tied": []}
        for place in sent_places(manifest, worker.segments, cuts):
            if place.kind == "activation" or place.kind == "cotangent" or place.kind == "tied":
                self._sent[place.kind].append(place.segment)
        self._sequence = 0

    def run_step(self, inputs: StepInputs, record: StepRecord) -> None:
        """Make the step after the worker's last one, and log again what it sends.

        Raises:
            InvariantBroken: the record is of another step, or an input is missing.
            EngineError: the runtime failed; load the worker again.
        """
        worker, step = self._worker, record.step
        if worker.applied_step != step - 1:
            raise InvariantBroken(f"replay of step {step} after step {worker.applied_step}")
        worker.abandon_step()
        for microbatch in range(self._contract.microbatches):
            self._forward(inputs, step, microbatch)
            self._backward(inputs, step, microbatch)
            self._sequence += 1
        self._log_tied(step)
        if worker.held_ties:
            worker.sum_ties(inputs.tied)
        rate = learning_rate(self._contract.optimizer, step=step, steps=self._contract.steps)
        worker.update(step=step, learning_rate=rate, clip_scale=record.clip_scale)

    def _forward(self, inputs: StepInputs, step: int, microbatch: int) -> None:
        worker, sequence = self._worker, self._sequence
        entry = worker.entry(sequence)
        _fill(entry, inputs.activations, microbatch)
        worker.forward(
            step=step,
            microbatch=microbatch,
            sequence=sequence,
            training=True,
            inputs=inputs.inputs[microbatch] if inputs.inputs else None,
            labels=inputs.labels[microbatch] if inputs.labels else None,
            loss_weight=inputs.loss_weight,
        )
        for segment in self._sent["activation"]:
            arrays = worker.crossing(segment, sequence)
            sent = encode_all(self._contract.codec, arrays)
            self._on_sent("activation", step, microbatch, segment, sent)

    def _backward(self, inputs: StepInputs, step: int, microbatch: int) -> None:
        worker, sequence = self._worker, self._sequence
        _fill(worker.exit_cotangent(sequence), inputs.cotangents, microbatch)
        worker.backward(microbatch=microbatch, sequence=sequence)
        for segment in self._sent["cotangent"]:
            sent = worker.encoded_cotangent(segment, microbatch=microbatch, sequence=sequence)
            self._on_sent("cotangent", step, microbatch, segment, sent)

    def _log_tied(self, step: int) -> None:
        tensors = self._manifest.tensors
        for segment in self._sent["tied"]:
            copies = expected_tensors(self._manifest, self._contract, "tied", segment)
            arrays = tuple(self._worker.gradient(tensors[copy.index].name) for copy in copies)
            self._on_sent("tied", step, 0, segment, arrays)


class ShardReplayer:
    """Drives all shards of a model through steps whose outcome is recorded, in one process.

    Every rank's terms are added in rank order, as on peers of their own; nothing is logged again,
    since every peer takes part in every step.
    """

    def __init__(self, group: ShardGroup, contract: Contract) -> None:
        """Take over shards that were drawn or loaded."""
        self._group, self._contract = group, contract

    def run_step(self, inputs: StepInputs, record: StepRecord) -> None:
        """Make the step after the last one; errors as those of `Replayer.run_step`."""
        group, step = self._group, record.step
        if group.applied_step != step - 1:
            raise InvariantBroken(f"replay of step {step} after step {group.applied_step}")
        group.abandon_step()
        for microbatch in range(self._contract.microbatches):
            group.forward(
                step=step,
                microbatch=microbatch,
                inputs=inputs.inputs[microbatch],
                labels=inputs.labels[microbatch],
                loss_weight=inputs.loss_weight,
            )
            group.backward()
        group.sum_gradients()
        rate = learning_rate(self._contract.optimizer, step=step, steps=self._contract.steps)
        group.update(step=step, learning_rate=rate, clip_scale=record.clip_scale)


def _fill(
    targets: tuple[Array, ...], sources: tuple[tuple[Array, ...], ...], microbatch: int
) -> None:
    """Copy what was logged where the stage receives it."""
    arrived = sources[microbatch] if targets and microbatch < len(sources) else ()
    if len(arrived) != len(targets):
        raise InvariantBroken(f"microbatch {microbatch} lacks what crossed into the segments")
    for target, source in zip(targets, arrived, strict=True):
        if target.shape != source.shape:
            raise InvariantBroken(f"a logged tensor of shape {source.shape}, not {target.shape}")
        np.copyto(target, source, casting="equiv")
