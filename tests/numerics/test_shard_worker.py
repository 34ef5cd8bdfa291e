"""Shards of a model train it as one peer does, however uneven their shares."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
import pytest

from p2ptrain.bundle.sharding import Mode
from p2ptrain.engine.contract import Engine
from p2ptrain.engine.onnxruntime_engine import open_engine
from p2ptrain.errors import CheckpointError, ConfigError, InvariantBroken, PlanInfeasible
from p2ptrain.runtime.compute.shard_group import ShardGroup
from p2ptrain.runtime.compute.shard_worker import ShardWorker
from p2ptrain.store.bundles import Bundle, load_bundle, shipped_bundles
from p2ptrain.training.contract import Contract
from p2ptrain.training.shard_cuts import Share
from tests.made_up import MadeUpSamples
from tests.sharded_training import (
    ADAMW,
    Trained,
    contract_of,
    feeds_of,
    same_bits,
    train_alone,
    train_sharded,
    train_step,
    worst_loss_error,
    worst_state_error,
)
from tests.shipped_training import short_context

ERROR_MAX = 1e-5
PLANS: tuple[tuple[Mode, tuple[int, ...]], ...] = (
    ("tensor", (1, 1)),
    ("tensor", (2, 1)),
    ("tensor", (2, 1, 1)),
    ("sequence", (1, 1)),
    ("sequence", (4, 3)),
    ("sequence", (2, 1, 1)),
)
Alone = Callable[[str], Trained]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return open_engine(threads=1)


@functools.cache
def bundle(name: str) -> Bundle:
    return short_context(load_bundle(shipped_bundles()[name]))


@pytest.fixture(scope="module")
def alone(engine: Engine) -> Alone:
    """One peer's training, once for each bundle."""
    return functools.cache(
        lambda name: train_alone(engine, bundle(name), contract_of(bundle(name)))
    )


CASES = (
    *(("gpt-nano", mode, shares) for mode, shares in PLANS),
    ("bert-mini", "tensor", (2, 1, 1)),
    ("bert-mini", "sequence", (4, 3)),
)


@pytest.mark.parametrize(("name", "mode", "shares"), CASES)
def test_twenty_steps_agree_with_one_peer(
    name: str, mode: Mode, shares: tuple[int, ...], engine: Engine, alone: Alone
) -> None:
    found = train_sharded(engine, bundle(name), contract_of(bundle(name)), mode, shares)
    wanted = alone(name)
    assert wanted.losses[-1] < wanted.losses[0]
    assert worst_loss_error(found, wanted) <= ERROR_MAX
    assert worst_state_error(found, wanted) <= ERROR_MAX


@pytest.mark.parametrize("mode", ["tensor", "sequence"])
@pytest.mark.parametrize("name", ["gpt-nano", "bert-mini", "llama-nano"])
def test_the_same_plan_gives_the_same_bits(name: str, mode: Mode, engine: Engine) -> None:
    made = bundle(name)
    contract = dataclasses.replace(contract_of(made, ADAMW), steps=3)
    first, again = (train_sharded(engine, made, contract, mode, (2, 1)) for _ in range(2))
    assert same_bits(first, again)
    other = train_sharded(engine, made, contract, mode, (1, 1, 1))
    assert worst_loss_error(other, first) <= ERROR_MAX


def group_of(engine: Engine, mode: Mode, shares: tuple[int, ...]) -> ShardGroup:
    made = bundle("gpt-nano")
    contract = contract_of(made, ADAMW)
    return ShardGroup(engine=engine, bundle=made, contract=contract, mode=mode, shares=shares)


@pytest.mark.parametrize("mode", ["tensor", "sequence"])
def test_whole_states_go_from_shards_to_other_shards_bit_by_bit(mode: Mode, engine: Engine) -> None:
    group, contract = group_of(engine, mode, (2, 1)), contract_of(bundle("gpt-nano"), ADAMW)
    group.draw_parameters()
    train_step(group, contract, MadeUpSamples(bundle("gpt-nano").manifest), 1)
    saved = [group.state(index, 1) for index in group.segments]
    assert any(array.any() for array in saved[1].state["v"].values())
    other = group_of(engine, mode, (1, 2, 3))
    for index, state in enumerate(saved):
        other.load(index, state)
    assert other.applied_step == 1
    assert [other.state(index, 1).digest() for index in other.segments] == [
        state.digest() for state in saved
    ]
    with pytest.raises(CheckpointError, match="other tensors"):
        other.load(1, saved[2])


