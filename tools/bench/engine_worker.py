"""A whole model in one `StageWorker`, timed step by step; needs p2ptrain, not torch.

    python -m tools.bench.engine_worker --bundle DIR --workload DIR --threads N

Prints one JSON line when it is ready, then answers each line `go` by training the workload's steps
from the seeded parameters: seconds and losses of each step.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any, Final

import numpy as np

from p2ptrain.engine.contract import Array
from p2ptrain.engine.onnxruntime_engine import open_engine
from p2ptrain.ids import Digest
from p2ptrain.runtime.compute.stage import StageWorker
from p2ptrain.store.bundles import load_bundle
from p2ptrain.training.clipping import clip_scale
from p2ptrain.training.contract import Contract, OptimizerChoice

_NO_DATA: Final = Digest("0" * 64)


class Session:
    """One engine, one stage of all segments, and the workload's samples."""

    def __init__(self, options: argparse.Namespace) -> None:
        settings = json.loads((options.workload / "workload.json").read_text())
        self._optimizer = OptimizerChoice(**settings["optimizer"])
        self._steps = int(settings["steps"])
        with np.load(options.workload / "batches.npz") as batches:
            arrays = {name: batches[name] for name in batches.files}
        bundle = load_bundle(options.bundle)
        names = [port.value.name for port in bundle.manifest.data_ports]
        self._inputs = [arrays[f"input.{name}"] for name in names]
        self._labels = arrays["labels"]
        self._microbatches = int(self._labels.shape[1])
        engine = open_engine(threads=options.threads)
        self.build = engine.build
        self._worker = StageWorker(
            engine=engine,
            bundle=bundle,
            segments=range(len(bundle.manifest.segments)),
            contract=self._contract(bundle.digest, options),
            in_flight=1,
        )

    def run(self) -> dict[str, list[float]]:
        """Train all steps from the start."""
        self._worker.draw_parameters()
        seconds, losses = [], []
        for step in range(1, self._steps + 1):
            start_s = time.perf_counter()
            losses.append(self._step(step))
            seconds.append(time.perf_counter() - start_s)
        return {"seconds": seconds, "losses": losses}

    def _step(self, step: int) -> float:
        worker, total = self._worker, 0.0
        weight = 1.0 / self._labels[step - 1].size
        for microbatch in range(self._microbatches):
            sequence = (step - 1) * self._microbatches + microbatch
            loss = worker.forward(
                step=step,
                microbatch=microbatch,
                sequence=sequence,
                training=True,
                inputs=tuple(self._at(array, step, microbatch) for array in self._inputs),
                labels=self._at(self._labels, step, microbatch),
                loss_weight=weight,
            )
            worker.backward(microbatch=microbatch, sequence=sequence)
            total += loss or 0.0
        clip = clip_scale([float(s) for s in worker.square_sums()], self._optimizer.clip_norm)
        rate = self._optimizer.peak_learning_rate
        worker.update(step=step, learning_rate=rate, clip_scale=clip.scale)
        return total

    def _at(self, array_SMB: Array, step: int, microbatch: int) -> Array:
        return np.ascontiguousarray(array_SMB[step - 1, microbatch])

    def _contract(self, bundle: Digest, options: argparse.Namespace) -> Contract:
        return Contract(
            bundle=bundle,
            seed=0,
            steps=self._steps,
            microbatch_size=int(self._labels.shape[2]),
            microbatches=self._microbatches,
            form=options.form,
            codec="fp32",
            threads=options.threads,
            dropout=0.0,
            optimizer=self._optimizer,
            training_data=_NO_DATA,
            heldout_data=_NO_DATA,
            evaluate_every=0,
            heldout_microbatches=1,
            builds=(self.build,),
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--workload", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--form", default="portable")
    session = Session(parser.parse_args())
    _say({"ready": True, "runtime": f"{session.build.runtime} {session.build.version}"})
    for line in sys.stdin:
        if line.strip() == "go":
            _say(session.run())


def _say(document: dict[str, Any]) -> None:  # Any: JSON
    print(json.dumps(document), flush=True)


if __name__ == "__main__":
    main()
