"""Train two steps of one stage in this interpreter and print what it took as one JSON line."""

from __future__ import annotations

import argparse
import json
import os
import time
from typing import Any

from p2ptrain.engine.contract import Engine, Program
from p2ptrain.engine.onnxruntime_engine import open_engine
from p2ptrain.ids import Digest
from p2ptrain.runtime.compute.profiling import made_up_feed
from p2ptrain.runtime.compute.stage import StageWorker
from p2ptrain.schedule.actions import Held
from p2ptrain.store.bundles import Bundle, find_bundle, load_bundle
from p2ptrain.training.contract import Contract, OptimizerChoice
from p2ptrain.training.memory import stage_memory
from p2ptrain.wire.codec import to_plain
from tools.bench.deeper import deeper_bundle
from tools.bench.processes import peak_bytes, resident_bytes

STEPS = 2
"""The second run of a graph may use memory that the first did not."""
EXTRA_MICROBATCHES = 2


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--bundle", required=True)
    parser.add_argument("--blocks", type=int)
    parser.add_argument("--form", default="portable")
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--in-flight", type=int, required=True)
    parser.add_argument("--rematerialise", action="store_true")
    print(json.dumps(measure(parser.parse_args())))


def measure(options: argparse.Namespace) -> dict[str, Any]:  # Any: JSON
    """Bytes before anything of the model was loaded, ready to train, and at the peak."""
    engine = open_engine(threads=1)
    bundle = load_bundle(find_bundle(options.bundle))
    if options.blocks is not None:
        bundle = deeper_bundle(bundle, options.blocks)
    baseline = resident_bytes(os.getpid()) or 0
    contract = Contract(
        bundle=bundle.digest, seed=0, steps=STEPS, microbatch_size=options.batch,
        microbatches=options.in_flight + EXTRA_MICROBATCHES, form=options.form, codec="fp32",
        threads=1, dropout=None, optimizer=OptimizerChoice(name=options.optimizer),
        training_data=Digest("0" * 64), heldout_data=Digest("0" * 64), evaluate_every=0,
        heldout_microbatches=1, builds=(engine.build,), rematerialise=options.rematerialise,
    )  # fmt: skip
    segments = range(len(bundle.manifest.segments))
    begun_ns = time.perf_counter_ns()
    programs = _compile_all(engine, bundle, options.form)
    compile_ns = time.perf_counter_ns() - begun_ns
    sessions = (resident_bytes(os.getpid()) or 0) - baseline
    stage = StageWorker(
        engine=engine, bundle=bundle, segments=segments, contract=contract,
        holds=Held(in_flight=options.in_flight, delayed=0),
    )  # fmt: skip
    start_ns = time.perf_counter_ns() - begun_ns
    stage.draw_parameters()
    feed = made_up_feed(bundle.manifest, options.batch)
    sequence = 0
    for step in range(1, STEPS + 1):
        for index in range(contract.microbatches + options.in_flight):
            if index < contract.microbatches:
                stage.forward(
                    step=step, microbatch=index, sequence=sequence + index, training=True,
                    inputs=feed.inputs, labels=feed.labels, loss_weight=1e-3,
                )  # fmt: skip
            done = index + 1 - options.in_flight
            if 0 <= done < contract.microbatches:
                stage.backward(microbatch=done, sequence=sequence + done)
        sequence += contract.microbatches
        if stage.held_ties:
            stage.sum_ties({})
        stage.square_sums()
        stage.update(step=step, learning_rate=1e-3, clip_scale=1.0)
    holds = Held(in_flight=options.in_flight, delayed=0)
    predicted = stage_memory(bundle.manifest, segments, contract, holds, baseline)
    return {
        "baseline_bytes": baseline,
        "sessions_bytes": sessions,
        "segments": len(segments),
        "graphs": len(programs),
        "compile_ns": compile_ns,
        "start_ns": start_ns,
        "peak_bytes": peak_bytes(os.getpid()) or 0,
        "predicted": to_plain(predicted),
        "predicted_bytes": predicted.total,
    }


def _compile_all(engine: Engine, bundle: Bundle, form: str) -> set[Program]:
    """Every segment's graphs, as far as no constant belongs to them."""
    manifest = bundle.manifest
    programs = set()
    for index, segment in enumerate(manifest.segments):
        if all(tensor.binding != "frozen" for tensor in manifest.segment_tensors(index)):
            pair = manifest.kinds[segment.kind].forms[form]
            for digest in (pair.forward, pair.backward):
                programs.add(engine.compile(bundle.graph(digest)))
    return programs


if __name__ == "__main__":
    main()
