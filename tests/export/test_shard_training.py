"""Freshly exported models of awkward shapes train by shards as they do alone."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from onnx_models.gpt import gpt
from p2ptrain.bundle.sharding import Mode
from p2ptrain.engine.onnxruntime_engine import open_engine
from p2ptrain.graph.export import export
from p2ptrain.graph.sources.requests import Request
from p2ptrain.graph.sources.torch_factory import module_source
from p2ptrain.runtime.compute.shard_group import ShardGroup
from p2ptrain.store.bundles import Bundle, bundle_from_parts
from tests.export.models import Rotary
from tests.sharded_training import (
    contract_of,
    train_alone,
    train_sharded,
    worst_loss_error,
    worst_state_error,
)

pytestmark = pytest.mark.export

ERROR_MAX = 1e-5
MODULES: dict[str, Callable[[], Any]] = {
    "seven heads": lambda: gpt(
        layers=1, width=28, heads=7, vocabulary=40, context=12, dropout=0.25
    ),
    "groups and ties": lambda: Rotary(layers=1, width=24, heads=6, groups=3),
}


@functools.cache
def bundle(name: str) -> Bundle:
    torch.manual_seed(5)
    made = export(module_source(MODULES[name](), Request(name="model")))
    return bundle_from_parts(made.manifest.to_bytes(), made.files)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize(
    ("mode", "shares"),
    [("tensor", (4, 3)), ("tensor", (2, 1, 1)), ("sequence", (4, 3)), ("sequence", (2, 1, 1))],
)
def test_twenty_steps_agree_with_one_peer(name: str, mode: Mode, shares: tuple[int, ...]) -> None:
    engine, made = open_engine(threads=1), bundle(name)
    contract = contract_of(made)
    wanted = train_alone(engine, made, contract)
    found = train_sharded(engine, made, contract, mode, shares)
    assert wanted.losses[-1] < wanted.losses[0]
    assert worst_loss_error(found, wanted) <= ERROR_MAX
    assert worst_state_error(found, wanted) <= ERROR_MAX


def test_seven_heads_are_four_and_three() -> None:
    made = bundle("seven heads")
    group = ShardGroup(
        engine=open_engine(threads=1), bundle=made, contract=contract_of(made), mode="tensor",
        shares=(4, 3),
    )  # fmt: skip
    group.draw_parameters()
    rows = [worker.state(1, 0).tensors for worker in group.workers]
    name = next(name for name in rows[0] if name.endswith("query.weight"))
    assert [tensors[name].shape for tensors in rows] == [(16, 28), (12, 28)]