def test_an_abandoned_step_leaves_nothing(engine: Engine) -> None:
    made = bundle("gpt-nano")
    contract, samples = contract_of(made, ADAMW), MadeUpSamples(made.manifest)
    losses = []
    for disturbed in (False, True):
        group = group_of(engine, "tensor", (1, 1))
        group.draw_parameters()
        if disturbed:
            feed = feeds_of(contract, samples, 2)[0]
            group.forward(
                step=2, microbatch=0, inputs=feed.inputs, labels=feed.labels, loss_weight=1.0
            )
            group.abandon_step()
        losses.append([train_step(group, contract, samples, step) for step in (1, 2)])
    assert losses[0] == losses[1]


def test_evaluation_has_no_dropout_and_keeps_nothing(engine: Engine) -> None:
    made = bundle("gpt-nano")
    feed = feeds_of(contract_of(made), MadeUpSamples(made.manifest), 1)[0]
    found = []
    for mode, shares in (PLANS[1], PLANS[-1]):
        group = group_of(engine, mode, shares)
        group.draw_parameters()
        given = {"inputs": feed.inputs, "labels": feed.labels, "loss_weight": 0.5}
        found.append(group.evaluate(**given))  # type: ignore[arg-type]  # by name
        assert group.evaluate(**given) == found[-1]  # type: ignore[arg-type]  # as above
    np.testing.assert_allclose(found, found[0], rtol=1e-6)


def worker(engine: Engine, contract: Contract | None = None, **share: object) -> ShardWorker:
    made = bundle("gpt-nano")
    asked = {"mode": "tensor", "weights": (1, 1), "rank": 0, **share}
    return ShardWorker(
        engine=engine,
        bundle=made,
        contract=contract or contract_of(made),
        share=Share(**asked),  # type: ignore[arg-type]  # by name
    )


def test_square_sums_of_all_ranks_are_those_of_the_model(engine: Engine) -> None:
    """What is not sliced is reported once; the rest by slices."""
    made = bundle("gpt-nano")
    contract, samples = contract_of(made), MadeUpSamples(made.manifest)
    found = []
    for mode in ("tensor", "sequence"):
        group = group_of(engine, mode, (2, 1))  # type: ignore[arg-type]  # a mode
        group.draw_parameters()
        for index, feed in enumerate(feeds_of(contract, samples, 1)):
            group.forward(
                step=1, microbatch=index, inputs=feed.inputs, labels=feed.labels, loss_weight=0.01
            )
            group.backward()
        with pytest.raises(InvariantBroken, match="were not summed"):
            group.square_sums()
        group.sum_gradients()
        own = [each.square_sums() for each in group.workers]
        sliced = sum(1 for one, other in zip(*own, strict=True) if other > 0.0 and one > 0.0)
        assert (sliced > 0) == (mode == "tensor")
        found.append(group.square_sums())
        assert all(value > 0.0 for value in found[-1])
    np.testing.assert_allclose(found[0], found[1], rtol=1e-4, atol=1e-12)


def test_calls_out_of_order_are_refused(engine: Engine) -> None:
    made = worker(engine)
    made.draw_parameters()
    with pytest.raises(InvariantBroken, match="before its forward"):
        next(made.backward())
    with pytest.raises(InvariantBroken, match="summed once"):
        next(made.sum_gradients())
    with pytest.raises(InvariantBroken, match="were not summed"):
        made.update(step=1, learning_rate=0.1, clip_scale=1.0)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"form": "training"}, "portable form"),
        ({"rematerialise": True}, "keep their stash"),
    ],
)
def test_contracts_that_shards_cannot_keep_are_refused(
    change: dict[str, object], sentence: str, engine: Engine
) -> None:
    contract = dataclasses.replace(
        contract_of(bundle("gpt-nano")),
        **change,  # type: ignore[arg-type]  # fields by name
    )
    with pytest.raises(ConfigError, match=sentence):
        worker(engine, contract)


def test_more_shards_than_heads_are_refused(engine: Engine) -> None:
    with pytest.raises(PlanInfeasible, match="6 units for 7 peers"):
        worker(engine, weights=(1,) * 7)
