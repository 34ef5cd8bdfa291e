"""BatchNormalization of a training graph: batch statistics, and running values as state.

Contract with the exporter. It traces the model for training with the BatchNorm modules (alone)
in evaluation mode: torch then writes BatchNormalization nodes that name their running values and
carry the momentum (ONNX's: 1 - torch's). With the running values as graph inputs,
`canonicalise_batch_norm` turns each node into training mode and adds the new running values as
outputs. Nobody differentiates those: `vjp` leaves out every output named `new.*`. The
evaluation graph keeps its nodes, or folds them; this pass is not run on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import onnx

from p2ptrain.errors import GraphError
from p2ptrain.graph.ir import FLOAT, MICROSOFT, Graph, Type, attribute, make
from p2ptrain.graph.lowering.normalisation import channel_count
from p2ptrain.graph.lowering.registry import Emitter
from p2ptrain.graph.vjp import NEW


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningSite:
    """The running values of one BatchNorm: graph inputs, and the outputs that replace them."""

    mean: str
    variance: str
    new_mean: str
    new_variance: str


def canonicalise_batch_norm(graph: Graph) -> tuple[RunningSite, ...]:
    """Put every BatchNormalization into training mode; gives where its state goes in and out.

    new = old + m * (batch - old), with torch's momentum m; the batch's variance is divided by
    n - 1 for the running value and by n for normalising, n being the values of one channel.

    Raises:
        GraphError: running values that are no graph inputs, or are shared by two nodes.
    """
    sites: list[RunningSite] = []
    emit = Emitter(graph=graph)
    for node in graph.nodes:
        if node.op_type == "BatchNormalization" and not node.domain:
            sites.append(_train(emit, node))
        else:
            emit.nodes.append(node)
    graph.nodes = emit.nodes
    names = [site.mean for site in sites]
    if len(set(names)) != len(names):
        raise GraphError(
            "a BatchNorm is used twice in the model",
            hint="give each use its own module; its running values would depend on the order",
        )
    graph.prune()
    return tuple(sites)


def _train(emit: Emitter, node: onnx.NodeProto) -> RunningSite:
    graph = emit.graph
    x, scale, bias, mean, variance = node.input
    if mean not in graph.inputs or variance not in graph.inputs:
        raise GraphError(
            f"the running values of the BatchNorm that makes {node.output[0]!r} are no inputs",
            hint="freeze it in evaluation mode, or track running statistics",
        )
    site = RunningSite(
        mean=mean, variance=variance, new_mean=NEW + mean, new_variance=NEW + variance
    )
    channels = graph.axes(scale)
    extra = [graph.fresh(stem) for stem in ("mean", "variance", "mean", "inverse")]
    for name in extra:
        graph.types[name] = Type(dtype=FLOAT, axes=channels)
    emit.nodes.append(
        make(
            "BatchNormInternal",
            [x, scale, bias, mean, variance],
            [node.output[0], *extra],
            domain=MICROSOFT,
            epsilon=float(attribute(node, "epsilon", 1e-5)),
            training_mode=1,
        )
    )
    _add_running(emit, site, x, extra[0], extra[1], 1.0 - float(attribute(node, "momentum", 0.9)))
    graph.outputs += [site.new_mean, site.new_variance]
    return site


ROUNDED: Final = 6
"""Digits of a momentum: ONNX's is a float32, 1 - 0.1 and back is 0.10000002."""


def _add_running(
    emit: Emitter, site: RunningSite, x: str, mean: str, variance: str, momentum: float
) -> None:
    count = channel_count(emit, x)
    less = emit.like("Sub", count, emit.scalar(1.0))
    unbiased = emit.like("Mul", variance, emit.like("Div", count, less))
    for old, batch, new in (
        (site.mean, mean, site.new_mean),
        (site.variance, unbiased, site.new_variance),
    ):
        step = emit.like("Mul", emit.like("Sub", batch, old), emit.scalar(round(momentum, ROUNDED)))
        emit.like("Add", old, step, out=new)
