"""A backward in its two parts gives the bits of the whole one, on the runtime that is installed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from p2ptrain.graph.check import check_masks
from p2ptrain.graph.runner import Arrays, Runner
from p2ptrain.runtime.compute.profiling import made_up_feed
from p2ptrain.store.bundles import Bundle, load_bundle
from p2ptrain.training.random import draw_parameter

MODELS = Path(__file__).resolve().parents[2] / "onnx_models"
NAMES = sorted(path.parent.name for path in MODELS.glob("*/manifest.json"))
BATCH = 3


@pytest.fixture(params=NAMES)
def bundle(request: pytest.FixtureRequest) -> Bundle:
    return load_bundle(MODELS / str(request.param))


def example(bundle: Bundle) -> Arrays:
    feed = made_up_feed(bundle.manifest, BATCH)
    names = [port.value.name for port in bundle.manifest.data_ports]
    labels = {bundle.manifest.labels_port.value.name: feed.labels}
    weight = {"loss_weight": np.array(1.0 / feed.labels.size, np.float32)}
    return {**dict(zip(names, feed.inputs, strict=True)), **labels, **weight}


def test_both_parts_give_the_bits_of_the_whole(bundle: Bundle) -> None:
    manifest, inputs = bundle.manifest, example(bundle)
    runner = Runner(manifest=manifest, files=bundle.graphs())
    masks = check_masks(manifest, inputs, masked=True)
    parameters = {t.name: draw_parameter(1, t, i) for i, t in enumerate(manifest.tensors)}
    whole, parts = (
        runner.step(
            form="portable", parameters=parameters, inputs=inputs, masks=masks, in_parts=in_parts
        )
        for in_parts in (False, True)
    )
    assert whole.gradients.keys() == parts.gradients.keys()
    for name, gradient in whole.gradients.items():
        assert np.abs(gradient).max() >= 0.0, name  # NaN would equal nothing
        np.testing.assert_array_equal(parts.gradients[name], gradient, err_msg=name)


def test_every_inner_backward_of_a_shipped_bundle_is_in_parts(bundle: Bundle) -> None:
    for segment in bundle.manifest.segments[1:]:
        assert bundle.manifest.kinds[segment.kind].forms["portable"].parts is not None
