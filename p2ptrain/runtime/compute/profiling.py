"""Measure what one microbatch costs on this peer, for every distinct segment."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from typing import Final

import numpy as np

from p2ptrain.bundle.manifest import Manifest, Port
from p2ptrain.engine.contract import Array, Engine
from p2ptrain.ids import Digest
from p2ptrain.planner.profile import KindCost
from p2ptrain.runtime.compute.stage import StageWorker
from p2ptrain.runtime.compute.stopwatch import NO_QUOTA, Stopwatch, Taken
from p2ptrain.schedule.actions import Held
from p2ptrain.store.bundles import Bundle
from p2ptrain.training.contract import Contract, OptimizerChoice
from p2ptrain.training.feed import Feed

_NO_DATA: Final = Digest("0" * 64)
_STEP: Final = 1


def profile_kinds(
    engine: Engine,
    bundle: Bundle,
    form: str,
    batch: int,
    repeats: int,
    in_parts: bool = False,
    *,
    optimizer: str = "",
    kinds: Collection[str] | None = None,
    stopwatch: Stopwatch = NO_QUOTA,
    parts_until_ns: int | None = None,
) -> dict[str, KindCost]:
    """The shortest time over `repeats` that can be kept up of all that a step does, by kind name.

    Each kind is timed in a stage of its own, along the path that training takes: masks are drawn,
    gradients are summed, and an update follows each microbatch. Programs stay compiled in the
    engine and are used again by the run.

    Args:
        engine: With the threads that the run will have.
        bundle: Of the model.
        form: Of the graphs.
        batch: Samples of a microbatch.
        repeats: At least 1; the first run of each graph is not counted.
        in_parts: Time backwards in their two parts as well.
        optimizer: Whose updates are timed; empty: the bundle's first.
        kinds: Only these; None: all.
        stopwatch: By which it is timed.
        parts_until_ns: A moment of its clock after which no more parts are begun with: backwards
            then count as whole, so that nothing is gained by delaying gradients.
    """
    contract = _contract(engine, bundle, form, batch, optimizer)
    costs: dict[str, KindCost] = {}
    for index, segment in enumerate(bundle.manifest.segments):
        if segment.kind not in costs and (kinds is None or segment.kind in kinds):
            parted = in_parts and (parts_until_ns is None or stopwatch.clock_ns() < parts_until_ns)
            worker = StageWorker(
                engine=engine,
                bundle=bundle,
                segments=range(index, index + 1),
                contract=contract,
                holds=Held(in_flight=1, delayed=1 if parted else 0),
            )
            cost = _time_stage(worker, bundle, batch, repeats, stopwatch)
            if in_parts and not parted:
                cost = replace(cost, cotangents_ns=cost.backward_ns, gradients_ns=0)
            costs[segment.kind] = cost
    return costs


def _time_stage(
    worker: StageWorker, bundle: Bundle, batch: int, repeats: int, stopwatch: Stopwatch
) -> KindCost:
    time, lasting_ns = stopwatch.time, stopwatch.lasting_ns
    worker.draw_parameters()
    feed = made_up_feed(bundle.manifest, batch)
    (segment,) = worker.segments
    forwards, backwards, cotangents, gradients = [], [], [], []
    norms: list[Taken] = []
    updates: list[Taken] = []
    sequence = 0
    for _ in range(repeats + 1):
        forwards.append(time(_forward(worker, feed, sequence)))
        backwards.append(time(partial(worker.backward, microbatch=0, sequence=sequence)))
        sequence += 1
        if worker.holds.delayed:
            _forward(worker, feed, sequence)()
            run = partial(worker.backward_cotangents, microbatch=0, sequence=sequence)
            cotangents.append(time(run))
            run = partial(worker.backward_gradients, microbatch=0, sequence=sequence)
            gradients.append(time(run))
            sequence += 1
        if not norms:  # further microbatches add to it
            fill(worker.gradient_vector(segment), 1e-3)
        norms.append(time(worker.rehearse_norm))
        updates.append(time(worker.rehearse_update))
    return KindCost(
        forward_ns=lasting_ns(forwards[1:]),
        backward_ns=lasting_ns(backwards[1:]),
        cotangents_ns=lasting_ns(cotangents[1:]) if cotangents else None,
        gradients_ns=lasting_ns(gradients[1:]) if gradients else 0,
        norm_ns=lasting_ns(norms[1:]),
        update_ns=lasting_ns(updates[1:]),
    )


def _forward(worker: StageWorker, feed: Feed, sequence: int) -> Callable[[], object]:
    """A forward of a microbatch whose inputs are there, and the cotangents for its backward."""
    for array in worker.entry(sequence):
        fill(array, 1.0)
    for array in worker.exit_cotangent(sequence):
        fill(array, 1e-3)
    return partial(
        worker.forward,
        step=_STEP,
        microbatch=sequence,
        sequence=sequence,
        training=True,
        inputs=feed.inputs,
        labels=feed.labels,
        loss_weight=1.0,
    )


def first_optimizer(manifest: Manifest) -> str:
    """The one that is timed where nobody says which; every bundle has one."""
    return next(iter(manifest.updates))


def made_up_feed(manifest: Manifest, batch: int) -> Feed:
    """A microbatch that any model takes: token ids and labels at random within their range.

    Integers of any further port are 0, the one index that every table has.
    """
    generator = np.random.Generator(np.random.Philox(0))
    arrays: list[Array] = []
    range_left = manifest.data.vocabulary
    for port in manifest.data_ports:
        arrays.append(_made_up(manifest, port, batch, range_left, generator))
        range_left = 0 if arrays[-1].dtype.kind == "i" else range_left
    classes = manifest.data.classes or manifest.data.vocabulary
    labels = _made_up(manifest, manifest.labels_port, batch, classes, generator)
    return Feed(inputs=tuple(arrays), labels=labels)


def _made_up(
    manifest: Manifest, port: Port, batch: int, stop: int, generator: np.random.Generator
) -> Array:
    array = np.zeros(manifest.shape(port.value, batch=batch), np.dtype(port.value.dtype))
    if array.dtype.kind == "i" and stop > 0:
        array[...] = generator.integers(0, stop, array.shape)
    else:
        fill(array, 1.0)
    return array


def fill(array: Array, scale: float) -> None:
    """Ordinary values: zeros or denormals would be timed wrongly; masks let everything through."""
    flat = array.reshape(-1)
    if array.dtype.kind == "f":
        flat[:] = scale * np.cos(np.arange(flat.size))
    elif array.dtype.kind == "b":
        flat[:] = True


def _contract(engine: Engine, bundle: Bundle, form: str, batch: int, optimizer: str) -> Contract:
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
        optimizer=OptimizerChoice(name=optimizer or first_optimizer(bundle.manifest)),
        training_data=_NO_DATA,
        heldout_data=_NO_DATA,
        evaluate_every=0,
        heldout_microbatches=1,
        builds=(engine.build,),
    )
