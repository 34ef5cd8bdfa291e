"""Torch on the same workload, eager or compiled; needs torch, numpy and the model's module only.

    python -m tools.bench.eager_worker --workload DIR --threads N [--compile]

Speaks as `engine_worker` does. AdamW decays the same tensors, gradients are clipped by the same
norm, microbatches are accumulated.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_


class Session:
    """A module, its optimizer and the workload's samples."""

    def __init__(self, options: argparse.Namespace) -> None:
        folder = options.workload
        self._settings = json.loads((folder / "workload.json").read_text())
        place, _, function = self._settings["factory"].partition(":")
        factory = getattr(importlib.import_module(place), function)
        self._module: nn.Module = factory(**self._settings["arguments"])
        self._call = torch.compile(self._module) if options.compile else self._module
        with np.load(folder / "batches.npz") as batches:
            names = self._settings["inputs"]
            self._inputs = [torch.from_numpy(batches[f"input.{name}"]) for name in names]
            self._labels = torch.from_numpy(batches["labels"])
        with np.load(folder / "initial.npz") as initial:
            self._initial = {name: torch.from_numpy(initial[name]) for name in initial.files}

    def run(self) -> dict[str, list[float]]:
        """Train all steps from the start."""
        self._reset()
        seconds, losses = [], []
        for step in range(self._settings["steps"]):
            start_s = time.perf_counter()
            losses.append(self._step(step))
            seconds.append(time.perf_counter() - start_s)
        return {"seconds": seconds, "losses": losses}

    def _reset(self) -> None:
        missing = self._module.load_state_dict(self._initial, strict=False)
        counters = [n for n in missing.missing_keys if not n.endswith("num_batches_tracked")]
        if counters or missing.unexpected_keys:
            raise SystemExit(f"the bundle has other tensors than torch: {missing}")
        self._module.train()
        chosen, plain = self._settings["optimizer"], set(self._settings["undecayed"])
        named = list(self._module.named_parameters())
        self._optimizer = torch.optim.AdamW(
            [
                {"params": [p for n, p in named if n not in plain]},
                {"params": [p for n, p in named if n in plain], "weight_decay": 0.0},
            ],
            lr=chosen["peak_learning_rate"],
            betas=(chosen["beta1"], chosen["beta2"]),
            eps=chosen["epsilon"],
            weight_decay=chosen["weight_decay"],
        )

    def _step(self, step: int) -> float:
        self._optimizer.zero_grad()
        total, count = 0.0, self._labels[step].numel()
        for microbatch in range(self._labels.shape[1]):
            result = self._call(*(array[step, microbatch] for array in self._inputs))
            loss = _summed(result, self._labels[step, microbatch]) / count
            loss.backward()
            total += loss.item()
        clip_norm = self._settings["optimizer"]["clip_norm"]
        clip_grad_norm_(self._module.parameters(), clip_norm)
        self._optimizer.step()
        return total


def _summed(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy over the last axis, summed."""
    return functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="sum")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workload", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_num_interop_threads(1)
    session = Session(options)
    _say({"ready": True, "torch": torch.__version__})
    for line in sys.stdin:
        if line.strip() == "go":
            _say(session.run())


def _say(document: dict[str, Any]) -> None:  # Any: JSON
    print(json.dumps(document), flush=True)


if __name__ == "__main__":
    main()
