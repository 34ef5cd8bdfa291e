"""Run a bundle's graphs segment by segment on onnxruntime, for checks and tests.

This is the manifest's naming contract in its plainest form: nothing is reused, planned or timed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p2ptrain.bundle.manifest import Manifest, Segment, SegmentKind, Value
from p2ptrain.bundle.protobuf import append_initialisers
from p2ptrain.errors import GraphError
from p2ptrain.ids import Digest

Arrays = dict[str, NDArray[Any]]  # Any: float32 values, int64 ids and masks
GraphFunction = Callable[[Mapping[str, NDArray[Any]]], Arrays]  # Any: as above
"""Outputs of a graph by name; feeds that it does not declare are left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """What one microbatch gave."""

    loss: float
    gradients: Arrays
    """By tensor name, trainable tensors only; a tied tensor's copies each have their own."""
    running: Arrays
    """Running values after the forward, by tensor name."""


@dataclass(slots=True, kw_only=True)
class Runner:
    """Runs a bundle's graphs, opened once each, or per segment where tensors are frozen."""

    manifest: Manifest
    files: Mapping[Digest, bytes]
    open_graph: Callable[[bytes, Arrays], GraphFunction] = field(
        default_factory=lambda: session_function
    )
    """From a model and tensors that it reads and does not declare."""
    _functions: dict[tuple[Digest, str], GraphFunction] = field(default_factory=dict)

    def run(
        self, graph: Digest, feeds: Mapping[str, NDArray[Any]], *, frozen: Arrays, place: str = ""
    ) -> Arrays:
        """Run one graph; inputs that it does not declare are left out.

        Args:
            frozen: Tensors by local name that the graph reads and does not declare.
            place: Tells the constants of one segment from those of another.
        """
        key = (graph, place if frozen else "")
        if key not in self._functions:
            self._functions[key] = self.open_graph(self.files[graph], frozen)
        return self._functions[key](feeds)

    def step(
        self,
        *,
        form: str,
        parameters: Arrays,
        inputs: Arrays,
        masks: Sequence[Arrays],
        in_parts: bool = False,
    ) -> Ran:
        """Loss, gradients and running values of one microbatch, by the chain of segments.

        Args:
            parameters: Every tensor by its name.
            inputs: Data by port name, `labels` and `loss_weight`.
            masks: Per segment, by local name.
            in_parts: Run backwards in their two parts where they have them.
        """
        kept: list[Arrays] = []
        running: Arrays = {}
        entering: list[NDArray[Any]] = []  # Any: as above
        for segment, mask in zip(self.manifest.segments, masks, strict=True):
            kind = self.manifest.kinds[segment.kind]
            feeds = {**self._given(segment, parameters), **mask}
            feeds |= _entering(kind, inputs, entering)
            frozen = self._frozen(segment, parameters)
            graph = kind.forms[form].forward
            produced = self.run(graph, feeds, frozen=frozen, place=segment.name)
            kept.append({**feeds, **produced})
            running |= {name: produced[f"new.{n}"] for n, name in segment.running.items()}
            entering = [produced[value.name] for value in _leaving(kind)]
        loss = float(produced[self._loss.name])
        gradients = self._backward(form, parameters, kept, in_parts=in_parts)
        return Ran(loss=loss, gradients=gradients, running=running)

    def evaluate(self, *, parameters: Arrays, inputs: Arrays, masks: Sequence[Arrays]) -> float:
        """The loss of an evaluation: the evaluation graphs, or forward graphs with `masks`."""
        entering: list[NDArray[Any]] = []  # Any: as above
        for segment, mask in zip(self.manifest.segments, masks, strict=True):
            kind = self.manifest.kinds[segment.kind]
            feeds = {**self._given(segment, parameters), **mask}
            feeds |= _entering(kind, inputs, entering)
            frozen = self._frozen(segment, parameters)
            graph = kind.evaluation or kind.forms["portable"].forward
            produced = self.run(graph, feeds, frozen=frozen, place=segment.name)
            entering = [produced[value.name] for value in _leaving(kind)]
        return float(produced[self._loss.name])

    def _backward(
        self, form: str, parameters: Arrays, kept: Sequence[Arrays], *, in_parts: bool
    ) -> Arrays:
        gradients: Arrays = {}
        incoming: Arrays = {f"cotangent.{self._loss.name}": np.array(1.0, np.float32)}
        later: SegmentKind | None = None
        for segment, feeds in zip(reversed(self.manifest.segments), reversed(kept), strict=True):
            kind = self.manifest.kinds[segment.kind]
            if later is not None:
                incoming = _cotangents(kind, later, incoming)
            later = kind
            frozen = self._frozen(segment, parameters)
            trained = {n: t for n, t in segment.parameters.items() if n not in frozen}
            if not trained and not any(port.differentiable for port in kind.inputs):
                incoming = {}  # its backward is empty
                continue
            if not _differentiates(kind, frozen):
                break  # nothing before it is trained either
            pair, fed = kind.forms[form], {**feeds, **incoming}
            graphs: tuple[Digest, ...] = (pair.backward,)
            if in_parts and pair.parts is not None:
                graphs = (pair.parts.cotangents, pair.parts.gradients)
            incoming = {}
            for graph in graphs:
                given = {**fed, **incoming}
                incoming |= self.run(graph, given, frozen=frozen, place=segment.name)
            gradients |= {tensor: incoming[f"gradient.{n}"] for n, tensor in trained.items()}
        return gradients

    @property
    def _loss(self) -> Value:
        outputs = self.manifest.kinds[self.manifest.segments[-1].kind].outputs
        return next(port.value for port in outputs if port.role == "loss")

    def _given(self, segment: Segment, parameters: Arrays) -> Arrays:
        named = {**segment.parameters, **segment.running}
        return {local: parameters[tensor] for local, tensor in named.items()}

    def _frozen(self, segment: Segment, parameters: Arrays) -> Arrays:
        return {
            local: parameters[tensor]
            for local, tensor in segment.parameters.items()
            if self.manifest.tensor(tensor).binding == "frozen"
        }


