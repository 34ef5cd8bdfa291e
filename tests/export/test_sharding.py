"""Shards of exported segments, run together, give the loss and gradients of the whole."""

from __future__ import annotations

import functools
import json
import os
import subprocess
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from onnx_models.gpt import gpt
from p2ptrain.bundle.graph_checks import graph_problems
from p2ptrain.bundle.reading import parse_manifest
from p2ptrain.bundle.shard_traffic import shard_traffic
from p2ptrain.bundle.sharding import ShardedKind
from p2ptrain.graph.check import check_masks, check_values
from p2ptrain.graph.exact import float64_function
from p2ptrain.graph.export import Bundle, export
from p2ptrain.graph.fine_tuning import FineTuning, Lora
from p2ptrain.graph.runner import Runner
from p2ptrain.graph.source import Source
from p2ptrain.graph.sources.requests import Request
from p2ptrain.graph.sources.torch_factory import module_source
from p2ptrain.graph.write import write_bundle
from tests.export.configurations import Family
from tests.export.models import Rotary
from tests.sharded_runner import Case, errors, plans_of, sharded_runner

pytestmark = pytest.mark.export

ROOT = Path(__file__).resolve().parents[2]
ERROR_MAX = 1e-5
EXACT_ERROR_MAX = 1e-11
NAMES = ("seven-heads", "grouped", "gpt2", "llama", "bert", "adapters", "partly-frozen")
Make = Callable[[str], Case]


