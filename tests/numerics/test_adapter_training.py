"""Training an adapter: the matrix beside it stays, and merging it gives the same model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from p2ptrain.engine.contract import Engine
from p2ptrain.engine.onnxruntime_engine import open_engine
from p2ptrain.store.bundles import Bundle
from p2ptrain.store.weights import open_weights
from p2ptrain.training.adapters import merged_weight
from p2ptrain.training.random import draw_tensor
from p2ptrain.training.segment_state import FloatArray, SegmentState
from tests.adapted_bundle import adapted_bundle
from tests.bundles import contract_for
from tests.pipelines import LocalPipeline
from tests.varied_bundle import varied_bundle
from tests.weights import write_weighted

TEXT = np.frombuffer((b"peers train together, bit for bit. " * 40)[:1200], np.uint8)
STEPS, PLACE = 8, 3
DOWN, UP = "fixed.lora_down", "fixed.lora_up"


@pytest.fixture(scope="module")
def engine() -> Engine:
    return open_engine(threads=1)


def trained(engine: Engine, bundle: Bundle, cuts: tuple[int, ...]) -> LocalPipeline:
    pipeline = LocalPipeline.make(engine, bundle, contract_for(bundle, steps=STEPS), cuts, TEXT)
    pipeline.train(1, STEPS)
    return pipeline


@pytest.mark.parametrize("cuts", [(3,), (1, 2, 3, 4, 5, 6)])
def test_the_curve_has_the_same_bits_for_every_placement(
    engine: Engine, cuts: tuple[int, ...]
) -> None:
    bundle = adapted_bundle()
    one, other = trained(engine, bundle, ()), trained(engine, bundle, cuts)
    assert other.losses == one.losses
    assert other.digest(STEPS) == one.digest(STEPS)
    assert one.losses[-1] < one.losses[0], "it learns"


def test_only_the_adapter_moves_and_merging_it_gives_the_same_loss(
    engine: Engine, tmp_path: Path
) -> None:
    bundle = adapted_bundle()
    after = trained(engine, bundle, (3,))
    states = after.states(STEPS)
    parts = states[PLACE].tensors
    assert "fixed.w" not in parts
    assert np.abs(parts[UP]).max() > 0
    index = [tensor.name for tensor in bundle.manifest.tensors].index("fixed.w")
    frozen = draw_tensor(bundle.manifest, after.contract.seed, index)
    adapter = bundle.manifest.tensors[index].adapter
    assert adapter is not None
    merged = merged_weight(frozen, down=parts[DOWN], up=parts[UP], adapter=adapter)
    assert np.abs(merged - frozen).max() > 1e-3
    whole = write_weighted(tmp_path / "merged", varied_bundle(), {"fixed.w": merged})
    contract = contract_for(whole, steps=STEPS)
    plain = LocalPipeline.make(engine, whole, contract, (), TEXT, weights=open_weights(whole))
    states[PLACE] = without_adapter(states[PLACE])
    plain.load(states)
    wanted = after.evaluate()
    assert abs(plain.evaluate() - wanted) < 1e-6 * wanted


def without_adapter(state: SegmentState) -> SegmentState:
    def kept(arrays: Mapping[str, FloatArray]) -> dict[str, FloatArray]:
        return {name: array for name, array in arrays.items() if name not in (DOWN, UP)}

    vectors = {name: kept(arrays) for name, arrays in state.state.items()}
    return dataclasses.replace(state, tensors=kept(state.tensors), state=vectors)