def _entering(kind: SegmentKind, inputs: Arrays, boundary: Sequence[NDArray[Any]]) -> Arrays:
    """Values of the input ports: the boundary by position, the rest by name. (Any: as above.)"""
    ports = [port.value.name for port in kind.inputs if port.role == "boundary"]
    fed = {p.value.name: inputs[p.value.name] for p in kind.inputs if p.role != "boundary"}
    return {**fed, **dict(zip(ports, boundary, strict=True))}


def _leaving(kind: SegmentKind) -> list[Value]:
    return [port.value for port in kind.outputs if port.role == "boundary"]


def _cotangents(kind: SegmentKind, later: SegmentKind, produced: Arrays) -> Arrays:
    """Cotangents of `kind`'s outputs, from those of the following segment's inputs."""
    leaving = [port for port in kind.outputs if port.role == "boundary"]
    entering = [port for port in later.inputs if port.role == "boundary"]
    return {
        f"cotangent.{ours.value.name}": produced[f"cotangent.{theirs.value.name}"]
        for ours, theirs in zip(leaving, entering, strict=True)
        if ours.differentiable and theirs.differentiable
    }


def _differentiates(kind: SegmentKind, frozen: Arrays) -> bool:
    """False where nothing is trained and nobody before waits for a cotangent."""
    waits = any(port.differentiable for port in kind.inputs)
    return waits or len(frozen) < len(kind.parameters)


def session_function(content: bytes, frozen: Arrays) -> GraphFunction:
    """A graph on onnxruntime."""
    session = session_of(b"".join(append_initialisers(content, frozen.items())))
    wanted = {entry.name for entry in session.get_inputs()}
    outputs = [entry.name for entry in session.get_outputs()]

    def run(feeds: Mapping[str, NDArray[Any]]) -> Arrays:  # Any: as above
        given = {name: value for name, value in feeds.items() if name in wanted}
        return dict(zip(outputs, session.run(outputs, given), strict=True))

    return run


def session_of(content: bytes) -> Any:  # Any: onnxruntime is untyped
    """An onnxruntime session with one thread and no spinning.

    Raises:
        GraphError: onnxruntime refuses the graph, which the exporter made; nothing is written.
    """
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no narrower base
        raise GraphError(
            f"onnxruntime refuses a graph that was made of the model: {error!s:.200}",
            hint="please report it with the model's configuration",
        ) from error
