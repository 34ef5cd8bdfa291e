"""What any engine must do; runs on whichever onnxruntime the environment has."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from p2ptrain.engine.contract import Array, Engine
from p2ptrain.engine.onnxruntime_engine import (
    import_onnxruntime,
    open_engine,
    runtime_build,
)
from p2ptrain.errors import EngineError, InvariantBroken
from tests.bundles import adamw_graph, sgd_graph

F, I64 = TensorProto.FLOAT, TensorProto.INT64


@pytest.fixture(scope="module", params=[1, 2], ids=["1-thread", "2-threads"])
def engine(request: pytest.FixtureRequest) -> Engine:
    return open_engine(threads=request.param)


def graph(
    nodes: list[tuple[str, list[str], list[str], dict[str, object]]],
    inputs: dict[str, tuple[int, list[object]]],
    outputs: dict[str, tuple[int, list[object]]],
) -> bytes:
    made = helper.make_graph(
        [helper.make_node(kind, i, o, **attributes) for kind, i, o, attributes in nodes],
        "g",
        [helper.make_tensor_value_info(name, *what) for name, what in inputs.items()],
        [helper.make_tensor_value_info(name, *what) for name, what in outputs.items()],
    )
    content: bytes = helper.make_model(
        made, opset_imports=[helper.make_opsetid("", 18)], ir_version=8
    ).SerializeToString()
    return content


def run(engine: Engine, content: bytes, feeds: dict[str, Array], results: dict[str, Array]) -> None:
    binding = engine.compile(content).bind()
    for name, array in feeds.items():
        binding.set_input(name, engine.wrap(array))
    for name, array in results.items():
        binding.set_output(name, engine.wrap(array))
    binding.run()


MATMUL = graph(
    [("MatMul", ["a", "b"], ["c"], {})],
    {"a": (F, ["n", 5]), "b": (F, [5, 3])},
    {"c": (F, ["n", 3])},
)
SOFTMAX = graph(
    [("Softmax", ["x"], ["y"], {"axis": -1})], {"x": (F, ["n", 7])}, {"y": (F, ["n", 7])}
)
GATHER = graph(
    [("Gather", ["t", "i"], ["y"], {})],
    {"t": (F, [9, 4]), "i": (I64, ["b", "s"])},
    {"y": (F, ["b", "s", 4])},
)
SCATTER = graph(
    [("ScatterND", ["z", "i", "u"], ["y"], {"reduction": "add"})],
    {"z": (F, [4]), "i": (I64, ["n", 1]), "u": (F, ["n"])},
    {"y": (F, [4])},
)


def softmax(x: Array) -> Array:
    shifted = np.exp(x - x.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


def scattered(z: Array, i: Array, u: Array) -> Array:
    result = z.copy()
    np.add.at(result, i[:, 0], u)
    return result


@pytest.mark.parametrize(
    ("content", "feeds", "reference"),
    [
        (MATMUL, {"a": (6, 5), "b": (5, 3)}, lambda a, b: a @ b),
        (SOFTMAX, {"x": (6, 7)}, softmax),
        (GATHER, {"t": (9, 4), "i": [[0, 8, 3], [3, 3, 1]]}, lambda t, i: t[i]),
        (SCATTER, {"z": (4,), "i": [[0], [2], [2]], "u": (3,)}, scattered),
    ],
    ids=["matmul", "softmax", "gather", "scatter"],
)
def test_engine_computes_what_numpy_computes(
    engine: Engine, content: bytes, feeds: dict[str, object], reference: Callable[..., Array]
) -> None:
    generator = np.random.default_rng(3)
    arrays: dict[str, Array] = {
        name: generator.standard_normal(what, np.float32)
        if isinstance(what, tuple)
        else np.array(what, np.int64)
        for name, what in feeds.items()
    }
    expected = reference(*arrays.values())
    (name,) = engine.compile(content).outputs
    result = engine.allocate(expected.shape, np.float32)
    run(engine, content, arrays, {name: result.host()})
    np.testing.assert_allclose(result.host(), expected, rtol=1e-5, atol=1e-6)


def test_engine_runs_again_on_what_the_buffers_hold_then(engine: Engine) -> None:
    a, b = engine.allocate((2, 5), np.float32), engine.allocate((5, 3), np.float32)
    c = engine.allocate((2, 3), np.float32)
    binding = engine.compile(MATMUL).bind()
    for name, buffer in (("a", a), ("b", b)):
        binding.set_input(name, buffer)
    binding.set_output("c", c)
    b.host()[...] = 1.0
    for value in (1.0, 3.0):
        a.host()[...] = value
        binding.run()
        assert (c.host() == 5 * value).all()


def test_engine_rebinds_one_output_and_leaves_the_others(engine: Engine) -> None:
    first, second = np.zeros((1, 3), np.float32), np.zeros((1, 3), np.float32)
    binding = engine.compile(MATMUL).bind()
    binding.set_input("a", engine.wrap(np.ones((1, 5), np.float32)))
    binding.set_input("b", engine.wrap(np.ones((5, 3), np.float32)))
    binding.set_output("c", engine.wrap(first))
    binding.run()
    first.fill(0.0)
    binding.set_output("c", engine.wrap(second))
    binding.run()
    assert (first == 0).all()
    assert (second == 5).all()


@pytest.mark.parametrize("content", [adamw_graph(), sgd_graph()], ids=["adamw", "sgd"])
def test_engine_updates_in_place_as_it_does_apart(engine: Engine, content: bytes) -> None:
    generator = np.random.default_rng(5)
    program = engine.compile(content)
    feeds: dict[str, Array] = {}
    for name in program.inputs:
        vector = name == "parameter" or name == "gradient" or name.startswith("state.")
        shape = (1000,) if vector else ()
        feeds[name] = np.asarray(generator.uniform(0.1, 0.9, shape), np.float32)
    apart = {name: np.zeros(1000, np.float32) for name in program.outputs}
    run(engine, content, feeds, apart)
    run(engine, content, feeds, {name: feeds[name.removeprefix("new.")] for name in apart})
    for name, expected in apart.items():
        assert feeds[name.removeprefix("new.")].tobytes() == expected.tobytes()


def test_engine_shares_programs_of_equal_graphs(engine: Engine) -> None:
    assert engine.compile(MATMUL) is engine.compile(bytes(bytearray(MATMUL)))
    assert engine.compile(MATMUL) is not engine.compile(SOFTMAX)


def without_input(content: bytes, name: str) -> bytes:
    """The same graph, reading `name` without declaring it."""
    model = onnx.load_from_string(content)
    kept = [value for value in model.graph.input if value.name != name]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    bare: bytes = model.SerializeToString()
    return bare


def mapped(path: Path, array: Array, skipped: int = 0) -> Array:
    path.write_bytes(bytes(skipped) + array.tobytes())
    return np.memmap(path, array.dtype, "r", offset=skipped, shape=array.shape)


GEMM = graph(
    [("Gemm", ["a", "w", "bias"], ["c"], {})],
    {"a": (F, ["n", 64]), "w": (F, [64, 48]), "bias": (F, [48])},
    {"c": (F, ["n", 48])},
)


@pytest.mark.parametrize("place", ["memory", "file", "two folders", "view"])
def test_engine_binds_constants_that_the_graph_does_not_declare(
    engine: Engine, tmp_path: Path, place: str
) -> None:
    generator = np.random.default_rng(4)
    w, bias = generator.standard_normal((64, 48), np.float32), np.arange(48, dtype=np.float32)
    (tmp_path / "other").mkdir()
    whole = np.concatenate([bias, w.reshape(-1)])
    view = mapped(tmp_path / "whole", whole, skipped=40)
    constants = {
        "memory": {"w": w, "bias": bias},
        "file": {"w": mapped(tmp_path / "one", w, skipped=100), "bias": bias},
        "two folders": {
            "w": mapped(tmp_path / "w", w), "bias": mapped(tmp_path / "other" / "b", bias),
        },
        "view": {"w": view[48:].reshape(64, 48), "bias": view[:48]},
    }[place]  # fmt: skip
    program = engine.compile(without_input(without_input(GEMM, "w"), "bias"), constants)
    assert program.inputs == ("a",)
    a, c = generator.standard_normal((8, 64), np.float32), np.zeros((8, 48), np.float32)
    binding = program.bind()
    binding.set_input("a", engine.wrap(a))
    binding.set_output("c", engine.wrap(c))
    binding.run()
    np.testing.assert_allclose(c, a @ w + bias, rtol=1e-5, atol=1e-5)


def test_engine_shares_programs_of_the_same_constants_while_they_are_used(engine: Engine) -> None:
    content = without_input(GEMM, "w")
    w, other = np.ones((64, 48), np.float32), np.ones((64, 48), np.float32)
    program = engine.compile(content, {"w": w})
    assert engine.compile(content, {"w": w}) is program
    assert engine.compile(content, {"w": other}) is not program
    gone = weakref.ref(program)
    del program
    gc.collect()
    assert gone() is None


def test_engine_refuses_a_constant_that_is_missing(engine: Engine) -> None:
    with pytest.raises(EngineError, match="refuses a graph"):
        engine.compile(without_input(GEMM, "w"), {"bias": np.ones(48, np.float32)})


def test_engine_names_inputs_and_outputs_in_graph_order(engine: Engine) -> None:
    program = engine.compile(SCATTER)
    assert program.inputs == ("z", "i", "u")
    assert program.outputs == ("y",)


def test_engine_allocates_zeroed_aligned_memory(engine: Engine) -> None:
    for shape in ((), (1,), (3, 5)):
        buffer = engine.allocate(shape, np.float32)
        assert buffer.host().ctypes.data % 64 == 0
        assert (buffer.shape, buffer.dtype) == (shape, np.dtype(np.float32))
        assert not buffer.host().any()


def test_engine_refuses_what_is_not_a_graph(engine: Engine) -> None:
    with pytest.raises(EngineError, match="refuses a graph") as caught:
        engine.compile(b"not a graph")
    assert caught.value.__cause__ is not None
    assert caught.value.hint


def test_engine_refuses_unknown_operators_and_names(engine: Engine) -> None:
    content = graph([("NoSuchOperator", ["x"], ["y"], {})], {"x": (F, [1])}, {"y": (F, [1])})
    with pytest.raises(EngineError, match="refuses a graph"):
        engine.compile(content)
    binding = engine.compile(MATMUL).bind()
    with pytest.raises(EngineError, match="no input 'z'"):
        binding.set_input("z", engine.allocate((1,), np.float32))
    with pytest.raises(EngineError, match="no output 'a'"):
        binding.set_output("a", engine.allocate((1,), np.float32))


def test_engine_translates_what_fails_while_running(engine: Engine) -> None:
    with pytest.raises(EngineError, match="could not run"):
        run(engine, MATMUL, {"a": np.ones((2, 5), np.float32)}, {})
    wrong = {"a": np.ones((2, 4), np.float32), "b": np.ones((5, 3), np.float32)}
    with pytest.raises(EngineError, match="could not run"):
        run(engine, MATMUL, wrong, {"c": np.ones((2, 3), np.float32)})


def test_engine_wants_contiguous_memory(engine: Engine) -> None:
    with pytest.raises(InvariantBroken):
        engine.wrap(np.zeros((4, 4), np.float32).T[1:])


def test_runtime_build_names_what_is_imported() -> None:
    build = runtime_build()
    assert build.version == import_onnxruntime().__version__
    assert build.runtime in ("onnxruntime-training", "onnxruntime")
    assert build.numpy == np.__version__
    assert build.isa in ("avx512", "avx2", "avx", "sse2", "neon")


def test_engine_modules_import_neither_onnxruntime_nor_onnx() -> None:
    code = (
        "import sys; import p2ptrain.engine.onnxruntime_engine, p2ptrain.runtime.compute.stage; "
        "print(sorted({'onnxruntime', 'onnx', 'torch', 'trio'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_opening_an_engine_loads_neither_onnx_nor_the_training_api() -> None:
    code = (
        "import sys; from p2ptrain.engine.onnxruntime_engine import open_engine; "
        "open_engine(threads=1); "
        "print(sorted({'onnxruntime.training', 'onnx', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_opening_and_running_an_engine_writes_no_file_and_sets_telemetry_off(
    tmp_path: Path,
) -> None:
    code = (
        "import os, sys; from p2ptrain.engine.onnxruntime_engine import open_engine; "
        "open_engine(threads=1).compile(sys.stdin.buffer.read()); "
        "print(os.environ['ORT_DISABLE_TELEMETRY'])"
    )
    # CI=true would hide a regression: onnxruntime >= 1.29 stays quiet there by itself.
    hidden = ("CI", "ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME", "GITHUB_ACTIONS", "TF_BUILD")
    environment = {k: v for k, v in os.environ.items() if k not in hidden}
    done = subprocess.run(
        [sys.executable, "-B", "-c", code],
        input=MATMUL,
        env={**environment, "HOME": str(tmp_path)},
        capture_output=True,
        check=True,
    )
    assert done.stdout.strip() == b"1"
    assert list(tmp_path.rglob("*")) == []
