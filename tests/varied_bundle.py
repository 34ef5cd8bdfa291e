"""A bundle with everything that the tiny one lacks, its gradients written by hand.

start (two data inputs) -> mix, mix (running mean) -> fixed (a frozen matrix) -> block, block
(dropout) -> head, which is tied to start's table. Shapes: B batch, T context, V vocabulary,
D width. A boolean says for each token whether it may be looked at; it travels with the boundary
as far as `fixed`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from onnx import TensorProto

from p2ptrain.bundle.manifest import (
    GraphPair,
    Initialiser,
    MaskSite,
    Port,
    Segment,
    SegmentKind,
    Tensor,
    Value,
)
from p2ptrain.ids import Digest
from p2ptrain.store.bundles import Bundle
from tests.bundles import (
    HIDDEN,
    LABELS,
    LOSS,
    MASK,
    PROBABILITIES,
    TABLE,
    TOKENS,
    VOCABULARY,
    WEIGHT,
    WIDTH,
    B,
    GraphBuilder,
    GraphStore,
    W,
    X,
    Y,
    block_graphs,
    boundary,
    cotangent,
    embed_graphs,
    finished_bundle,
    gradient,
    zero_one,
)

SEGMENTS = ("start", "mix0", "mix1", "fixed", "block0", "block1", "head")
KEEP = Value(name="keep", shape=("batch", "sequence"), dtype="bool")
KEPT = dataclasses.replace(KEEP, name="kept")
SCALE = Value(name="scale", shape=(str(WIDTH),))
MEAN = Value(name="mean", shape=(str(WIDTH),))
FRESH_MEAN = dataclasses.replace(MEAN, name="new.mean")
CENTRED = Value(name="c", shape=X.shape)


def start_graphs() -> tuple[bytes, bytes]:
    forward = GraphBuilder()
    forward.op("Gather", "table", "tokens", out="y")
    forward.op("Identity", "keep", out="kept")
    return forward.build([TOKENS, KEEP, TABLE], [Y, KEPT]), embed_graphs()[1]


def mix_graphs() -> tuple[bytes, bytes, bytes]:
    """y = (x - mean of x) * scale + mean / 64, over tokens that may be looked at."""
    forward = GraphBuilder()
    seen = _seen(forward, "x")
    now = forward.op("ReduceMean", seen, forward.ints(0, 1), keepdims=0)
    forward.op("Sub", seen, now, out="c")
    forward.op("Add", forward.op("Mul", "c", "scale"), _part(forward), out="y")
    kept = forward.op("Mul", "mean", forward.number(0.75))
    forward.op("Add", kept, forward.op("Mul", now, forward.number(0.25)), out="new.mean")
    forward.op("Identity", "keep", out="kept")
    back = GraphBuilder()
    scaled = back.op("Mul", "cotangent.y", "scale")
    through = back.op("Sub", scaled, back.op("ReduceMean", scaled, back.ints(0, 1), keepdims=0))
    back.op("Identity", _seen(back, through), out="cotangent.x")
    product = back.op("Mul", "cotangent.y", "c")
    back.op("ReduceSum", product, back.ints(0, 1), out="gradient.scale", keepdims=0)
    evaluation = GraphBuilder()
    centred = evaluation.op("Sub", _seen(evaluation, "x"), "mean")
    evaluation.op("Add", evaluation.op("Mul", centred, "scale"), _part(evaluation), out="y")
    evaluation.op("Identity", "keep", out="kept")
    return (
        forward.build([X, KEEP, SCALE, MEAN], [Y, KEPT, FRESH_MEAN, CENTRED]),
        back.build([KEEP, SCALE, CENTRED, cotangent(Y)], [cotangent(X), gradient(SCALE)]),
        evaluation.build([X, KEEP, SCALE, MEAN], [Y, KEPT]),
    )


def fixed_graphs() -> tuple[bytes, bytes]:
    """y = x + tanh(x w + b) where it may look; `w` is read and declared nowhere: it is frozen."""
    forward = GraphBuilder()
    forward.op("Tanh", forward.op("Add", forward.op("MatMul", "x", "w"), "b"), out="h")
    forward.op("Add", "x", _seen(forward, "h"), out="y")
    back = GraphBuilder()
    slope = back.op("Sub", back.number(1.0), back.op("Mul", "h", "h"))
    dpre = back.op("Mul", _seen(back, "cotangent.y"), slope)
    back.op("ReduceSum", dpre, back.ints(0, 1), out="gradient.b", keepdims=0)
    dx = back.op("MatMul", dpre, back.op("Transpose", "w", perm=[1, 0]))
    back.op("Add", "cotangent.y", dx, out="cotangent.x")
    return (
        forward.build([X, KEEP, B], [Y, HIDDEN], frozen=(W,)),
        back.build([KEEP, HIDDEN, cotangent(Y)], [cotangent(X), gradient(B)], frozen=(W,)),
    )


def head_graphs() -> tuple[bytes, bytes]:
    forward = GraphBuilder()
    logits = forward.op("MatMul", "x", forward.op("Transpose", "table", perm=[1, 0]))
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
    back.op("MatMul", back.op("Transpose", flat, perm=[1, 0]), x_flat, out="gradient.table")
    back.op("MatMul", dlogits, "table", out="cotangent.x")
    return (
        forward.build([X, TABLE, LABELS, WEIGHT], [LOSS, PROBABILITIES]),
        back.build(
            [X, TABLE, LABELS, WEIGHT, PROBABILITIES, cotangent(LOSS)],
            [cotangent(X), gradient(TABLE)],
        ),
    )


def _seen(graph: GraphBuilder, value: str) -> str:
    """`value` where the token may be looked at, else 0."""
    number = graph.op("Cast", "keep", to=TensorProto.FLOAT)
    return graph.op("Mul", value, graph.op("Unsqueeze", number, graph.ints(-1)))


def _part(graph: GraphBuilder) -> str:
    return graph.op("Mul", "mean", graph.number(1 / 64))


def inference_graph() -> bytes:
    """Table and head alone: tests of this bundle look at training."""
    graph = GraphBuilder()
    x = graph.op("Gather", "start.table", "tokens")
    graph.op("MatMul", x, graph.op("Transpose", "head.table", perm=[1, 0]), out="logits")
    tables = [dataclasses.replace(TABLE, name=name) for name in ("start.table", "head.table")]
    return graph.build([TOKENS, *tables], [dataclasses.replace(PROBABILITIES, name="logits")])


def varied_bundle(*, dropout: float = 0.1, frozen_digest: Digest | None = None) -> Bundle:
    """Seven segments of five kinds; with a digest the frozen matrix comes from weights."""
    store = GraphStore()
    return finished_bundle(
        store,
        name="varied",
        kinds=_kinds(store.add, dropout),
        segments=tuple(_segment(name) for name in SEGMENTS),
        tensors=_tensors(frozen_digest),
        inference=inference_graph(),
    )


def _kinds(add: Callable[[bytes], Digest], dropout: float) -> dict[str, SegmentKind]:
    def kind(
        name: str, graphs: tuple[bytes, ...], inputs: list[Port], outputs: list[Port],
        parameters: list[Value], stash: list[Value], **more: object,
    ) -> SegmentKind:  # fmt: skip
        pair = GraphPair(forward=add(graphs[0]), backward=add(graphs[1]), stash=tuple(stash))
        return SegmentKind(
            name=name, forms={"portable": pair}, inputs=tuple(inputs), outputs=tuple(outputs),
            parameters=tuple(parameters), forward_flops=1000, backward_flops=2000,
            **{"masks": (), **more},
        )  # fmt: skip

    x, y = boundary(X), boundary(Y)
    keep, kept = (boundary(value, differentiable=False) for value in (KEEP, KEPT))
    tokens, looked, labels, weight = (
        Port(value=value, role=role, differentiable=False)
        for value, role in (
            (TOKENS, "data"), (KEEP, "data"), (LABELS, "labels"), (WEIGHT, "loss_weight"),
        )
    )  # fmt: skip
    loss = Port(value=LOSS, role="loss", differentiable=True)
    mix, site = mix_graphs(), MaskSite(value=MASK, probability=dropout)
    kinds = [
        kind("start", start_graphs(), [tokens, looked], [y, kept], [TABLE], []),
        kind(
            "mix", mix, [x, keep], [y, kept], [SCALE], [CENTRED],
            running=(MEAN,), evaluation=add(mix[2]),
        ),
        kind("fixed", fixed_graphs(), [x, keep], [y], [W, B], [HIDDEN]),
        kind("block", block_graphs(), [x], [y], [W, B], [HIDDEN], masks=(site,)),
        kind("head", head_graphs(), [x, labels, weight], [loss], [TABLE], [PROBABILITIES]),
    ]  # fmt: skip
    return {kind.name: kind for kind in kinds}


def _segment(name: str) -> Segment:
    kind = name.rstrip("01")
    local = {
        "start": ("table",), "mix": ("scale",), "fixed": ("w", "b"), "block": ("w", "b"),
        "head": ("table",),
    }[kind]  # fmt: skip
    running = {"mean": f"{name}.mean"} if kind == "mix" else {}
    parameters = {value: f"{name}.{value}" for value in local}
    return Segment(name=name, kind=kind, parameters=parameters, running=running)


def _tensors(frozen_digest: Digest | None) -> tuple[Tensor, ...]:
    def tensor(
        name: str, *shape: int, kind: str = "normal", scale: float = 0.25, **more: object
    ) -> Tensor:
        return Tensor(
            name=name, shape=shape, dtype="float32", decay=len(shape) > 1,
            initialiser=Initialiser(kind=kind, scale=scale), **{"binding": "trainable", **more},
        )  # fmt: skip

    tensors = [tensor("start.table", VOCABULARY, WIDTH)]
    for name in ("mix0", "mix1"):
        tensors.append(tensor(f"{name}.scale", WIDTH, kind="ones"))
        tensors.append(tensor(f"{name}.mean", WIDTH, kind="zeros", binding="running"))
    tensors.append(tensor("fixed.w", WIDTH, WIDTH, binding="frozen", digest=frozen_digest))
    tensors.append(tensor("fixed.b", WIDTH, kind="zeros"))
    for name in ("block0", "block1"):
        tensors.append(tensor(f"{name}.w", WIDTH, WIDTH))
        tensors.append(tensor(f"{name}.b", WIDTH, kind="zeros"))
    tensors.append(tensor("head.table", VOCABULARY, WIDTH, tied_to="start.table"))
    return tuple(tensors)
