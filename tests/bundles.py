"""A tiny bundle whose graphs and gradients are written by hand: no torch, no exporter.

embed -> `blocks` x (x + mask * tanh(x w + b)) -> cross-entropy head. Shapes: B batch, T context,
V vocabulary, D width.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from p2ptrain.bundle.manifest import (
    DataSection,
    GraphFile,
    GraphPair,
    Inference,
    Initialiser,
    Loss,
    Manifest,
    MaskSite,
    Port,
    Segment,
    SegmentKind,
    Symbol,
    Tensor,
    UpdateRule,
    Value,
)
from p2ptrain.ids import Digest
from p2ptrain.store.bundles import Bundle, bundle_from_parts
from p2ptrain.training.contract import Contract, OptimizerChoice, RuntimeBuild
from p2ptrain.training.random import parameters_digest

CONTEXT, VOCABULARY, WIDTH = 8, 256, 16
_TYPES = {
    "float32": TensorProto.FLOAT,
    "int64": TensorProto.INT64,
    "bool": TensorProto.BOOL,
}

TOKENS = Value(name="tokens", shape=("batch", "sequence"), dtype="int64")
LABELS = Value(name="labels", shape=("batch", "sequence"), dtype="int64")
WEIGHT = Value(name="loss_weight", shape=())
LOSS = Value(name="loss", shape=())
X = Value(name="x", shape=("batch", "sequence", str(WIDTH)))
Y = Value(name="y", shape=X.shape)
MASK = Value(name="mask", shape=X.shape)
HIDDEN = Value(name="h", shape=X.shape)
TABLE = Value(name="table", shape=(str(VOCABULARY), str(WIDTH)))
W = Value(name="w", shape=(str(WIDTH), str(WIDTH)))
B = Value(name="b", shape=(str(WIDTH),))
HEAD = Value(name="head", shape=(str(WIDTH), str(VOCABULARY)))
PROBABILITIES = Value(name="p", shape=("batch", "sequence", str(VOCABULARY)))


class GraphBuilder:
    """Collect nodes; each call of `op` returns its output's name."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def op(self, kind: str, *inputs: str, out: str | None = None, **attributes: object) -> str:
        name = out or f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def ints(self, *values: int) -> str:
        return self._constant(TensorProto.INT64, (len(values),), values)

    def number(self, value: float) -> str:
        return self._constant(TensorProto.FLOAT, (), (value,))

    def _constant(self, kind: int, shape: tuple[int, ...], values: tuple[float, ...]) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(helper.make_tensor(name, kind, shape, values))
        return name

    def build(
        self, inputs: list[Value], outputs: list[Value], frozen: tuple[Value, ...] = ()
    ) -> bytes:
        """The graph's bytes; `frozen` values are read by name and declared nowhere."""
        declared = [_info(value) for value in (*inputs, *frozen)]
        graph = helper.make_graph(
            self.nodes, "g", declared, [_info(v) for v in outputs], self.constants
        )
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8, producer_name="tests"
        )
        onnx.checker.check_model(model)
        del model.graph.input[len(inputs) :]
        content: bytes = model.SerializeToString()
        return content


def _info(value: Value) -> onnx.ValueInfoProto:
    shape = [int(axis) if axis.isdigit() else axis for axis in value.shape]
    return helper.make_tensor_value_info(value.name, _TYPES[value.dtype], shape)


def cotangent(value: Value) -> Value:
    return dataclasses.replace(value, name=f"cotangent.{value.name}")


def gradient(value: Value) -> Value:
    return dataclasses.replace(value, name=f"gradient.{value.name}")


def embed_graphs() -> tuple[bytes, bytes]:
    forward = GraphBuilder()
    forward.op("Gather", "table", "tokens", out="y")
    back = GraphBuilder()
    rows = back.op("Reshape", "tokens", back.ints(-1, 1))
    updates = back.op("Reshape", "cotangent.y", back.ints(-1, WIDTH))
    zeros = back.op("ConstantOfShape", back.ints(VOCABULARY, WIDTH))
    back.op("ScatterND", zeros, rows, updates, out="gradient.table", reduction="add")
    return (
        forward.build([TOKENS, TABLE], [Y]),
        back.build([TOKENS, cotangent(Y)], [gradient(TABLE)]),
    )


