"""What the shipped bundles say of their sharding gives the losses and gradients of the whole."""

from __future__ import annotations

import numpy as np
import pytest

from p2ptrain.bundle.manifest import Manifest
from p2ptrain.graph.runner import Arrays, Runner
from p2ptrain.store.bundles import load_bundle, shipped_bundles
from p2ptrain.training.random import draw_parameter
from tests.bundles import graph_files
from tests.made_up import MadeUpSamples
from tests.sharded_runner import Case, errors
from tests.shipped_training import short_context

SAMPLES = 2
ERROR_MAX = 1e-5
TENSOR = {"tensor (1, 1)", "tensor (4, 3)", "tensor (2, 1, 1)"}
SEQUENCE = {"sequence (1, 1)", "sequence (4, 3)", "sequence (2, 1, 1)"}
PLANS = {
    "bert-mini": TENSOR | SEQUENCE,
    "gpt-nano": TENSOR | SEQUENCE,
    "llama-nano": TENSOR | SEQUENCE,
    "vit-tiny": TENSOR,
}
"""Two shards, even and as uneven as the units allow, and three."""


@pytest.mark.parametrize("name", PLANS)
def test_shards_give_loss_and_gradients_of_the_whole(name: str) -> None:
    bundle = short_context(load_bundle(shipped_bundles()[name]))
    manifest = bundle.manifest
    runner = Runner(manifest=manifest, files=dict(graph_files(bundle)))
    parameters = {t.name: draw_parameter(3, t, i) for i, t in enumerate(manifest.tensors)}
    inputs, masks = samples(manifest), random_masks(manifest)
    wanted = runner.step(form="portable", parameters=parameters, inputs=inputs, masks=masks)
    case = Case(
        manifest=manifest, files=runner.files, parameters=parameters, inputs=inputs, masks=masks,
        wanted=wanted,
    )  # fmt: skip
    found = errors(case, runner)
    assert set(found) == PLANS[name]
    assert max(found.values()) <= ERROR_MAX, found


def samples(manifest: Manifest) -> Arrays:
    """One microbatch by the names of the ports that it is fed to."""
    feed = MadeUpSamples(manifest).training(seed=0, step=0, first_sample=0, count=SAMPLES)
    names = [port.value.name for port in manifest.data_ports]
    labels = np.asarray(feed.labels)
    return {
        **dict(zip(names, feed.inputs, strict=True)),
        manifest.labels_port.value.name: labels,
        "loss_weight": np.array(1.0 / labels.size, np.float32),
    }


def random_masks(manifest: Manifest) -> list[Arrays]:
    """Of each segment: dropout as open as the model's own."""
    generator = np.random.Generator(np.random.Philox(9))
    found: list[Arrays] = []
    for segment in manifest.segments:
        masks: Arrays = {}
        for site in manifest.kinds[segment.kind].masks:
            shape = manifest.shape(site.value, batch=SAMPLES)
            kept = generator.random(shape) >= site.probability
            masks[site.value.name] = (kept / (1.0 - site.probability)).astype(np.float32)
        found.append(masks)
    return found