class Convolutions(nn.Module):
    """Images (B, 1, 8, 8) -> logits."""

    input_shape = (1, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
        self.head = nn.Linear(64, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(torch.relu(self.layers(images)).flatten(1))


@pytest.fixture(scope="session")
def case(family: Family) -> Make:
    """Bundles of small configurations, each exported once."""
    tunings = {
        "adapters": (
            "llama",
            FineTuning(
                lora=Lora(rank=4, alpha=8.0, targets=("q_proj", "v_proj", "down_proj")),
                train=("*layernorm*",),
            ),
        ),
        "partly-frozen": ("bert", FineTuning(freeze=("embeddings", "layer.0"))),
    }
    modules: Mapping[str, Callable[[], Any]] = {
        "seven-heads": lambda: gpt(
            layers=1, width=28, heads=7, vocabulary=40, context=12, dropout=0.25
        ),
        "grouped": lambda: Rotary(layers=1, width=24, heads=6, groups=3),
    }
    tasks = {"bert": "sequence-classification"}

    @functools.cache
    def traced(name: str) -> Source:
        torch.manual_seed(5)
        if name in modules:
            return module_source(modules[name](), Request(name=name))
        return family(name, tasks.get(name, "language-modelling"))

    @functools.cache
    def made(name: str) -> Case:
        model, tuning = tunings.get(name, (name, FineTuning()))
        source = traced(model)
        frozen = frozenset(tuning.frozen(source.training.parameters))
        bundle = export(source, frozen=frozen, lora=tuning.lora)
        manifest = bundle.manifest
        parameters = check_values(source, manifest)
        masks = check_masks(manifest, source.example, masked=True)
        exact = Runner(manifest=manifest, files=bundle.files, open_graph=float64_function)
        inputs = dict(source.example)
        return Case(
            manifest=manifest,
            files=bundle.files,
            parameters=parameters,
            inputs=inputs,
            masks=masks,
            wanted=exact.step(form="portable", parameters=parameters, inputs=inputs, masks=masks),
        )

    return made


@pytest.mark.parametrize("name", NAMES)
def test_every_plan_gives_loss_and_gradients_of_the_whole(name: str, case: Make) -> None:
    found = errors(case(name), runner_of(case(name)))
    assert {plan.split()[0] for plan in found} == {"tensor", "sequence"}
    assert max(found.values()) <= ERROR_MAX, found


@pytest.mark.parametrize("name", NAMES)
def test_in_float64_every_plan_is_the_whole(name: str, case: Make) -> None:
    given = case(name)
    exact = Runner(manifest=given.manifest, files=given.files, open_graph=float64_function)
    found = errors(given, exact)
    assert max(found.values()) <= EXACT_ERROR_MAX, found


@pytest.mark.stock
def test_every_plan_does_so_on_the_stock_runtime(case: Make, tmp_path: Path) -> None:
    python = os.environ.get("P2PTRAIN_STOCK_PYTHON", "")
    if not Path(python).is_file():
        pytest.skip(f"P2PTRAIN_STOCK_PYTHON names no stock interpreter: {python!r}")
    for name in NAMES:
        (tmp_path / name).mkdir()
        case(name).write(tmp_path / name)
    done = subprocess.run(
        [python, "-m", "tests.sharded_runner", *(str(tmp_path / name) for name in NAMES)],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    told = json.loads(done.stdout)
    assert not told["has_training"]
    assert max(error for found in told["errors"].values() for error in found.values()) <= ERROR_MAX


def test_one_plan_gives_the_same_bits_twice(case: Make) -> None:
    given = case("seven-heads")
    runner = runner_of(given)
    first, again = (
        sharded_runner(given, runner, "tensor", (4, 3)).step(
            given.parameters, given.inputs, given.masks
        )
        for _ in range(2)
    )
    assert first[0] == again[0]
    assert all(np.array_equal(first[1][name], again[1][name]) for name in first[1])


@pytest.mark.parametrize("name", ["seven-heads", "grouped"])
def test_a_shorter_context_is_sharded_by_the_same_graphs(name: str, case: Make) -> None:
    given = shortened(case(name), context=7)
    found = errors(given, runner_of(given))
    assert any(plan.startswith("sequence") for plan in found)
    assert max(found.values()) <= ERROR_MAX, found


def shortened(case: Case, *, context: int) -> Case:
    """The same graphs and parameters, opened for samples of so many tokens."""
    manifest = case.manifest
    symbols = {
        name: replace(symbol, size=context) if symbol.kind == "sequence" else symbol
        for name, symbol in manifest.symbols.items()
    }
    data = replace(manifest.data, context=context)
    shorter = parse_manifest(replace(manifest, symbols=symbols, data=data).to_bytes())
    assert shorter.symbols != manifest.symbols
    inputs = {n: v[:, :context] if v.ndim > 1 else v for n, v in case.inputs.items()}
    masks = check_masks(shorter, inputs, masked=True)
    exact = Runner(manifest=shorter, files=case.files, open_graph=float64_function)
    wanted = exact.step(form="portable", parameters=case.parameters, inputs=inputs, masks=masks)
    return replace(case, manifest=shorter, inputs=inputs, masks=masks, wanted=wanted)


def runner_of(case: Case) -> Runner:
    return Runner(manifest=case.manifest, files=case.files)


def kind_with(case: Case, mode: str, parameter: str) -> ShardedKind:
    """The sharded kind that slices or sums a parameter of this local name."""
    for name, sharded in case.manifest.sharding[mode].kinds.items():
        if any(value.name == parameter for value in case.manifest.kinds[name].parameters):
            return sharded
    raise AssertionError(f"no kind has {parameter}")


def test_heads_are_units_and_seven_of_them_are_not_even(case: Make) -> None:
    attention = kind_with(case("seven-heads"), "tensor", "query.weight")
    assert list(attention.axes.values()) == ["7"]
    assert attention.slices["query.weight"].axis == 0
    assert attention.slices["query.weight"].blocks == (4,)
    assert attention.slices["projection.weight"].axis == 1
    assert "projection.bias" not in attention.slices


def test_grouped_queries_stay_with_their_keys(case: Make) -> None:
    attention = kind_with(case("grouped"), "tensor", "query.weight")
    assert list(attention.axes.values()) == ["3"]
    assert attention.slices["query.weight"].blocks == (8,)
    assert attention.slices["key.weight"].blocks == attention.slices["value.weight"].blocks == (4,)


def test_a_fused_query_key_and_value_is_three_groups(case: Make) -> None:
    attention = kind_with(case("gpt2"), "tensor", "attn.c_attn.weight")
    assert attention.slices["attn.c_attn.weight"].blocks == (8, 8, 8)
    assert attention.slices["attn.c_attn.bias"].blocks == (8, 8, 8)
    assert attention.slices["attn.c_proj.weight"].blocks == (8,)


@pytest.mark.parametrize("parameter", ["query.weight", "up.weight"])
def test_a_half_block_is_reduced_once_each_way(parameter: str, case: Make) -> None:
    sharded = kind_with(case("seven-heads"), "tensor", parameter)
    for parts in (sharded.forward, sharded.backward):
        assert [each.kind for part in parts for each in part.collectives] == ["reduce"]


def test_attention_gathers_keys_and_values_and_scatters_their_cotangents(case: Make) -> None:
    sharded = kind_with(case("grouped"), "sequence", "query.weight")
    forward = [each for part in sharded.forward for each in part.collectives]
    backward = [each for part in sharded.backward for each in part.collectives]
    assert [each.kind for each in forward] == ["gather", "gather"]
    assert [each.kind for each in backward] == ["scatter", "scatter"]
    assert all("3" in each.shape for each in forward)  # groups of keys, not every query's copy
    assert set(sharded.summed) == {
        value.name
        for name, known in case("grouped").manifest.sharding["sequence"].kinds.items()
        if known is sharded
        for value in case("grouped").manifest.kinds[name].parameters
    }
    mlp = kind_with(case("seven-heads"), "sequence", "up.weight")
    assert not [each for part in mlp.parts for each in part.collectives]


def test_what_is_not_divided_says_why(case: Make) -> None:
    whole = case("gpt2").manifest.sharding["tensor"].whole
    assert whole["head"] == "LogSoftmax works along the divided axis"
    assert "no linear" in whole["transformer"]


def test_convolutions_are_divided_in_no_mode() -> None:
    source = module_source(Convolutions(), Request(name="conv", task="image-classification"))
    sharding = export(source, segments=2).manifest.sharding
    assert not sharding["sequence"].kinds
    assert all("0 sequence axes" in reason for reason in sharding["sequence"].whole.values())
    assert "no linear" in next(iter(sharding["tensor"].whole.values()))


@pytest.mark.parametrize("name", ["seven-heads", "bert"])
def test_what_meets_is_what_the_manifest_tells(name: str, case: Make) -> None:
    given = case(name)
    runner = runner_of(given)
    batch = next(iter(given.inputs.values())).shape[0]
    for mode, weights in plans_of(given.manifest):
        sharded = sharded_runner(given, runner, mode, weights)
        sharded.step(given.parameters, given.inputs, given.masks)
        told: Counter[str] = Counter()
        for segment in shard_traffic(given.manifest, mode, batch=batch):
            for cost in (*segment.forward, *segment.backward):
                told[cost.kind] += cost.whole_bytes
        assert sharded.met_bytes == dict(told)


def test_a_bundle_with_its_sharding_is_written_and_read(case: Make, tmp_path: Path) -> None:
    given = case("grouped")
    bundle = Bundle(manifest=given.manifest, files=dict(given.files))
    written = write_bundle(tmp_path / "b", bundle, [])
    assert json.loads(written.to_bytes())["version"] == 5
    assert parse_manifest((tmp_path / "b" / "manifest.json").read_bytes()) == written


def test_a_part_that_is_another_is_refused(case: Make) -> None:
    given = case("grouped")
    forward = kind_with(given, "tensor", "query.weight").forward
    first, last = forward[0].graph, forward[-1].graph
    assert not list(graph_problems(given.manifest, first, given.files[first]))
    found = list(graph_problems(given.manifest, first, given.files[last]))
    assert any("tensor part of kind 'blocks': it has no output" in problem for problem in found)
