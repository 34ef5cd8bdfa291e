"""From a Hugging Face folder over a bundle with frozen parts to a trained run, in one process."""

from __future__ import annotations

from pathlib import Path

from p2ptrain.engine.onnxruntime_engine import open_engine
from p2ptrain.graph.check import verify
from p2ptrain.graph.export import export
from p2ptrain.graph.fine_tuning import FineTuning
from p2ptrain.graph.measured import Measured
from p2ptrain.graph.source import LABELS, LOSS_WEIGHT, Source
from p2ptrain.graph.write import write_bundle
from p2ptrain.runtime.compute.stage import StageWorker
from p2ptrain.runtime.home.trained_weights import TrainedRun
from p2ptrain.store.bundles import Bundle, load_bundle
from p2ptrain.store.weights import open_weights
from tests.bundles import contract_for
from tests.stored_runs import store_run

STEPS = 5


def tuned_bundle(
    path: Path, source: Source, tuning: FineTuning
) -> tuple[Bundle, tuple[Measured, ...]]:
    """Export, check against the source, write and read back."""
    frozen = frozenset(tuning.frozen(source.training.parameters))
    made = export(source, frozen=frozen, lora=tuning.lora)
    rows = verify(source, made)
    write_bundle(path, made, rows)
    return load_bundle(path), rows


def train(path: Path, bundle: Bundle, source: Source) -> tuple[TrainedRun, list[float]]:
    """Five steps on the source's example, as one stage, stored as a run; and their losses."""
    contract = contract_for(
        bundle, steps=STEPS, microbatches=1, microbatch_size=len(source.example[LABELS]),
        dropout=0.0,
    )  # fmt: skip
    segments = range(len(bundle.manifest.segments))
    worker = StageWorker(
        engine=open_engine(threads=1), bundle=bundle, segments=segments, contract=contract,
        weights=open_weights(bundle),
    )  # fmt: skip
    worker.draw_parameters()
    losses = []
    for step in range(1, STEPS + 1):
        loss = worker.forward(
            step=step, microbatch=0, sequence=step - 1, training=True,
            inputs=tuple(source.example[name] for name in source.data_inputs),
            labels=source.example[LABELS], loss_weight=float(source.example[LOSS_WEIGHT]),
        )  # fmt: skip
        losses.append(0.0 if loss is None else loss)
        worker.backward(microbatch=0, sequence=step - 1)
        worker.sum_ties({})
        worker.square_sums()
        worker.update(step=step, learning_rate=0.02, clip_scale=1.0)
    states = [worker.state(index, STEPS) for index in segments]
    return store_run(path, bundle, contract, states), losses
