"""How many threads an engine starts, and why it leaves onnxruntime's global pool alone.

Each test is a child process: threads are counted in it, and a global pool would outlive a test.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from onnx import TensorProto, helper

from p2ptrain.engine.onnxruntime_engine import import_onnxruntime

ROOT = Path(__file__).resolve().parents[2]
GRAPH_COUNT = 8
COUNT_THREADS = f"""
import json, os, sys
from p2ptrain.engine.onnxruntime_engine import import_onnxruntime, open_engine
import_onnxruntime()
content = sys.stdin.buffer.read()
graphs = [content.replace(b"graph 0", b"graph %d" % index) for index in range({GRAPH_COUNT})]

def started(threads):
    before = len(os.listdir("/proc/self/task"))
    engine = open_engine(threads=threads)
    programs = [engine.compile(graph) for graph in graphs * 2]
    assert len(set(programs)) == {GRAPH_COUNT}
    return len(os.listdir("/proc/self/task")) - before

print(json.dumps([started(threads) for threads in (1, 2, 3, 1)]))
"""
GLOBAL_POOL = """
import json, sys
from p2ptrain.engine.onnxruntime_engine import import_onnxruntime, open_engine
import_onnxruntime().set_global_thread_pool_sizes(2, 1)
content, refusals = sys.stdin.buffer.read(), []
for attempt in (
    lambda: import_onnxruntime().set_global_thread_pool_sizes(1, 1),
    lambda: open_engine(threads=1).compile(content),
):
    try:
        attempt()
    except Exception as error:
        refusals.append(str(error))
print(json.dumps(refusals))
"""


def child(code: str) -> object:
    """What a child prints as JSON, given a graph on its stdin."""
    ended = subprocess.run(
        [sys.executable, "-c", code], input=matmul(), capture_output=True, check=False,
        cwd=ROOT, timeout=60,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr.decode()
    return json.loads(ended.stdout.splitlines()[-1])


def matmul() -> bytes:
    """A small graph whose name can be changed in its bytes."""
    a, b, c = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", "n"]) for name in "abc")
    node = helper.make_node("MatMul", ["a", "b"], ["c"])
    graph = helper.make_graph([node], "graph 0", [a, b], [c])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    content: bytes = model.SerializeToString()
    return content


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted in /proc")
def test_engine_starts_its_threads_once_per_distinct_graph_and_none_for_one_thread() -> None:
    assert child(COUNT_THREADS) == [0, GRAPH_COUNT, 2 * GRAPH_COUNT, 0]


def test_global_pool_would_fix_the_threads_of_every_later_run() -> None:
    """The reason to leave it alone: no second size, and no session with threads of its own.

    A peer takes part in runs one after another, each with the threads of its contract. Should
    this fail because onnxruntime allows more, a pool shared by all sessions is worth another look.
    """
    if not hasattr(import_onnxruntime(), "set_global_thread_pool_sizes"):
        pytest.skip(f"onnxruntime {import_onnxruntime().__version__} has no global pool in Python")
    again, beside = child(GLOBAL_POOL)  # type: ignore[misc]  # checked by unpacking
    assert "already been created" in again
    assert "use_per_session_threads must be false" in beside
