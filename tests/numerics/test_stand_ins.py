"""Operators without a gradient kernel: slopes and decompositions against central differences."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest

from p2ptrain.bundle.operators import STANDARD
from p2ptrain.errors import GraphError
from p2ptrain.graph.decompositions import decomposition_names
from p2ptrain.graph.differentiable import DIFFERENTIABLE, NOT_DIFFERENTIABLE
from p2ptrain.graph.ir import FLOAT, MICROSOFT, Graph, Type, make
from p2ptrain.graph.lowering.registry import rule_names
from p2ptrain.graph.split import differentiate
from p2ptrain.graph.stand_ins import slope_names
from tests.lowering import Case, Shape, built, central_difference, draw, gradients, run
from tests.lowering_cases import convolution, layer_norm, sigmoid

pytest.importorskip("onnxruntime.capi._pybind_state")
try:
    from onnxruntime.capi._pybind_state import GradientGraphBuilder  # noqa: F401
except ImportError:
    pytest.skip("stock onnxruntime has no gradient builder", allow_module_level=True)

Array = np.ndarray
ROOT = math.sqrt(2 / math.pi)


def activation(kind: str, meaning: Callable[[Array], Array], **how: Any) -> Case:
    return Case(
        name=kind + "".join(f"-{value}" for value in how.values()),
        lowers=f"{how['domain']}.{kind}" if "domain" in how else kind,
        nodes=[make(kind, ["x"], ["y"], **how)],
        inputs={"x": draw(5, 6) * 2},
        meaning=meaning,
        types={"x": ("batch", 6), "y": ("batch", 6)},
    )


def two(kind: str, meaning: Callable[..., Array], x: Array, w: Array, **how: Any) -> Case:
    return Case(
        name=f"{kind}-{w.ndim}",
        lowers=kind,
        nodes=[make(kind, ["x", "w"], ["y"], **how)],
        inputs={"x": x, "w": w},
        meaning=meaning,
        wanted=("x", "w"),
        types={"x": ("batch", *x.shape[1:]), "y": ("batch", *meaning(x, w).shape[1:])},
    )


def power(exponent: float) -> Case:
    return Case(
        name=f"Pow-{exponent}",
        lowers="Pow",
        nodes=[make("Pow", ["x", "e"], ["y"])],
        inputs={"x": draw(5, 6) ** 2 + np.float32(0.3)},
        meaning=lambda x: x**exponent,
        types={"x": ("batch", 6), "y": ("batch", 6)},
        constants={"e": np.array(exponent, np.float32)},
    )


def reduction(
    kind: str, meaning: Callable[..., Array], axes: tuple[int, ...] | None, keep: bool
) -> Case:
    x = draw(4, 3, 5)
    taken = axes if axes is not None else (0, 1, 2)
    result = meaning(x, axis=taken, keepdims=keep).shape
    y: Shape = tuple(
        "batch" if i == 0 and 0 not in taken else size for i, size in enumerate(result)
    )
    return Case(
        name=f"{kind}-{axes}-{keep}",
        lowers=kind,
        nodes=[make(kind, ["x", "axes"] if axes else ["x"], ["y"], keepdims=int(keep))],
        inputs={"x": x},
        meaning=lambda x: meaning(x, axis=taken, keepdims=keep),
        types={"x": ("batch", 3, 5), "y": y},
        constants={"axes": np.array(axes)} if axes else {},
    )


def reductions(kind: str, meaning: Callable[..., Array]) -> list[Case]:
    some: tuple[tuple[int, ...] | None, ...] = ((1,), (1, 2), None)
    return [reduction(kind, meaning, axes, keep) for axes in some for keep in (True, False)]


def log_sum_exp(x: Array, **how: Any) -> Array:
    return np.log(np.exp(x).sum(**how))


def normalised(x: Array, scale: Array, bias: Array) -> Array:
    rest = tuple(range(2, x.ndim))
    centred = x - x.mean(rest, keepdims=True)
    deviation = np.sqrt((centred**2).mean(rest, keepdims=True) + 1e-5)
    wide = (-1, *[1] * len(rest))
    return centred / deviation * scale.reshape(wide) + bias.reshape(wide)


def images(
    kind: str, meaning: Callable[[Array], Array], *, extra: dict[str, Array], **how: Any
) -> Case:
    x = draw(2, 4, 3, 2)
    return Case(
        name=kind + "".join(f"-{value}" for value in how.values()),
        lowers=kind,
        nodes=[make(kind, ["x", *extra], ["y"], **how)],
        inputs={"x": x},
        meaning=meaning,
        types={"x": ("batch", 4, 3, 2), "y": ("batch", *meaning(x).shape[1:])},
        constants=extra,
    )


def shuffled(x: Array, order: tuple[int, ...], parts: tuple[int, ...]) -> Array:
    b, c, h, w = x.shape
    return x.reshape(b, *parts, h, w).transpose(order).reshape(b, c // 4, h * 2, w * 2)


def einsum(equation: str, x: tuple[int, ...], w: tuple[int, ...]) -> Case:
    case = two("Einsum", lambda x, w: np.einsum(equation, x, w), draw(*x), draw(*w, seed=5),
               equation=equation)  # fmt: skip
    return Case(**{n: getattr(case, n) for n in case.__dataclass_fields__} | {"name": equation})


LSTM_ORDER, GRU_ORDER = "iofc", "zrh"


def run_lstm(x: Array, w: Array, r: Array, b: Array, h: Array, c: Array) -> list[Array]:
    found = []
    size = h.shape[-1]
    for step in x:
        i, o, f, g = np.split(step @ w.T + h @ r.T + b[: 4 * size] + b[4 * size :], 4, axis=-1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        found.append(h)
    return [*found, c]


def run_gru(x: Array, w: Array, r: Array, b: Array, h: Array) -> list[Array]:
    found = []
    size = h.shape[-1]
    for step in x:
        xz, xr, xn = np.split(step @ w.T + b[: 3 * size], 3, axis=-1)
        hz, hr, hn = np.split(h @ r.T + b[3 * size :], 3, axis=-1)
        z, reset = sigmoid(xz + hz), sigmoid(xr + hr)
        h = (1 - z) * np.tanh(xn + reset * hn) + z * h
        found.append(h)
    return found


def recurrent(kind: str, direction: str, *, state: bool, bias: bool = True) -> Case:
    steps, batch, width, size = 3, 2, 4, 3
    gates = 4 if kind == "LSTM" else 3
    sides = 2 if direction == "bidirectional" else 1
    inputs = {
        "x": draw(steps, batch, width),
        "w": draw(sides, gates * size, width, seed=4),
        "r": draw(sides, gates * size, size, seed=5),
    }
    if bias:
        inputs["b"] = draw(sides, 2 * gates * size, seed=6)
    if state:
        inputs["h"] = draw(sides, batch, size, seed=7)
        if kind == "LSTM":
            inputs["c"] = draw(sides, batch, size, seed=8)

    def meaning(x: Array, w: Array, r: Array, **rest: Array) -> Array:
        b = rest.get("b", np.zeros((sides, 2 * gates * size)))
        zero = np.zeros((sides, batch, size))
        columns = []
        for side in range(sides):
            backwards = side == 1 or direction == "reverse"
            seen = x[::-1] if backwards else x
            first = rest.get("h", zero)[side]
            if kind == "LSTM":
                cell = rest.get("c", zero)[side]
                found = run_lstm(seen, w[side], r[side], b[side], first, cell)[:-1]
            else:
                found = run_gru(seen, w[side], r[side], b[side], first)
            columns.append(np.stack(found[::-1] if backwards else found))
        return np.stack(columns, 1)

    given = ["x", "w", "r", "b" if bias else "", ""]
    given += [name for name in ("h", "c") if name in inputs]
    how: dict[str, Any] = {"linear_before_reset": 1} if kind == "GRU" else {}
    node = make(kind, given, ["y"], hidden_size=size, direction=direction, **how)
    return Case(
        name=f"{kind}-{direction}-{state}-{bias}",
        lowers=kind,
        nodes=[node],
        inputs=inputs,
        meaning=meaning,
        wanted=tuple(inputs),
        types={
            "x": (steps, "batch", width), "y": (steps, sides, "batch", size),
            "h": (sides, "batch", size), "c": (sides, "batch", size),
        },
    )  # fmt: skip


SELU = (1.67326319217681884765625, 1.05070102214813232421875)
CASES = [
    activation("Elu", lambda x: np.where(x > 0, x, 0.7 * np.expm1(x)), alpha=0.7),
    activation("Celu", lambda x: np.where(x > 0, x, 2 * np.expm1(x / 2)), alpha=2.0),
    activation("Selu", lambda x: SELU[1] * np.where(x > 0, x, SELU[0] * np.expm1(x))),
    activation("Softplus", lambda x: np.log1p(np.exp(x))),
    activation("Softsign", lambda x: x / (1 + np.abs(x))),
    activation("HardSigmoid", lambda x: np.clip(0.3 * x + 0.4, 0, 1), alpha=0.3, beta=0.4),
    activation("HardSwish", lambda x: x * np.clip(x / 6 + 0.5, 0, 1)),
    activation("Mish", lambda x: x * np.tanh(np.log1p(np.exp(x)))),
    activation("QuickGelu", lambda x: x * sigmoid(x), domain=MICROSOFT, alpha=1.0),
    activation("QuickGelu", lambda x: x * sigmoid(1.702 * x), domain=MICROSOFT),
    activation("FastGelu", lambda x: 0.5 * x * (1 + np.tanh(ROOT * (x + 0.044715 * x**3))),
               domain=MICROSOFT),
    activation("ThresholdedRelu", lambda x: np.where(x > 0.5, x, 0), alpha=0.5),
    activation("Atan", lambda x: np.arctan(x)),
    activation("Sinh", lambda x: np.sinh(x)),
    activation("Cosh", lambda x: np.cosh(x)),
    activation("Asinh", lambda x: np.arcsinh(x)),
    activation("Tan", lambda x: np.tan(x)),
    two("PRelu", lambda x, w: np.where(x > 0, x, w * x), draw(4, 3, 5), draw(3, 1, seed=4)),
    two("PRelu", lambda x, w: np.where(x > 0, x, w * x), draw(4, 5), draw(1, seed=4)),
    two("Pow", lambda x, w: x**w, draw(4, 5) ** 2 + np.float32(0.3), draw(5, seed=4)),
    two("Sum", lambda x, w: x + w, draw(4, 5), draw(5, seed=4)),
    two("Mean", lambda x, w: (x + w) / 2, draw(4, 5), draw(5, seed=4)),
    two("MatMul", lambda x, w: x @ w, draw(4, 5), draw(5, seed=4)),
    Case(
        name="Mul-square", lowers="Mul", nodes=[make("Mul", ["x", "x"], ["y"])],
        inputs={"x": draw(5, 6)}, meaning=lambda x: x * x,
        types={"x": ("batch", 6), "y": ("batch", 6)},
    ),
    Case(
        name="Split-partly", lowers="Mul",
        nodes=[
            make("Split", ["x", "sizes"], ["a", "b", "c"], axis=1), make("Floor", ["a"], ["f"]),
            make("Add", ["c", "c"], ["d"]), make("Add", ["d", "f"], ["y"]),
        ],
        inputs={"x": draw(5, 6)}, meaning=lambda x: 2 * x[:, 4:] + np.floor(x[:, :2]),
        types={"x": ("batch", 6)} | dict.fromkeys("abcdfy", ("batch", 2)),
        constants={"sizes": np.array([2, 2, 2])},
    ),
    *map(power, (2.0, 3.0, 1.0, 0.5, -0.5, -1.0, 2.5, 4.0)),
    *reductions("ReduceMax", np.max),
    *reductions("ReduceMin", np.min),
    *reductions("ReduceL1", lambda x, **how: np.abs(x).sum(**how)),
    *reductions("ReduceL2", lambda x, **how: np.sqrt((x**2).sum(**how))),
    *reductions("ReduceSumSquare", lambda x, **how: (x**2).sum(**how)),
    *reductions("ReduceLogSumExp", log_sum_exp),
    Case(
        name="Clip", lowers="Clip", nodes=[make("Clip", ["x", "low", "high"], ["y"])],
        inputs={"x": draw(5, 6) * 5}, meaning=lambda x: np.clip(x, 0, 6),
        types={"x": ("batch", 6), "y": ("batch", 6)},
        constants={"low": np.array(0, np.float32), "high": np.array(6, np.float32)},
    ),
    *(
        convolution((2, 3, side, side), (3, 1, 3, 3), lowers="Conv", group=3,
                    pads=[1, 1, 1, 1], strides=[stride, stride])
        for side in (4, 7, 8)
        for stride in (1, 2)
    ),
    convolution((2, 2, 7, 5), (2, 1, 3, 2), lowers="Conv", group=2, pads=[2, 0, 1, 1],
                dilations=[2, 1]),
    convolution((2, 2, 6, 7), (2, 1, 3, 3), lowers="Conv", group=2, pads=[2, 0, 1, 1],
                dilations=[1, 2], strides=[2, 1]),
    convolution((2, 2, 4, 5), (2, 1, 1, 3), lowers="Conv", group=2, pads=[0, 2, 0, 0]),
    convolution((2, 3, 9), (3, 1, 4), lowers="Conv", group=3, pads=[0, 3], strides=[2]),
    convolution((3, 2, 2, 3, 3), (2, 1, 2, 2, 2), lowers="Conv", group=2, pads=[1, 0, 1, 0, 1, 0]),
    images("GlobalMaxPool", lambda x: x.max((2, 3), keepdims=True), extra={}),
    images("MaxPool", lambda x: x.max((2, 3), keepdims=True), extra={}, kernel_shape=[3, 2]),
    images("InstanceNormalization",
           lambda x: normalised(x, draw(4, seed=4), draw(4, seed=5)),
           extra={"s": draw(4, seed=4), "b": draw(4, seed=5)}),
    images("BatchNormalization",
           lambda x: (x - 1.5) / math.sqrt(2 + 1e-5) * 0.5 + 0.25,
           extra={name: np.full(4, value, np.float32)
                  for name, value in (("s", 0.5), ("b", 0.25), ("m", 1.5), ("v", 2.0))}),
    images("DepthToSpace", lambda x: shuffled(x, (0, 3, 4, 1, 5, 2), (2, 2, 1)), extra={},
           blocksize=2, mode="DCR"),
    images("DepthToSpace", lambda x: shuffled(x, (0, 1, 4, 2, 5, 3), (1, 2, 2)), extra={},
           blocksize=2, mode="CRD"),
    images("Resize", lambda x: x.repeat(2, 2).repeat(3, 3),
           extra={"": np.zeros(0, np.float32), "scales": np.array([1, 1, 2, 3], np.float32)},
           mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor"),
    Case(
        name="LayerNormalization", lowers="LayerNormalization",
        nodes=[make("LayerNormalization", ["x", "scale"], ["y", "mean", "inverse"])],
        inputs={"x": draw(4, 6), "scale": draw(6, seed=4)},
        meaning=lambda x, scale: layer_norm(x, scale, np.zeros(6)), wanted=("x", "scale"),
        types={"x": ("batch", 6), "y": ("batch", 6), "mean": ("batch", 1),
               "inverse": ("batch", 1)},
    ),
    Case(
        name="SoftmaxCrossEntropyLoss", lowers="SoftmaxCrossEntropyLoss",
        nodes=[make("SoftmaxCrossEntropyLoss", ["x", "labels"], ["y", "log"], reduction="sum")],
        inputs={"x": draw(2, 3, 2), "labels": np.array([[0, 2], [1, 1]])},
        meaning=lambda x, labels: -np.take_along_axis(
            x - np.log(np.exp(x).sum(1, keepdims=True)), labels[:, None], 1
        ).sum(),
        types={"x": ("batch", 3, 2), "labels": ("batch", 2), "log": ("batch", 3, 2), "y": ()},
    ),
    einsum("bij,bjk->bik", (2, 3, 4), (2, 4, 5)),
    einsum("bchw,bcij->bhwij", (2, 3, 2, 2), (2, 3, 2, 3)),
    einsum("bij,kj->bki", (2, 3, 4), (5, 4)),
    einsum("bqhd,bkhd->bhqk", (2, 3, 2, 4), (2, 5, 2, 4)),
    *(
        recurrent(kind, direction, state=state)
        for kind in ("LSTM", "GRU")
        for direction in ("forward", "reverse", "bidirectional")
        for state in (False, True)
    ),
    recurrent("LSTM", "forward", state=True, bias=False),
    recurrent("GRU", "forward", state=True, bias=False),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gradient_agrees_with_central_differences(case: Case) -> None:
    shape = case.meaning(**case.inputs).shape
    cotangent = np.asarray(draw(*shape, seed=7)) if shape else np.array(0.7, np.float32)
    for portable in (True, False):
        found = gradients(case, portable=portable, cotangent=cotangent)
        for name in case.wanted:
            reference = central_difference(case, name, cotangent)
            error = np.abs(found[f"gradient.{name}"] - reference).max()
            assert error < 3e-6 * np.abs(reference).max()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_forward_keeps_its_meaning_and_both_sides_are_standard(case: Case) -> None:
    pair = built(case, portable=True)
    y = run(pair.forward, dict(case.inputs))["y"]
    reference = case.meaning(**{n: v.astype(np.float64) if v.dtype == np.float32 else v
                                for n, v in case.inputs.items()})  # fmt: skip
    assert np.abs(y - reference).max() < 2e-6 * max(1.0, np.abs(reference).max())
    both = [*pair.forward.nodes, *pair.backward.nodes]
    assert {(node.domain, node.op_type) for node in both} <= STANDARD


def test_every_slope_and_decomposition_has_a_case() -> None:
    assert {case.lowers for case in CASES} == {*slope_names(), *decomposition_names()}


def test_no_operator_is_both_differentiable_and_not() -> None:
    able = DIFFERENTIABLE | set(slope_names()) | set(decomposition_names())
    assert not able & NOT_DIFFERENTIABLE
    assert not set(rule_names()) & NOT_DIFFERENTIABLE


def chain(middle: onnx.NodeProto) -> Case:
    """y = x * middle(x)."""
    return Case(
        name=middle.op_type, lowers=middle.op_type,
        nodes=[middle, make("Mul", ["x", "a"], ["y"])], inputs={"x": draw(5, 6) * 3},
        meaning=lambda x: x, types=dict.fromkeys("xay", ("batch", 6)),
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["Floor", "Ceil", "Round", "Sign"])
def test_a_gradient_stops_at_a_listed_operator_as_in_torch(kind: str) -> None:
    case = chain(make(kind, ["x"], ["a"]))
    stepped = {"Floor": np.floor, "Ceil": np.ceil, "Round": np.round, "Sign": np.sign}[kind]
    cotangent = draw(5, 6, seed=7)
    found = gradients(case, portable=True, cotangent=cotangent)
    assert np.array_equal(found["gradient.x"], stepped(case.inputs["x"]) * cotangent)


def test_an_operator_neither_known_nor_listed_is_refused_by_name() -> None:
    node = make("Det", ["x"], ["a"])
    entry = node.metadata_props.add()
    entry.key, entry.value = "namespace", ": Model/head: Head/det: aten.det"
    with pytest.raises(GraphError, match="no gradient for Det, which makes 'a' in module 'head'"):
        built(chain(node), portable=True)


def test_an_unknown_operator_before_a_stop_is_no_obstacle() -> None:
    case = Case(
        name="beside", lowers="", inputs={"x": draw(5, 6)}, meaning=lambda x: np.maximum(x, 0),
        nodes=[
            make("Sigmoid", ["x"], ["s"]),
            make("Acos", ["s"], ["a"]),
            make("Sign", ["a"], ["one"]),
            make("Relu", ["x"], ["r"]),
            make("Mul", ["r", "one"], ["y"]),
        ],
        types=dict.fromkeys(("x", "s", "a", "one", "r", "y"), ("batch", 6)),
    )  # fmt: skip
    found = gradients(case, portable=True, cotangent=np.ones((5, 6), np.float32))
    assert np.array_equal(found["gradient.x"], (case.inputs["x"] > 0).astype(np.float32))


def test_state_outputs_get_no_cotangent() -> None:
    graph = Graph(outputs=["y", "new.mean"])
    graph.types = {name: Type(dtype=FLOAT, axes=("batch", 4)) for name in ("x", "y", "e")}
    graph.types["new.mean"] = Type(dtype=FLOAT, axes=(4,))
    graph.inputs = {"x": graph.types["x"]}
    over = graph.constant(np.array([0]))
    graph.nodes = [
        make("Exp", ["x"], ["e"]),
        make("Mul", ["e", "x"], ["y"]),
        make("ReduceMean", ["e", over], ["new.mean"], keepdims=0),
    ]
    pair = differentiate(graph, wanted={"x": "dx"}, reference="x", portable=True)
    assert pair.forward.outputs[:2] == ["y", "new.mean"]
    assert "cotangent.new.mean" not in pair.backward.inputs
    x = draw(3, 4)
    made = run(pair.forward, {"x": x})
    assert np.allclose(made["new.mean"], np.exp(x).mean(0), rtol=1e-6)
    found = run(pair.backward, {"x": x, **made, "cotangent.y": np.ones((3, 4), np.float32)})
    assert np.allclose(found["dx"], np.exp(x) * (1 + x), rtol=1e-5, atol=1e-6)


def test_outputs_that_other_outputs_read_each_have_their_cotangent() -> None:
    """A cut in the middle of a block: three ports, one of them read by the others."""
    axes = Type(dtype=FLOAT, axes=("batch", 4))
    graph = Graph(outputs=["a", "b", "c"])
    graph.types = dict.fromkeys(("x", "z", "a", "b", "s", "c"), axes)
    graph.inputs = {"x": axes, "z": axes}
    graph.nodes = [
        make("Mul", ["x", "z"], ["a"]),
        make("HardSwish", ["a"], ["b"]),
        make("Sigmoid", ["b"], ["s"]),
        make("Add", ["s", "a"], ["c"]),
    ]

    def meaning(x: Array, z: Array) -> dict[str, Array]:
        a = x * z
        b = a * np.clip(a / 6 + 0.5, 0, 1)
        return {"a": a, "b": b, "c": sigmoid(b) + a}

    inputs = {"x": draw(3, 4), "z": draw(3, 4, seed=4)}
    cotangents = {name: draw(3, 4, seed=5 + i) for i, name in enumerate("abc")}

    def total(**values: Array) -> float:
        return float(sum((y * cotangents[name]).sum() for name, y in meaning(**values).items()))

    wanted = {"x": "dx", "z": "dz"}
    for portable in (True, False):
        pair = differentiate(graph, wanted=wanted, reference="x", portable=portable)
        made = run(pair.forward, inputs)
        incoming = {f"cotangent.{name}": value for name, value in cotangents.items()}
        found = run(pair.backward, {**inputs, **made, **incoming})
        exact = {name: value.astype(np.float64) for name, value in inputs.items()}
        for name, output in wanted.items():
            for index in np.ndindex(3, 4):
                step = np.zeros((3, 4))
                step[index] = 1e-5
                ends = [total(**exact | {name: exact[name] + sign * step}) for sign in (1, -1)]
                assert abs(found[output][index] - (ends[0] - ends[1]) / 2e-5) < 2e-5
