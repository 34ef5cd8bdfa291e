"""The varied bundle, whose frozen matrix has an adapter; its gradients are written by hand."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Final

from p2ptrain.bundle.manifest import Adapter, Initialiser, Manifest, Tensor, Value
from p2ptrain.ids import Digest
from p2ptrain.store.bundles import Bundle, bundle_from_parts
from p2ptrain.training.random import parameters_digest
from tests.bundles import HIDDEN, WIDTH, B, GraphBuilder, W, X, Y, cotangent, gradient, graph_files
from tests.varied_bundle import KEEP, varied_bundle

RANK, SCALE = 2, 0.5
DOWN: Final = Value(name="lora_down", shape=(str(RANK), str(WIDTH)))
UP: Final = Value(name="lora_up", shape=(str(WIDTH), str(RANK)))


def _graphs() -> tuple[bytes, bytes]:
    """y = x + tanh(x w + scale (x down^T) up^T + b) where it may look; `w` is frozen."""
    forward = GraphBuilder()
    low = forward.op("MatMul", "x", forward.op("Transpose", "lora_down", perm=[1, 0]))
    scaled = forward.op("Mul", low, forward.number(SCALE))
    change = forward.op("MatMul", scaled, forward.op("Transpose", "lora_up", perm=[1, 0]))
    own = forward.op("Add", forward.op("MatMul", "x", "w"), "b")
    forward.op("Tanh", forward.op("Add", own, change), out="h")
    forward.op("Add", "x", _seen(forward, "h"), out="y")
    back = GraphBuilder()
    slope = back.op("Sub", back.number(1.0), back.op("Mul", "h", "h"))
    dpre = back.op("Mul", _seen(back, "cotangent.y"), slope)
    back.op("ReduceSum", dpre, back.ints(0, 1), out="gradient.b", keepdims=0)
    scaled = back.op("Mul", dpre, back.number(SCALE))
    low = back.op("MatMul", "x", back.op("Transpose", "lora_down", perm=[1, 0]))
    back.op("MatMul", _rows(back, scaled, WIDTH, turned=True), _rows(back, low, RANK),
            out="gradient.lora_up")  # fmt: skip
    dlow = back.op("MatMul", scaled, "lora_up")
    back.op("MatMul", _rows(back, dlow, RANK, turned=True), _rows(back, "x", WIDTH),
            out="gradient.lora_down")  # fmt: skip
    own = back.op("MatMul", dpre, back.op("Transpose", "w", perm=[1, 0]))
    dx = back.op("Add", own, back.op("MatMul", dlow, "lora_down"))
    back.op("Add", "cotangent.y", dx, out="cotangent.x")
    outputs = [cotangent(X), gradient(B), gradient(DOWN), gradient(UP)]
    return (
        forward.build([X, KEEP, B, DOWN, UP], [Y, HIDDEN], frozen=(W,)),
        back.build([X, KEEP, DOWN, UP, HIDDEN, cotangent(Y)], outputs, frozen=(W,)),
    )


def _seen(graph: GraphBuilder, name: str) -> str:
    looked = graph.op("Unsqueeze", "keep", graph.ints(-1))
    return graph.op("Where", looked, name, graph.number(0.0))


def _rows(graph: GraphBuilder, name: str, width: int, *, turned: bool = False) -> str:
    flat = graph.op("Reshape", name, graph.ints(-1, width))
    return graph.op("Transpose", flat, perm=[1, 0]) if turned else flat


def adapted_bundle() -> Bundle:
    """Trains everything else as well; the adapter's matrix lies as (in, out)."""
    bundle = varied_bundle()
    old = bundle.manifest.kinds["fixed"]
    pair = old.forms["portable"]
    parts = dict(zip((pair.forward, pair.backward), _graphs(), strict=True))
    digests = {was: Digest(hashlib.sha256(content).hexdigest()) for was, content in parts.items()}
    kind = dataclasses.replace(
        old, parameters=(*old.parameters, DOWN, UP),
        forms={"portable": dataclasses.replace(
            pair, forward=digests[pair.forward], backward=digests[pair.backward]
        )},
    )  # fmt: skip
    graphs = {d: content for d, content in graph_files(bundle).items() if d not in digests}
    graphs |= {digests[was]: content for was, content in parts.items()}
    files = {
        digests.get(Digest(was), was): dataclasses.replace(
            file, bytes=len(parts.get(Digest(was), b"")) or file.bytes
        )
        for was, file in bundle.manifest.graphs.items()
    }
    manifest = dataclasses.replace(
        _with_parts(bundle.manifest), graphs=files, kinds={**bundle.manifest.kinds, "fixed": kind}
    )
    manifest = dataclasses.replace(manifest, golden_parameters=parameters_digest(manifest, 0))
    return bundle_from_parts(manifest.to_bytes(), graphs)


def _with_parts(manifest: Manifest) -> Manifest:
    """The adapter's tensors, in the segment of what they adapt."""
    down, up = (f"fixed.{value.name}" for value in (DOWN, UP))
    adapter = Adapter(down=down, up=up, scale=SCALE, transposed=True)
    tensors: list[Tensor] = []
    for tensor in manifest.tensors:
        adapted = tensor.name == "fixed.w"
        tensors.append(dataclasses.replace(tensor, adapter=adapter) if adapted else tensor)
        if tensor.name == "fixed.b":
            uniform = Initialiser(kind="uniform", scale=0.25)
            tensors += [
                _part(down, (RANK, WIDTH), uniform),
                _part(up, (WIDTH, RANK), Initialiser(kind="zeros")),
            ]
    names = {DOWN.name: down, UP.name: up}
    segments = tuple(
        dataclasses.replace(s, parameters={**s.parameters, **names}) if s.name == "fixed" else s
        for s in manifest.segments
    )
    return dataclasses.replace(manifest, tensors=tuple(tensors), segments=segments)


def _part(name: str, shape: tuple[int, ...], initialiser: Initialiser) -> Tensor:
    return Tensor(
        name=name, shape=shape, dtype="float32", binding="trainable", decay=True,
        initialiser=initialiser,
    )  # fmt: skip