def block_graphs() -> tuple[bytes, bytes]:
    forward = GraphBuilder()
    pre = forward.op("Add", forward.op("MatMul", "x", "w"), "b")
    forward.op("Tanh", pre, out="h")
    forward.op("Add", "x", forward.op("Mul", "h", "mask"), out="y")
    back = GraphBuilder()
    slope = back.op("Sub", back.number(1.0), back.op("Mul", "h", "h"))
    dpre = back.op("Mul", back.op("Mul", "cotangent.y", "mask"), slope)
    flat = back.op("Reshape", dpre, back.ints(-1, WIDTH))
    x_flat = back.op("Reshape", "x", back.ints(-1, WIDTH))
    back.op("MatMul", back.op("Transpose", x_flat, perm=[1, 0]), flat, out="gradient.w")
    back.op("ReduceSum", flat, back.ints(0), out="gradient.b", keepdims=0)
    dx = back.op("MatMul", dpre, back.op("Transpose", "w", perm=[1, 0]))
    back.op("Add", "cotangent.y", dx, out="cotangent.x")
    return (
        forward.build([X, W, B, MASK], [Y, HIDDEN]),
        back.build([X, W, MASK, HIDDEN, cotangent(Y)], [cotangent(X), gradient(W), gradient(B)]),
    )


def head_graphs() -> tuple[bytes, bytes]:
    forward = GraphBuilder()
    logits = forward.op("MatMul", "x", "head")
    forward.op("Softmax", logits, out="p", axis=-1)
    index = forward.op("Unsqueeze", "labels", forward.ints(-1))
    chosen = forward.op("GatherElements", forward.op("LogSoftmax", logits, axis=-1), index, axis=2)
    total = forward.op("ReduceSum", forward.op("Neg", chosen), keepdims=0)
    forward.op("Mul", total, "loss_weight", out="loss")
    back = GraphBuilder()
    hot = back.op("OneHot", "labels", back.ints(VOCABULARY), zero_one(back), axis=-1)
    factor = back.op("Mul", "loss_weight", "cotangent.loss")
    dlogits = back.op("Mul", back.op("Sub", "p", hot), factor)
    flat = back.op("Reshape", dlogits, back.ints(-1, VOCABULARY))
    x_flat = back.op("Reshape", "x", back.ints(-1, WIDTH))
    back.op("MatMul", back.op("Transpose", x_flat, perm=[1, 0]), flat, out="gradient.head")
    back.op("MatMul", dlogits, back.op("Transpose", "head", perm=[1, 0]), out="cotangent.x")
    return (
        forward.build([X, HEAD, LABELS, WEIGHT], [LOSS, PROBABILITIES]),
        back.build(
            [X, HEAD, LABELS, WEIGHT, PROBABILITIES, cotangent(LOSS)],
            [cotangent(X), gradient(HEAD)],
        ),
    )


def zero_one(graph: GraphBuilder) -> str:
    name = f"c{len(graph.constants)}"
    graph.constants.append(helper.make_tensor(name, TensorProto.FLOAT, (2,), (0.0, 1.0)))
    return name


ADAMW_SCALARS = (
    "learning_rate", "clip_scale", "weight_decay", "beta1", "beta2", "one_minus_beta1",
    "one_minus_beta2", "epsilon", "correction1", "correction2_sqrt",
)  # fmt: skip
SGD_SCALARS = ("learning_rate", "clip_scale", "weight_decay", "momentum")


def adamw_graph() -> bytes:
    g = GraphBuilder()
    clipped = g.op("Mul", "gradient", "clip_scale")
    kept = g.op("Mul", "state.m", "beta1")
    g.op("Add", kept, g.op("Mul", clipped, "one_minus_beta1"), out="new.state.m")
    kept = g.op("Mul", "state.v", "beta2")
    fresh = g.op("Mul", g.op("Mul", clipped, clipped), "one_minus_beta2")
    g.op("Add", kept, fresh, out="new.state.v")
    root = g.op("Div", g.op("Sqrt", "new.state.v"), "correction2_sqrt")
    direction = g.op("Div", "new.state.m", "correction1")
    direction = g.op("Div", direction, g.op("Add", root, "epsilon"))
    step = g.op("Add", direction, g.op("Mul", "parameter", "weight_decay"))
    g.op("Sub", "parameter", g.op("Mul", step, "learning_rate"), out="new.parameter")
    return _update(g, ("m", "v"), ADAMW_SCALARS)


