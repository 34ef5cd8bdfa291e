"""LSTM and GRU of a fixed length, unrolled into standard operators.

The builder knows only its own training kernels for them, which stock runtimes lack. All inputs
are projected in one product; each step adds one small product with the state.

Legend: T steps, B batch, H hidden size, D directions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import onnx

from p2ptrain.errors import GraphError
from p2ptrain.graph.ir import Axis, attribute
from p2ptrain.graph.lowering.registry import Emitter
from p2ptrain.graph.lowering.windows import fixed

Step = Callable[["_Layer", str], None]


@dataclass(slots=True, kw_only=True)
class _Layer:
    """One direction of a recurrent layer while it is unrolled."""

    emit: Emitter
    hidden: int
    batch: Axis
    recurrent: str
    """(gates * H, H)."""
    state_bias: str | None
    """GRU: what the reset gate multiplies as well."""
    h: str | None
    c: str | None
    hs: list[str] = field(default_factory=list)

    def op(  # Any: attribute values
        self, kind: str, *inputs: str, width: int = 1, **settings: Any
    ) -> str:
        """One operator whose result is (B, width * H)."""
        axes = (self.batch, width * self.hidden)
        return self.emit.op(kind, *inputs, axes=axes, **settings)

    def split(self, name: str, *widths: int) -> list[str]:
        """Columns of (B, sum(widths) * H), in turn."""
        return _split(self.emit, name, [width * self.hidden for width in widths], axis=1)


def lstm(emit: Emitter, node: onnx.NodeProto) -> None:
    """Gates in the order input, output, forget, cell:

    c = f * c + i * g; h = o * tanh(c), with i, o, f sigmoids and g a tanh.
    """
    _refuse_unusual(node)
    _unroll(emit, node, gates=4, step=_lstm_step)


def gru(emit: Emitter, node: onnx.NodeProto) -> None:
    """Gates in the order update, reset, hidden, the reset after the product as torch has it:

    n = tanh(x_n + r * (h @ R_n + b_n)); h = n + z * (h - n).
    """
    _refuse_unusual(node)
    if not attribute(node, "linear_before_reset", 0):
        raise GraphError(
            f"GRU that resets before its product, which makes {_first(node)!r}, is not unrolled",
            hint="use torch.nn.GRU",
        )
    _unroll(emit, node, gates=3, step=_gru_step)


def _first(node: onnx.NodeProto) -> str:
    return next(str(name) for name in node.output if name)


def _refuse_unusual(node: onnx.NodeProto) -> None:
    unusual = [n for n in ("activations", "clip", "layout", "input_forget") if attribute(node, n)]
    if len(node.input) > 4 and node.input[4]:
        unusual.append("sequence_lens")
    if len(node.input) > 7 and node.input[7]:
        unusual.append("peepholes")
    if unusual:
        raise GraphError(
            f"{node.op_type} with {', '.join(unusual)}, which makes {_first(node)!r}, "
            "is not unrolled",
            hint="use torch.nn.LSTM or torch.nn.GRU on sequences of one length",
        )


def _lstm_step(layer: _Layer, projected: str) -> None:
    gates = projected
    if layer.h is not None:
        gates = layer.op("Gemm", layer.h, layer.recurrent, projected, width=4, transB=1)
    open_, cell = layer.split(gates, 3, 1)
    i, o, f = layer.split(layer.op("Sigmoid", open_, width=3), 1, 1, 1)
    new = layer.op("Mul", i, layer.op("Tanh", cell))
    layer.c = new if layer.c is None else layer.op("Add", layer.op("Mul", f, layer.c), new)
    layer.h = layer.op("Mul", o, layer.op("Tanh", layer.c))


def _gru_step(layer: _Layer, projected: str) -> None:
    open_, new = layer.split(projected, 2, 1)
    held = layer.state_bias
    if layer.h is not None:
        bias = [layer.state_bias] if layer.state_bias is not None else []
        product = layer.op("Gemm", layer.h, layer.recurrent, *bias, width=3, transB=1)
        gates, held = layer.split(product, 2, 1)
        open_ = layer.op("Add", open_, gates, width=2)
    elif layer.state_bias is not None:
        gates, held = _split(layer.emit, layer.state_bias, [2 * layer.hidden, layer.hidden], axis=0)
        open_ = layer.op("Add", open_, gates, width=2)
    z, r = layer.split(layer.op("Sigmoid", open_, width=2), 1, 1)
    if held is not None:
        new = layer.op("Add", new, layer.op("Mul", r, held))
    n = layer.op("Tanh", new)
    if layer.h is None:
        layer.h = layer.op("Sub", n, layer.op("Mul", z, n))
    else:
        layer.h = layer.op("Add", n, layer.op("Mul", z, layer.op("Sub", layer.h, n)))


def _unroll(emit: Emitter, node: onnx.NodeProto, *, gates: int, step: Step) -> None:
    graph = emit.graph
    x = node.input[0]
    steps, batch = graph.axes(x)[:2]
    if isinstance(steps, str):
        raise GraphError(
            f"{node.op_type}, which makes {_first(node)!r}, runs over {steps!r} steps",
            hint="export the model with sequences of one fixed length",
        )
    given = [*node.input, *[""] * 8]
    directions = fixed(graph.axes(given[1])[0])
    hidden = int(attribute(node, "hidden_size"))
    parts = {index: _directions(emit, given[index], directions) for index in (1, 2, 3, 5, 6)}
    layers = []
    for index in range(directions):
        weight, recurrent, bias, h, c = (parts[i][index] for i in (1, 2, 3, 5, 6))
        if weight is None or recurrent is None:
            raise GraphError(f"{node.op_type} without weights")
        of_input, of_state = _biases(emit, bias, gates * hidden)
        layer = _Layer(
            emit=emit, hidden=hidden, batch=batch, recurrent=recurrent,
            state_bias=of_state if gates == 3 else None, h=h, c=c,
        )  # fmt: skip
        if gates == 4 and of_input is not None and of_state is not None:
            of_input = emit.like("Add", of_input, of_state)
        backwards = index == 1 or attribute(node, "direction", b"forward") == b"reverse"
        _run(layer, _projections(layer, x, weight, of_input), backwards, step)
        layers.append(layer)
    _finish(emit, node, layers)


def _run(layer: _Layer, projected: list[str], backwards: bool, step: Step) -> None:
    for piece in reversed(projected) if backwards else projected:
        step(layer, piece)
        if layer.h is not None:
            layer.hs.append(layer.h)
    if backwards:
        layer.hs.reverse()


def _split(emit: Emitter, name: str, sizes: list[int], *, axis: int) -> list[str]:
    graph = emit.graph
    outputs = []
    for size in sizes:
        output = graph.fresh("part")
        axes = list(graph.axes(name))
        axes[axis] = size
        graph.types[output] = type(graph.types[name])(
            dtype=graph.types[name].dtype, axes=tuple(axes)
        )
        outputs.append(output)
    node = onnx.helper.make_node("Split", [name, emit.integers(*sizes)], outputs, axis=axis)
    emit.nodes.append(node)
    return outputs


def _directions(emit: Emitter, name: str, count: int) -> list[str | None]:
    """A weight or state per direction, without the axis of directions."""
    if not name:
        return [None] * count
    parts = [name] if count == 1 else _split(emit, name, [1] * count, axis=0)
    rest = emit.graph.axes(name)[1:]
    return [emit.op("Squeeze", part, emit.integers(0), axes=rest) for part in parts]


def _biases(emit: Emitter, bias: str | None, width: int) -> tuple[str | None, str | None]:
    """The biases of the input's product and of the state's."""
    if bias is None:
        return None, None
    first, second = _split(emit, bias, [width, width], axis=0)
    return first, second


def _projections(layer: _Layer, x: str, weight: str, bias: str | None) -> list[str]:
    """x_t @ W + b for every step, from one product over (T * B, width)."""
    emit = layer.emit
    steps, batch = emit.graph.axes(x)[:2]
    columns = emit.graph.axes(weight)[0]
    turned = emit.transpose(weight, [1, 0])
    whole = emit.op("MatMul", x, turned, axes=(steps, batch, columns))
    if bias is not None:
        whole = emit.like("Add", whole, bias)
    pieces = _split(emit, whole, [1] * fixed(steps), axis=0)
    return [emit.op("Squeeze", p, emit.integers(0), axes=(batch, columns)) for p in pieces]


def _finish(emit: Emitter, node: onnx.NodeProto, layers: list[_Layer]) -> None:
    """Y (T, D, B, H), and the last h and c (D, B, H), as far as the node has them."""
    outputs = [*node.output, "", ""]
    hidden, batch, count = layers[0].hidden, layers[0].batch, len(layers)
    if outputs[0]:
        steps = len(layers[0].hs)
        sides = []
        for layer in layers:
            wide = [_unsqueezed(layer, h, 0, 1) for h in layer.hs]
            axes = (steps, 1, batch, hidden)
            out = outputs[0] if count == 1 else None
            sides.append(emit.op("Concat", *wide, axes=axes, out=out, axis=0))
        if count > 1:
            axes = (steps, count, batch, hidden)
            emit.op("Concat", *sides, axes=axes, out=outputs[0], axis=1)
    last = [layer.hs[-1 if index == 0 else 0] for index, layer in enumerate(layers)]
    if attribute(node, "direction", b"forward") == b"reverse":
        last = [layers[0].hs[0]]
    cells = [layer.c for layer in layers]
    for out, states in ((outputs[1], last), (outputs[2], cells)):
        if out:
            wide = [
                _unsqueezed(layer, state, 0)
                for layer, state in zip(layers, states, strict=True)
                if state is not None
            ]
            emit.op("Concat", *wide, axes=(count, batch, hidden), out=out, axis=0)


def _unsqueezed(layer: _Layer, name: str, *over: int) -> str:
    axes = (*[1] * len(over), layer.batch, layer.hidden)
    return layer.emit.op("Unsqueeze", name, layer.emit.integers(*over), axes=axes)
