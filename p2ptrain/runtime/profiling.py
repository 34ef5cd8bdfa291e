"""Measure what one microbatch costs on this peer, for every distinct segment."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

import numpy as np

from p2ptrain.engine.contract import Array, Engine
from p2ptrain.ids import Digest
from p2ptrain.planner.profile import KindCost
from p2ptrain.runtime.stage import StageWorker
from p2ptrain.store.bundles import Bundle
from p2ptrain.training.contract import Contract, OptimizerChoice

_NO_DATA: Final = Digest("0" * 64)
_STEP: Final = 1


def profile_kinds(
    engine: Engine, bundle: Bundle, form: str, batch: int, repeats: int
) -> dict[str, KindCost]:
    """The shortest forward and backward time over `repeats`, by kind name.

    Each kind is timed in a stage of its own, along the path that training takes: masks are drawn,
    gradients are summed. Programs stay compiled in the engine and are used again by the run.

    Args:
        engine: With the threads that the run will have.
        bundle: Of the model.
        form: Of the graphs.
        batch: Samples of a microbatch.
        repeats: At least 1; the first run of each graph is not counted.
    """
    contract = _contract(engine, bundle, form, batch)
    costs: dict[str, KindCost] = {}
    for index, segment in enumerate(bundle.manifest.segments):
        if segment.kind not in costs:
            worker = StageWorker(
                engine=engine,
                bundle=bundle,
                segments=range(index, index + 1),
                contract=contract,
                in_flight=1,
            )
            costs[segment.kind] = _time_stage(worker, bundle, batch, repeats)
    return costs


def _time_stage(worker: StageWorker, bundle: Bundle, batch: int, repeats: int) -> KindCost:
    worker.draw_parameters()
    tokens = np.zeros((batch, bundle.manifest.data.context), np.int64)
    forward_ns, backward_ns = [], []
    for sequence in range(repeats + 1):
        _fill(worker.entry(sequence), 1.0)
        _fill(worker.exit_cotangent(sequence), 1e-3)

        def forward(sequence: int = sequence) -> None:
            worker.forward(
                step=_STEP,
                microbatch=sequence,
                sequence=sequence,
                training=True,
                inputs=tokens,
                labels=tokens,
                loss_weight=1.0,
            )

        def backward(sequence: int = sequence) -> None:
            worker.backward(microbatch=sequence, sequence=sequence)

        forward_ns.append(_time_ns(forward))
        backward_ns.append(_time_ns(backward))
    return KindCost(forward_ns=min(forward_ns[1:]), backward_ns=min(backward_ns[1:]))


def _time_ns(run: Callable[[], None]) -> int:
    start = time.perf_counter_ns()
    run()
    return time.perf_counter_ns() - start


def _fill(arrays: tuple[Array, ...], scale: float) -> None:
    """Ordinary values: zeros or denormals would be timed wrongly."""
    for array in arrays:
        if array.dtype.kind == "f":
            flat = array.reshape(-1)
            flat[:] = scale * np.cos(np.arange(flat.size))


def _contract(engine: Engine, bundle: Bundle, form: str, batch: int) -> Contract:
    return Contract(
        bundle=bundle.digest,
        seed=0,
        steps=1,
        microbatch_size=batch,
        microbatches=1,
        form=form,
        codec="fp32",
        threads=1,
        dropout=None,
        optimizer=OptimizerChoice(name=next(iter(bundle.manifest.updates))),
        training_data=_NO_DATA,
        heldout_data=_NO_DATA,
        evaluate_every=0,
        heldout_microbatches=1,
        builds=(engine.build,),
    )
