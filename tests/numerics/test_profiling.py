"""Profiling times every kind once and compiles nothing twice."""

from __future__ import annotations

from p2ptrain.engine.onnxruntime_engine import OnnxRuntimeEngine
from p2ptrain.runtime.profiling import profile_kinds
from tests.bundles import tiny_bundle


def test_profile_kinds_gives_every_distinct_segment_a_cost() -> None:
    engine, bundle = OnnxRuntimeEngine(threads=1), tiny_bundle()
    compiled = []
    inner = engine._session
    engine._session = lambda graph: compiled.append(graph) or inner(graph)  # type: ignore[method-assign]
    first = profile_kinds(engine, bundle, "portable", 2, 3)
    assert set(first) == {"embed", "block", "head"}
    assert all(cost.forward_ns > 0 and cost.backward_ns > 0 for cost in first.values())
    assert len(compiled) == 2 * 3 + 1
    profile_kinds(engine, bundle, "portable", 4, 1)
    assert len(compiled) == 2 * 3 + 1