def sgd_graph() -> bytes:
    g = GraphBuilder()
    clipped = g.op("Mul", "gradient", "clip_scale")
    direction = g.op("Add", clipped, g.op("Mul", "parameter", "weight_decay"))
    kept = g.op("Mul", "state.momentum", "momentum")
    g.op("Add", kept, direction, out="new.state.momentum")
    change = g.op("Mul", "new.state.momentum", "learning_rate")
    g.op("Sub", "parameter", change, out="new.parameter")
    return _update(g, ("momentum",), SGD_SCALARS)


def _update(g: GraphBuilder, state: tuple[str, ...], scalars: tuple[str, ...]) -> bytes:
    vectors = ["parameter", "gradient", *(f"state.{name}" for name in state)]
    inputs = [Value(name=name, shape=("n",)) for name in vectors]
    changed = [value for value in inputs if value.name != "gradient"]
    outputs = [dataclasses.replace(value, name=f"new.{value.name}") for value in changed]
    return g.build(inputs + [Value(name=name, shape=()) for name in scalars], outputs)


def inference_graph(blocks: int) -> bytes:
    g = GraphBuilder()
    x = g.op("Gather", "embed.table", "tokens")
    inputs = [TOKENS, dataclasses.replace(TABLE, name="embed.table")]
    for i in range(blocks):
        pre = g.op("Add", g.op("MatMul", x, f"block{i}.w"), f"block{i}.b")
        x = g.op("Add", x, g.op("Tanh", pre))
        inputs += [dataclasses.replace(value, name=f"block{i}.{value.name}") for value in (W, B)]
    g.op("MatMul", x, "head.head", out="logits")
    inputs.append(dataclasses.replace(HEAD, name="head.head"))
    return g.build(inputs, [dataclasses.replace(PROBABILITIES, name="logits")])


class GraphStore:
    """The graphs of a bundle under construction, by digest."""

    def __init__(self) -> None:
        self.graphs: dict[Digest, bytes] = {}

    def add(self, content: bytes) -> Digest:
        digest = Digest(hashlib.sha256(content).hexdigest())
        self.graphs[digest] = content
        return digest


def tiny_bundle(*, blocks: int = 4, dropout: float = 0.1, in_place: bool = True) -> Bundle:
    """`blocks` + 2 segments; masks in every block."""
    store = GraphStore()
    return finished_bundle(
        store,
        name="tiny",
        kinds=_kinds(store.add, dropout),
        segments=_segments(blocks),
        tensors=_tensors(blocks),
        inference=inference_graph(blocks),
        in_place=in_place,
    )


def finished_bundle(
    store: GraphStore,
    *,
    name: str,
    kinds: dict[str, SegmentKind],
    segments: tuple[Segment, ...],
    tensors: tuple[Tensor, ...],
    inference: bytes,
    in_place: bool = True,
) -> Bundle:
    """Add update rules, data and digests to a chain of segments over byte-level text."""
    manifest = Manifest(
        name=name,
        task="language-modelling",
        description="hand-made for tests",
        symbols={
            "batch": Symbol(size=None, kind="batch"),
            "sequence": Symbol(size=CONTEXT, kind="sequence"),
        },
        graphs={},
        kinds=kinds,
        segments=segments,
        tensors=tensors,
        updates={
            "adamw": UpdateRule(
                graph=store.add(adamw_graph()), state=("m", "v"), scalars=ADAMW_SCALARS,
                in_place=in_place,
            ),
            "sgd": UpdateRule(
                graph=store.add(sgd_graph()), state=("momentum",), scalars=SGD_SCALARS,
                in_place=in_place,
            ),
        },
        inference=Inference(
            graph=store.add(inference),
            inputs=(TOKENS,),
            output=dataclasses.replace(PROBABILITIES, name="logits"),
        ),
        data=DataSection(
            kind="windows", tokenizer="bytes", vocabulary=VOCABULARY, context=CONTEXT,
            sampling="philox-1",
        ),
        loss=Loss(kind="cross-entropy"),
        golden_parameters=Digest("0" * 64),
        weights=Digest("9" * 64) if any(tensor.digest for tensor in tensors) else None,
    )  # fmt: skip
    files = {
        digest: GraphFile(bytes=len(content), opset=18, ir=8, dtype="float32")
        for digest, content in store.graphs.items()
    }
    manifest = dataclasses.replace(
        manifest, graphs=files, golden_parameters=parameters_digest(manifest, 0)
    )
    return bundle_from_parts(manifest.to_bytes(), store.graphs)


