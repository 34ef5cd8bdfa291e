"""Train every shipped bundle for a few steps and save what came of it, on any machine.

    python -m tests.shipped_training OUT.npz STEPS BATCH

Texts are short: one step of gpt-nano at its full context takes six seconds under emulation, and
an eighth of the positions goes through the same graphs.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import sys
from typing import Final, NamedTuple

import numpy as np

from p2ptrain.engine.contract import Array
from p2ptrain.engine.onnxruntime_engine import open_engine
from p2ptrain.store.bundles import Bundle, bundle_from_parts, load_bundle, shipped_bundles
from p2ptrain.training.contract import OptimizerChoice
from tests.bundles import contract_for, graph_files
from tests.made_up import MadeUpSamples
from tests.pipelines import LocalPipeline

CONTEXT: Final = 16
LEARNING_RATE: Final = 0.05
LEARNING_RATE_NORMED: Final = 1e-5
"""Of a model with BatchNorm. At 0.01 the losses of two runtimes that differ by 4e-7 at the first
step differ by 1e-4 at the second and 6e-3 at the fourth: rounding moves values across the kinks of
ReLU6, and each layer's statistics make it larger."""


class Trained(NamedTuple):
    """What training gave; tensors, running values among them, by name."""

    losses: Array
    drawn: dict[str, Array]
    after: dict[str, Array]


def short_context(bundle: Bundle) -> Bundle:
    """The same model and graphs, trained on texts of CONTEXT tokens; others as they are."""
    manifest = bundle.manifest
    if manifest.data.context <= CONTEXT:
        return bundle
    symbols = {
        name: dataclasses.replace(symbol, size=CONTEXT) if symbol.kind == "sequence" else symbol
        for name, symbol in manifest.symbols.items()
    }
    data = dataclasses.replace(manifest.data, context=CONTEXT)
    shorter = dataclasses.replace(manifest, symbols=symbols, data=data)
    return bundle_from_parts(shorter.to_bytes(), graph_files(bundle))


def train(name: str, *, steps: int, batch: int) -> Trained:
    """Steps of SGD over one batch that stays the same; two stages, one thread."""
    bundle = short_context(load_bundle(shipped_bundles()[name]))
    normed = has_running_values(bundle)
    rate = LEARNING_RATE_NORMED if normed else LEARNING_RATE
    sgd = OptimizerChoice(
        name="sgd", peak_learning_rate=rate, final_learning_rate=rate, warmup_steps=0
    )
    contract = contract_for(
        bundle,
        steps=steps,
        microbatch_size=batch,
        microbatches=1,
        optimizer=sgd,
        dropout=0.0 if normed else None,  # masks would hide what so small steps gain
    )
    middle = len(bundle.manifest.segments) // 2
    samples = MadeUpSamples(bundle.manifest)
    pipeline = LocalPipeline.make(open_engine(threads=1), bundle, contract, (middle,), samples)
    drawn = tensors(pipeline, 0)
    pipeline.train(1, steps)
    return Trained(np.array(pipeline.losses), drawn, tensors(pipeline, steps))


def has_running_values(bundle: Bundle) -> bool:
    """Whether its training forward replaces running statistics."""
    return any(tensor.binding == "running" for tensor in bundle.manifest.tensors)


def tensors(pipeline: LocalPipeline, step: int) -> dict[str, Array]:
    """Every parameter and running value of the model."""
    found: dict[str, Array] = {}
    for state in pipeline.states(step):
        found |= state.tensors | state.running
    return found


def load(path: str, name: str) -> Trained:
    """What `main` saved of one bundle."""
    with np.load(path) as saved:
        parts: dict[str, dict[str, Array]] = {"drawn": {}, "after": {}}
        for key in saved.files:
            bundle, part, tensor = key.split("/", 2)
            if bundle == name and part in parts:
                parts[part][tensor] = saved[key]
        return Trained(saved[f"{name}/losses/"], parts["drawn"], parts["after"])


def main(out: str, steps: str, batch: str) -> None:
    """Train, save, and print what computed it."""
    results: dict[str, Array] = {}
    for name in shipped_bundles():
        losses, drawn, after = train(name, steps=int(steps), batch=int(batch))
        results[f"{name}/losses/"] = losses
        results |= {f"{name}/drawn/{tensor}": values for tensor, values in drawn.items()}
        results |= {f"{name}/after/{tensor}": values for tensor, values in after.items()}
    np.savez(out, **results)
    build = open_engine(threads=1).build
    print(json.dumps({"machine": platform.machine(), "runtime": build.runtime, "isa": build.isa}))


if __name__ == "__main__":
    main(*sys.argv[1:])
