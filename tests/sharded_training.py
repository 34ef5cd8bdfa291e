"""Train a bundle by shards of one process, and as one peer does, over the same samples."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from p2ptrain.bundle.sharding import Mode
from p2ptrain.engine.contract import Array, Engine
from p2ptrain.runtime.compute.shard_group import ShardGroup
from p2ptrain.store.bundles import Bundle
from p2ptrain.training.clipping import clip_scale
from p2ptrain.training.contract import Contract, OptimizerChoice
from p2ptrain.training.feed import Feed, Samples
from p2ptrain.training.learning_rate import learning_rate
from p2ptrain.training.loss import counted_labels, loss_weight
from p2ptrain.training.segment_state import SegmentState
from tests.bundles import contract_for
from tests.made_up import MadeUpSamples
from tests.pipelines import LocalPipeline

STEPS = 20
SGD = OptimizerChoice(name="sgd", peak_learning_rate=0.05, warmup_steps=2, clip_norm=0.5)
ADAMW = OptimizerChoice(peak_learning_rate=0.003, warmup_steps=2, clip_norm=0.5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """Losses by step, and every segment's whole state after the last."""

    losses: tuple[float, ...]
    states: tuple[SegmentState, ...]


def contract_of(bundle: Bundle, optimizer: OptimizerChoice = SGD) -> Contract:
    """Two microbatches of two samples."""
    contract = contract_for(bundle, microbatches=2, optimizer=optimizer)
    return dataclasses.replace(contract, steps=STEPS)


def train_alone(engine: Engine, bundle: Bundle, contract: Contract) -> Trained:
    """By a `StageWorker` over the whole model."""
    samples = MadeUpSamples(bundle.manifest)
    pipeline = LocalPipeline.make(engine, bundle, contract, (), samples)
    pipeline.train(1, contract.steps)
    return Trained(losses=tuple(pipeline.losses), states=tuple(pipeline.states(contract.steps)))


def train_sharded(
    engine: Engine, bundle: Bundle, contract: Contract, mode: Mode, shares: tuple[int, ...]
) -> Trained:
    """By `ShardWorker`s in step with each other."""
    group = ShardGroup(engine=engine, bundle=bundle, contract=contract, mode=mode, shares=shares)
    group.draw_parameters()
    samples = MadeUpSamples(bundle.manifest)
    losses = [train_step(group, contract, samples, step) for step in range(1, contract.steps + 1)]
    states = tuple(group.state(index, contract.steps) for index in group.segments)
    return Trained(losses=tuple(losses), states=states)


def train_step(group: ShardGroup, contract: Contract, samples: Samples, step: int) -> float:
    """One step and its update; its loss."""
    feeds = feeds_of(contract, samples, step)
    loss = 0.0
    weight = loss_weight(sum(counted_labels(group.loss, feed.labels) for feed in feeds))
    for microbatch, feed in enumerate(feeds):
        loss += group.forward(
            step=step,
            microbatch=microbatch,
            inputs=feed.inputs,
            labels=feed.labels,
            loss_weight=weight,
        )
        group.backward()
    group.sum_gradients()
    clip = clip_scale(group.square_sums().tolist(), contract.optimizer.clip_norm)
    rate = learning_rate(contract.optimizer, step=step, steps=contract.steps)
    group.update(step=step, learning_rate=rate, clip_scale=clip.scale)
    return loss


def feeds_of(contract: Contract, samples: Samples, step: int) -> list[Feed]:
    """A step's microbatches."""
    size = contract.microbatch_size
    return [
        samples.training(seed=contract.seed, step=step, first_sample=index * size, count=size)
        for index in range(contract.microbatches)
    ]


def worst_loss_error(found: Trained, wanted: Trained) -> float:
    """Relative, over all steps."""
    pairs = zip(found.losses, wanted.losses, strict=True)
    return max(abs(a - b) / abs(b) for a, b in pairs)


def worst_state_error(found: Trained, wanted: Trained) -> float:
    """Of parameters: the largest difference over the tensor's largest value, or over 1e-2."""
    errors = [
        float(np.abs(there.tensors[name] - value).max() / max(np.abs(value).max(), 1e-2))
        for here, there in zip(wanted.states, found.states, strict=True)
        for name, value in here.tensors.items()
    ]
    return max(errors)


def same_bits(one: Trained, other: Trained) -> bool:
    """Losses and states to the bit."""
    digests = [[state.digest() for state in each.states] for each in (one, other)]
    return one.losses == other.losses and digests[0] == digests[1]


def arrays_of(state: SegmentState) -> dict[str, Array]:
    """Everything of a state by name."""
    vectors = {f"{s}/{n}": a for s, named in state.state.items() for n, a in named.items()}
    return {**state.tensors, **vectors, **{f"r/{n}": a for n, a in state.running.items()}}
