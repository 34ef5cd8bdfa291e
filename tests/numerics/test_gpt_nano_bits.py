"""The exported gpt-nano under the numerics contract: any placement, both forms, real text."""

from __future__ import annotations

import dataclasses
import math
import pydoc_data.topics

import numpy as np
import pytest

from p2ptrain.engine.contract import Engine
from p2ptrain.engine.onnxruntime_engine import open_engine
from p2ptrain.store.bundles import Bundle, find_bundle, load_bundle
from p2ptrain.training.contract import OptimizerChoice
from p2ptrain.training.random import parameters_digest
from tests.bundles import contract_for
from tests.pipelines import LocalPipeline

STEPS = 2
PLACEMENTS = ((), (5,), (2, 5, 8))


@pytest.fixture(scope="module")
def engine() -> Engine:
    return open_engine(threads=1)


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    made = load_bundle(find_bundle("gpt-nano"))
    made.check()
    return made


@pytest.fixture(scope="module")
def text() -> np.ndarray:
    return np.frombuffer("\n".join(pydoc_data.topics.topics.values()).encode(), np.uint8)


def trained(
    engine: Engine, bundle: Bundle, text: np.ndarray, cuts: tuple[int, ...], form: str
) -> LocalPipeline:
    contract = contract_for(
        bundle, steps=STEPS, microbatch_size=1, microbatches=3,
        optimizer=OptimizerChoice(warmup_steps=0),
    )  # fmt: skip
    contract = dataclasses.replace(contract, form=form)
    pipeline = LocalPipeline.make(engine, bundle, contract, cuts, text)
    pipeline.train(1, STEPS)
    return pipeline


def test_gpt_nano_parameters_are_the_golden_ones(bundle: Bundle) -> None:
    assert parameters_digest(bundle.manifest, 0) == bundle.manifest.golden_parameters


def test_gpt_nano_has_the_same_bits_for_1_2_and_4_stages(
    engine: Engine, bundle: Bundle, text: np.ndarray
) -> None:
    runs = [trained(engine, bundle, text, cuts, "portable") for cuts in PLACEMENTS]
    one = runs[0]
    assert one.losses[0] == pytest.approx(math.log(256), rel=0.05)
    assert one.losses[-1] < one.losses[0] - 0.1
    assert max(one.norms) > one.contract.optimizer.clip_norm, "clipping is active"
    for other in runs[1:]:
        assert other.losses == one.losses
        assert other.digest(STEPS) == one.digest(STEPS)


def test_gpt_nano_training_form_agrees_with_the_portable_one(
    engine: Engine, bundle: Bundle, text: np.ndarray
) -> None:
    if engine.build.runtime != "onnxruntime-training":
        pytest.skip("stock onnxruntime lacks the training wheel's gradient operators")
    portable, training = (
        trained(engine, bundle, text, (), form) for form in ("portable", "training")
    )
    assert training.losses == pytest.approx(portable.losses, rel=1e-5)
