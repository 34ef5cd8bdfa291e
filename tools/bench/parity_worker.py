"""One runtime's part of `tools/parity_table.py`: what it computes, as JSON.

python -m tools.bench.parity_worker FOLDER BUNDLE
"""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np

from p2ptrain.bundle.manifest import FORMS, Manifest
from p2ptrain.engine.onnxruntime_engine import open_engine
from p2ptrain.graph.measured import gradient_error
from p2ptrain.graph.runner import Arrays, Runner
from p2ptrain.ids import Digest
from p2ptrain.store.bundles import load_bundle, shipped_bundles
from tools.parity_table import MOMENTUM, STEPS, drawn, learning_rate


def main(folder: str, name: str) -> None:
    """Print a row for each form that this runtime has."""
    bundle = load_bundle(shipped_bundles()[name])
    files = {Digest(digest): bundle.graph(Digest(digest)) for digest in bundle.manifest.graphs}
    runner = Runner(manifest=bundle.manifest, files=files)
    build = open_engine(threads=1).build
    forms = FORMS if build.runtime == "onnxruntime-training" else ("portable",)
    label = (
        f"{build.runtime} {build.version}, Python {'.'.join(platform.python_version_tuple()[:2])}"
    )
    print(json.dumps([{"runtime": label, **row(runner, Path(folder), form)} for form in forms]))


def row(runner: Runner, folder: Path, form: str) -> dict[str, Any]:  # Any: JSON
    """Worst gradient error of open and random masks, and the loss after the descent."""
    values, inputs = load(folder / "values.npz"), load(folder / "inputs.npz")
    errors = []
    for index in range(2):
        masks = load_masks(folder / f"masks-{index}.npz", runner.manifest)
        ran = runner.step(form=form, parameters=values, inputs=inputs, masks=masks)
        errors.append(gradient_error(ran.gradients, load(folder / f"gradients-{index}.npz")))
    error, worst = max(errors)
    loss = descend(runner, form, inputs, load_masks(folder / "masks-0.npz", runner.manifest))
    return {"form": form, "error": error, "worst": worst, "loss": loss}


def descend(runner: Runner, form: str, inputs: Arrays, masks: list[Arrays]) -> float:
    """The loss after STEPS updates by the bundle's own update graph."""
    values = drawn(runner.manifest)
    rule = runner.manifest.updates["sgd"]
    momenta: Arrays = {}
    given = {"learning_rate": learning_rate(runner.manifest), "momentum": MOMENTUM}
    scalars = {
        name: np.array(given.get(name, float(name == "clip_scale")), np.float32)
        for name in rule.scalars
    }
    (state,) = rule.state
    for _ in range(STEPS):
        ran = runner.step(form=form, parameters=values, inputs=inputs, masks=masks)
        values |= ran.running
        for name, gradient in ran.gradients.items():
            flat = {"parameter": values[name].reshape(-1), "gradient": gradient.reshape(-1)}
            momentum = momenta.get(name, np.zeros(gradient.size, np.float32))
            feeds = {**flat, f"state.{state}": momentum, **scalars}
            new = runner.run(rule.graph, feeds, frozen={})
            values[name] = new["new.parameter"].reshape(gradient.shape)
            momenta[name] = new[f"new.state.{state}"]
    ran = runner.step(form=form, parameters=values, inputs=inputs, masks=masks)
    return float(ran.loss)


def load(path: Path) -> Arrays:
    """Arrays by name."""
    with np.load(path) as saved:
        return dict(saved)


def load_masks(path: Path, manifest: Manifest) -> list[Arrays]:
    """Masks per segment, by local name."""
    saved = load(path)
    return [
        {key.partition("/")[2]: v for key, v in saved.items() if key.startswith(f"{index}/")}
        for index in range(len(manifest.segments))
    ]


if __name__ == "__main__":
    main(*sys.argv[1:])