def _kinds(add: object, dropout: float) -> dict[str, SegmentKind]:
    def kind(
        name: str, graphs: tuple[bytes, bytes], inputs: list[Port], outputs: list[Port],
        parameters: list[Value], stash: list[Value], masks: list[MaskSite],
    ) -> SegmentKind:  # fmt: skip
        pair = GraphPair(forward=add(graphs[0]), backward=add(graphs[1]), stash=tuple(stash))
        return SegmentKind(
            name=name, forms={"portable": pair}, inputs=tuple(inputs), outputs=tuple(outputs),
            parameters=tuple(parameters), masks=tuple(masks), forward_flops=1000,
            backward_flops=2000,
        )  # fmt: skip

    x, y = boundary(X), boundary(Y)
    site = MaskSite(value=MASK, probability=dropout)
    tokens, labels, weight = (
        Port(value=value, role=role, differentiable=False)
        for value, role in ((TOKENS, "data"), (LABELS, "labels"), (WEIGHT, "loss_weight"))
    )
    loss = Port(value=LOSS, role="loss", differentiable=True)
    kinds = [
        kind("embed", embed_graphs(), [tokens], [y], [TABLE], [], []),
        kind("block", block_graphs(), [x], [y], [W, B], [HIDDEN], [site]),
        kind("head", head_graphs(), [x, labels, weight], [loss], [HEAD], [PROBABILITIES], []),
    ]
    return {kind.name: kind for kind in kinds}


def boundary(value: Value, *, differentiable: bool = True) -> Port:
    return Port(value=value, role="boundary", differentiable=differentiable)


def _segments(blocks: int) -> tuple[Segment, ...]:
    inner = [
        Segment(name=f"block{i}", kind="block", parameters={n: f"block{i}.{n}" for n in ("w", "b")})
        for i in range(blocks)
    ]
    first = Segment(name="embed", kind="embed", parameters={"table": "embed.table"})
    last = Segment(name="head", kind="head", parameters={"head": "head.head"})
    return (first, *inner, last)


def _tensors(blocks: int) -> tuple[Tensor, ...]:
    def tensor(name: str, shape: tuple[int, ...], kind: str, scale: float) -> Tensor:
        return Tensor(
            name=name, shape=shape, dtype="float32", binding="trainable",
            initialiser=Initialiser(kind=kind, scale=scale), decay=len(shape) > 1,
        )  # fmt: skip

    tensors = [tensor("embed.table", (VOCABULARY, WIDTH), "normal", 0.5)]
    for i in range(blocks):
        tensors.append(tensor(f"block{i}.w", (WIDTH, WIDTH), "normal", 0.25))
        tensors.append(tensor(f"block{i}.b", (WIDTH,), "zeros", 0.0))
    tensors.append(tensor("head.head", (WIDTH, VOCABULARY), "uniform", 0.25))
    return tuple(tensors)


def write_bundle(directory: Path, bundle: Bundle) -> Path:
    """Write a bundle as the exporter does."""
    (directory / "graphs").mkdir(parents=True)
    (directory / "manifest.json").write_bytes(bundle.manifest_bytes)
    for digest in bundle.manifest.graphs:
        (directory / "graphs" / f"{digest}.onnx").write_bytes(bundle.graph(Digest(digest)))
    return directory


def contract_for(
    bundle: Bundle,
    *,
    steps: int = 20,
    microbatch_size: int = 2,
    microbatches: int = 4,
    seed: int = 7,
    dropout: float | None = None,
    optimizer: OptimizerChoice | None = None,
    rematerialise: bool = False,
    codec: str = "fp32",
) -> Contract:
    """A contract over a bundle, with digests of no data in particular."""
    return Contract(
        bundle=bundle.digest,
        seed=seed,
        steps=steps,
        microbatch_size=microbatch_size,
        microbatches=microbatches,
        form="portable",
        codec=codec,
        threads=1,
        dropout=dropout,
        optimizer=optimizer or OptimizerChoice(warmup_steps=4, clip_norm=0.5),
        training_data=Digest("1" * 64),
        heldout_data=Digest("2" * 64),
        evaluate_every=0,
        heldout_microbatches=2,
        builds=(RuntimeBuild(runtime="r", version="1", numpy="2", machine="x86_64", isa="avx2"),),
        rematerialise=rematerialise,
    )


def graph_files(bundle: Bundle) -> Mapping[Digest, bytes]:
    """Every graph of a bundle, as parts for the wire."""
    return {Digest(digest): bundle.graph(Digest(digest)) for digest in bundle.manifest.graphs}
