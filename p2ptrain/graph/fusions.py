"""Activations that a tracer writes out in several nodes, as one node with one slope.

Sigmoid and product become SiLU, the tanh GELU one node, and log(sigmoid(x)), which overflows for
large -x, becomes -softplus(-x), which does not.
"""

from __future__ import annotations

import math

import onnx

from p2ptrain.graph.ir import MICROSOFT, Graph, make

Producers = dict[str, onnx.NodeProto]


def fuse_activations(graph: Graph) -> None:
    """Rewrite in place; what is left without readers falls away."""
    producers = graph.producers()
    nodes = []
    for node in graph.nodes:
        source = _silu_source(producers, node)
        tanh_source = _tanh_gelu_source(graph, producers, node)
        if tanh_source is not None:
            nodes.append(make("FastGelu", [tanh_source], node.output, domain=MICROSOFT))
        elif source is not None:
            nodes.append(make("QuickGelu", [source], node.output, domain=MICROSOFT, alpha=1.0))
        elif node.op_type == "Log" and _made_by(producers, node.input[0], "Sigmoid"):
            nodes += _log_sigmoid(graph, str(producers[node.input[0]].input[0]), node.output[0])
        else:
            nodes.append(node)
    graph.nodes = nodes
    graph.prune()


def _made_by(producers: Producers, name: str, kind: str) -> bool:
    return name in producers and producers[name].op_type == kind


def _log_sigmoid(graph: Graph, x: str, target: str) -> list[onnx.NodeProto]:
    negative, positive = graph.fresh("negative"), graph.fresh("softplus")
    graph.types[negative] = graph.types[positive] = graph.types[x]
    return [
        make("Neg", [x], [negative]),
        make("Softplus", [negative], [positive]),
        make("Neg", [positive], [target]),
    ]


def _silu_source(producers: Producers, node: onnx.NodeProto) -> str | None:
    """The x of x * sigmoid(x)."""
    if node.op_type != "Mul":
        return None
    for x, gate in (tuple(node.input), tuple(node.input)[::-1]):
        if _made_by(producers, gate, "Sigmoid") and producers[gate].input[0] == x:
            return str(x)
    return None


def _tanh_gelu_source(graph: Graph, producers: Producers, node: onnx.NodeProto) -> str | None:
    """The x of x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))) / 2, its factors in any order."""
    if node.op_type != "Mul":
        return None
    factors, scale = _factors(graph, producers, node)
    gates = [name for name in factors if _made_by(producers, name, "Add")]
    if len(factors) != 2 or len(gates) != 1 or abs(scale - 0.5) > 1e-6:
        return None
    x = next(name for name in factors if name != gates[0])
    turned, offset = _with_constant(graph, producers[gates[0]])
    if turned is None or abs(offset - 1.0) > 1e-6 or not _made_by(producers, turned, "Tanh"):
        return None
    inner = producers.get(producers[turned].input[0])
    if inner is None or inner.op_type != "Mul":
        return None
    bent, root = _with_constant(graph, inner)
    if abs(root - math.sqrt(2.0 / math.pi)) > 1e-6 or not _made_by(producers, bent or "", "Add"):
        return None
    return x if _is_bent(graph, producers, producers[bent or ""], x) else None


def _is_bent(graph: Graph, producers: Producers, node: onnx.NodeProto, x: str) -> bool:
    """Whether the node is x + 0.044715 x^3."""
    others = [name for name in node.input if name != x]
    if len(others) != 1 or not _made_by(producers, others[0], "Mul"):
        return False
    factors, scale = _factors(graph, producers, producers[others[0]])
    if abs(scale - 0.044715) > 1e-6:
        return False
    if factors == [x, x, x]:
        return True
    cube = producers.get(factors[0]) if len(factors) == 1 else None
    if cube is None or cube.op_type != "Pow" or cube.input[0] != x:
        return False
    exponent = graph.constants.get(cube.input[1])
    return exponent is not None and exponent.size == 1 and float(exponent.item()) == 3.0


def _factors(graph: Graph, producers: Producers, node: onnx.NodeProto) -> tuple[list[str], float]:
    """The factors of a tree of products, and the product of its constants."""
    scale, names, waiting = 1.0, [], list(node.input)
    while waiting:
        name = waiting.pop(0)
        constant = graph.constants.get(name)
        if constant is not None and constant.size == 1:
            scale *= float(constant.item())
        elif _made_by(producers, name, "Mul"):
            waiting += producers[name].input
        else:
            names.append(str(name))
    return names, scale


def _with_constant(graph: Graph, node: onnx.NodeProto) -> tuple[str | None, float]:
    """The operand that is no constant, and the one that is."""
    for index, name in enumerate(node.input):
        constant = graph.constants.get(name)
        if constant is not None and constant.size == 1:
            return str(node.input[1 - index]), float(constant.item())
    return None, math.nan
