"""Matrix products with operands that the builder transposes in place."""

from __future__ import annotations

import onnx

from p2ptrain.errors import GraphError
from p2ptrain.graph.ir import attribute
from p2ptrain.graph.lowering.registry import Emitter, rule


@rule("com.microsoft.FusedMatMul")
def fused_matmul(emit: Emitter, node: onnx.NodeProto) -> None:
    """alpha * op(A) @ op(B), with explicit Transposes of the last two axes."""
    if attribute(node, "transBatchA", 0) or attribute(node, "transBatchB", 0):
        raise GraphError("FusedMatMul with transposed batch axes has no rule")
    left = _transposed(emit, node.input[0]) if attribute(node, "transA", 0) else node.input[0]
    right = _transposed(emit, node.input[1]) if attribute(node, "transB", 0) else node.input[1]
    axes = (*emit.graph.axes(left)[:-1], emit.graph.axes(right)[-1])
    alpha = float(attribute(node, "alpha", 1.0))
    if alpha == 1.0:
        emit.op("MatMul", left, right, axes=axes, out=node.output[0])
        return
    result = emit.op("MatMul", left, right, axes=axes)
    emit.like("Mul", result, emit.scalar(alpha), out=node.output[0])


def _transposed(emit: Emitter, name: str) -> str:
    axes = emit.graph.axes(name)
    order = [*range(len(axes) - 2), len(axes) - 1, len(axes) - 2]
    return emit.op("Transpose", name, axes=[axes[i] for i in order], perm=order)
