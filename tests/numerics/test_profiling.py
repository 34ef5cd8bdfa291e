"""Profiling times every kind once and compiles nothing twice."""

from __future__ import annotations

import gc

import numpy as np

from p2ptrain.engine.onnxruntime_engine import OnnxRuntimeEngine
from p2ptrain.runtime.compute.profiling import made_up_feed, profile_kinds
from p2ptrain.runtime.compute.stopwatch import Stopwatch
from tests.bundles import CONTEXT, VOCABULARY, tiny_bundle
from tests.counted_work import RUN_NS, CountedEngine, WorkClock
from tests.parted_bundle import parted_bundle
from tests.varied_bundle import varied_bundle


def test_profile_kinds_gives_every_distinct_segment_a_cost() -> None:
    engine, bundle = OnnxRuntimeEngine(threads=1), tiny_bundle()
    compiled = []
    inner = engine._session
    engine._session = lambda *graph: compiled.append(graph) or inner(*graph)  # type: ignore[method-assign]
    first = profile_kinds(engine, bundle, "portable", 2, 3)
    assert set(first) == {"embed", "block", "head"}
    assert all(cost.forward_ns > 0 and cost.backward_ns > 0 for cost in first.values())
    assert all(cost.norm_ns > 0 and cost.update_ns > 0 for cost in first.values())
    assert len(compiled) == 2 * 3 + 1
    profile_kinds(engine, bundle, "portable", 4, 1)
    assert len(compiled) == 2 * 3 + 1


def test_backwards_are_timed_in_parts_where_that_is_asked() -> None:
    engine, bundle = OnnxRuntimeEngine(threads=1), parted_bundle(tiny_bundle())
    whole = profile_kinds(engine, bundle, "portable", 2, 2)
    assert all(cost.cotangents_ns is None for cost in whole.values())
    parts = profile_kinds(engine, bundle, "portable", 2, 2, in_parts=True)
    for cost in parts.values():
        assert cost.forward_ns > 0
        assert cost.backward_ns > 0
        assert cost.cotangents_ns is not None
    assert parts["block"].gradients_ns > 0
    assert (parts["embed"].cotangents_ns or 0) < parts["embed"].gradients_ns, "all of it waits"


def test_no_more_parts_are_begun_with_once_measuring_has_taken_long() -> None:
    clock, bundle = WorkClock(), parted_bundle(tiny_bundle())
    costs = profile_kinds(
        CountedEngine(clock, 1), bundle, "portable", 2, 1, in_parts=True,
        stopwatch=Stopwatch(clock_ns=clock), parts_until_ns=clock() + 1,
    )  # fmt: skip
    first, *others = costs.values()
    assert first.gradients_ns == RUN_NS
    assert len(others) > 1
    for cost in others:
        assert (cost.cotangents_ns, cost.gradients_ns) == (cost.backward_ns, 0)


def test_end_of_a_step_is_timed_under_the_optimizer_of_the_run() -> None:
    clock, bundle = WorkClock(), varied_bundle()
    stopwatch = Stopwatch(clock_ns=clock)
    for optimizer in bundle.manifest.updates:
        costs = profile_kinds(
            CountedEngine(clock, 1), bundle, "portable", 2, 1, optimizer=optimizer,
            stopwatch=stopwatch,
        )  # fmt: skip
        assert [cost.forward_ns for cost in costs.values()] == [RUN_NS] * len(costs)
        assert [cost.norm_ns for cost in costs.values()] == [0] * len(costs), "no graph runs"
        for index, segment in enumerate(bundle.manifest.segments):
            tensors = bundle.manifest.segment_tensors(index)
            regions = {t.decay for t in tensors if t.binding == "trainable"}
            assert costs[segment.kind].update_ns == len(regions) * RUN_NS


def test_profile_kinds_takes_any_inputs_and_keeps_no_frozen_placeholder() -> None:
    engine, bundle = OnnxRuntimeEngine(threads=1), varied_bundle()
    costs = profile_kinds(engine, bundle, "portable", 2, 1)
    assert set(costs) == {"start", "mix", "fixed", "block", "head"}
    gc.collect()
    assert len(engine._with_constants) == 0


def test_made_up_feed_is_valid_for_every_port() -> None:
    feed = made_up_feed(varied_bundle().manifest, 3)
    tokens, keep = feed.inputs
    assert tokens.shape == keep.shape == feed.labels.shape == (3, CONTEXT)
    assert (tokens.dtype, keep.dtype) == (np.int64, np.bool_)
    for ids in (tokens, feed.labels):
        assert 0 <= ids.min() < ids.max() < VOCABULARY
    assert keep.all(), "nothing is hidden"
