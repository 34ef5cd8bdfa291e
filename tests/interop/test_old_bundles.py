"""Bundles of earlier format versions train: their own manifests and graphs, byte by byte."""

from __future__ import annotations

from pathlib import Path

import pytest

from p2ptrain.bundle.reading import parse_manifest
from p2ptrain.engine.contract import Engine
from p2ptrain.engine.onnxruntime_engine import open_engine
from p2ptrain.errors import PlanInfeasible
from p2ptrain.store.bundles import GRAPH_FOLDER, Bundle, load_bundle, shipped_bundles
from p2ptrain.training.contract import OptimizerChoice
from p2ptrain.training.shard_cuts import sharding_of
from tests.bundles import contract_for
from tests.made_up import MadeUpSamples
from tests.pipelines import LocalPipeline
from tests.shipped_training import short_context

GOLDEN = Path(__file__).parent / "golden"
MODELS = {1: "gpt-nano", 2: "mlp", 3: "mlp"}
STEPS = 4


@pytest.fixture(scope="module")
def engine() -> Engine:
    return open_engine(threads=1)


def old_bundle(version: int, path: Path) -> Bundle:
    """As it was written then."""
    content = (GOLDEN / f"manifest-v{version}.json").read_bytes()
    (path / GRAPH_FOLDER).mkdir()
    (path / "manifest.json").write_bytes(content)
    for digest in parse_manifest(content).graphs:
        graph = (GOLDEN / "graphs" / f"{digest}.onnx").read_bytes()
        (path / GRAPH_FOLDER / f"{digest}.onnx").write_bytes(graph)
    return load_bundle(path)


def losses(engine: Engine, bundle: Bundle, *, stages: int, schedule: str) -> list[float]:
    optimizer = OptimizerChoice(name="sgd", peak_learning_rate=0.05, warmup_steps=0)
    contract = contract_for(bundle, steps=STEPS, microbatches=3, optimizer=optimizer)
    cuts = (len(bundle.manifest.segments) // 2,) if stages == 2 else ()
    samples = MadeUpSamples(bundle.manifest)
    pipeline = LocalPipeline.make(engine, bundle, contract, cuts, samples, schedule=schedule)
    pipeline.train(1, STEPS)
    return pipeline.losses


@pytest.mark.parametrize("version", MODELS)
def test_an_old_bundle_trains_as_the_model_of_today(
    version: int, tmp_path: Path, engine: Engine
) -> None:
    """Under every schedule: a backward that has no parts is whole."""
    old = short_context(old_bundle(version, tmp_path))
    today = short_context(load_bundle(shipped_bundles()[MODELS[version]]))
    found = losses(engine, old, stages=1, schedule="1f1b")
    assert found[-1] < found[0]
    for schedule in ("gpipe", "zb-h1"):
        assert losses(engine, old, stages=2, schedule=schedule) == found
    assert found == pytest.approx(losses(engine, today, stages=1, schedule="1f1b"), rel=1e-6)


def test_an_old_bundle_says_why_it_is_not_sharded(tmp_path: Path) -> None:
    old = old_bundle(1, tmp_path)
    with pytest.raises(PlanInfeasible, match="exported without tensor sharding") as refused:
        sharding_of(old.manifest, "tensor")
    assert "export the model again" in refused.value.hint
