"""Train every shipped bundle for a few steps and save what came of it, on any machine.

    python -m tests.arm.small_training TEXT OUT.npz

The text is short, the context too: one step of gpt-nano at its full context takes six seconds
under emulation, and an eighth of the positions goes through the same graphs.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import sys
from pathlib import Path
from typing import Final

import numpy as np

from p2ptrain.engine.contract import Array
from p2ptrain.engine.onnxruntime_engine import open_engine
from p2ptrain.store.bundles import Bundle, bundle_from_parts, load_bundle, shipped_bundles
from p2ptrain.training.contract import OptimizerChoice
from tests.bundles import contract_for, graph_files
from tests.pipelines import LocalPipeline

STEPS: Final = 3
CONTEXT: Final = 16
SGD: Final = OptimizerChoice(name="sgd", peak_learning_rate=0.1, warmup_steps=0)


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


def train(bundle: Bundle, text: Array) -> dict[str, Array]:
    """Losses, parameters as drawn, and parameters after STEPS steps; two stages, one thread."""
    bundle = short_context(bundle)
    contract = contract_for(bundle, steps=STEPS, microbatch_size=1, microbatches=1, optimizer=SGD)
    middle = len(bundle.manifest.segments) // 2
    pipeline = LocalPipeline.make(open_engine(threads=1), bundle, contract, (middle,), text)
    drawn = parameters(pipeline, 0)
    pipeline.train(1, STEPS)
    after = parameters(pipeline, STEPS)
    return {"losses": np.array(pipeline.losses), "drawn": drawn, "trained": after}


def parameters(pipeline: LocalPipeline, step: int) -> Array:
    """Every parameter of the model in one vector, in segment and name order."""
    found = [
        values.reshape(-1)
        for state in pipeline.states(step)
        for _, values in sorted(state.tensors.items())
    ]
    return np.concatenate(found)


def main(text_path: str, out: str) -> None:
    """Train, save, and print what computed it."""
    text = np.frombuffer(Path(text_path).read_bytes(), np.uint8)
    results = {
        f"{name}/{what}": values
        for name, directory in shipped_bundles().items()
        for what, values in train(load_bundle(directory), text).items()
    }
    np.savez(out, **results)
    build = open_engine(threads=1).build
    print(json.dumps({"machine": platform.machine(), "runtime": build.runtime, "isa": build.isa}))


if __name__ == "__main__":
    main(*sys.argv[1:])
