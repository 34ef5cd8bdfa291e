"""Compare a bundle with torch before it is written: loss, every gradient, three updates.

The bundle's graphs run segment by segment, as a run would; torch runs the module with the same
parameters, inputs and dropout masks.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from p2ptrain.bundle.manifest import FORMS, Manifest, Port, Segment
from p2ptrain.bundle.protobuf import append_initialisers
from p2ptrain.errors import GraphError
from p2ptrain.graph.export import Bundle
from p2ptrain.graph.source import LABELS, LOSS, LOSS_WEIGHT
from p2ptrain.graph.torch_export import DATA, DecoderReference
from p2ptrain.ids import Digest
from p2ptrain.training.random import draw_parameter

Floats = NDArray[np.float32]
Arrays = dict[str, NDArray[Any]]  # Any: float32 values and int64 ids

LOSS_ERROR_MAX: Final = 1e-6
GRADIENT_ERROR_MAX: Final = 1e-5
UPDATE_STEPS: Final = 3
TRULY_ZERO: Final = 1e-12
_BATCH: Final = 3


@dataclass(slots=True, kw_only=True)
class Runner:
    """Runs a bundle's graphs on onnxruntime, one session per graph; for checks and tests."""

    manifest: Manifest
    files: Mapping[Digest, bytes]
    _sessions: dict[Digest, Any] = field(default_factory=dict)  # Any: onnxruntime is untyped

    def run(self, graph: Digest, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        """Run one graph; inputs that it does not declare are left out."""
        session = self._session(graph)
        wanted = {entry.name for entry in session.get_inputs()}
        outputs = [entry.name for entry in session.get_outputs()]
        given = {name: value for name, value in feeds.items() if name in wanted}
        return dict(zip(outputs, session.run(outputs, given), strict=True))

    def _session(self, graph: Digest) -> Any:  # Any: as above
        if graph not in self._sessions:
            self._sessions[graph] = session_of(self.files[graph])
        return self._sessions[graph]

    def step(
        self, *, form: str, parameters: Arrays, inputs: Arrays, masks: list[Arrays]
    ) -> tuple[np.float32, Arrays]:
        """Loss and gradients of one microbatch, by the chain of segments.

        Args:
            parameters: Values of all tensors by name; a tied copy has its owner's.
            inputs: Data, labels and loss_weight.
            masks: Per segment, by local name.

        Returns:
            The loss, and the gradients by owner: those of tied copies are added.
        """
        kept: list[Arrays] = []
        crossing: Arrays = {}
        for segment, mask in zip(self.manifest.segments, masks, strict=True):
            kind = self.manifest.kinds[segment.kind]
            named = {**segment.parameters, **segment.running}
            local = {name: parameters[self._owner(tensor)] for name, tensor in named.items()}
            feeds = {**inputs, **crossing, **local, **mask}
            produced = self.run(kind.forms[form].forward, feeds)
            kept.append({**feeds, **produced})
            crossing = _handed_on(produced, kind.outputs, self._entering(segment))
        return np.float32(produced[LOSS]), self._backward(form, kept)

    def _owner(self, name: str) -> str:
        return self.manifest.tensor(name).tied_to or name

    def _entering(self, segment: Segment) -> tuple[str, ...]:
        """Boundary inputs of the segment after this one."""
        index = self.manifest.segments.index(segment) + 1
        if index == len(self.manifest.segments):
            return ()
        kind = self.manifest.kinds[self.manifest.segments[index].kind]
        return tuple(port.value.name for port in kind.inputs if port.role == "boundary")

    def _backward(self, form: str, kept: list[Arrays]) -> Arrays:
        gradients: Arrays = {}
        incoming: Arrays = {f"cotangent.{LOSS}": np.array(1.0, np.float32)}
        for segment, feeds in zip(reversed(self.manifest.segments), reversed(kept), strict=True):
            kind = self.manifest.kinds[segment.kind]
            out = self.run(kind.forms[form].backward, {**feeds, **incoming})
            for local_name, name in segment.parameters.items():
                owner = self._owner(name)
                found = out.get(f"gradient.{local_name}")
                if found is not None:
                    gradients[owner] = gradients[owner] + found if owner in gradients else found
            ports = [port.value.name for port in kind.inputs if port.role == "boundary"]
            incoming = {
                f"cotangent.{leaving}": out[f"cotangent.{entering}"]
                for leaving, entering in zip(self._leaving(segment), ports, strict=True)
                if f"cotangent.{entering}" in out
            }
        return gradients

    def _leaving(self, segment: Segment) -> tuple[str, ...]:
        """Boundary outputs of the segment before this one."""
        index = self.manifest.segments.index(segment)
        if index == 0:
            return ()
        return tuple(value.name for value in self.manifest.boundary(index - 1))


def _handed_on(produced: Arrays, outputs: Sequence[Port], names: Sequence[str]) -> Arrays:
    """What a segment gave, under the names that the next one has for it."""
    given = [produced[port.value.name] for port in outputs if port.role == "boundary"]
    return dict(zip(names, given, strict=True))


def session_of(content: bytes) -> Any:  # Any: onnxruntime is untyped
    """An onnxruntime session with one thread and no spinning."""
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One row of the check's table."""

    name: str
    error: float
    limit: float
    worst: str = ""
    """Where the largest error is."""

    @property
    def passed(self) -> bool:
        return self.error <= self.limit


def gradient_error(measured: Arrays, reference: Arrays) -> tuple[float, str]:
    """DESIGN section 10: max|d| / max(max|ref|, 1e-4 x the largest gradient), and its tensor.

    A gradient that is zero in exact arithmetic (attention's key bias), which the float64 reference
    shows, has rounding noise only, in torch as here: it is measured against the largest gradient.
    """
    largest = max(float(np.abs(value).max()) for value in reference.values())
    errors = {}
    for name, value in reference.items():
        size = float(np.abs(value).max())
        scale = largest if size < TRULY_ZERO * largest else max(size, 1e-4 * largest)
        errors[name] = float(np.abs(measured[name] - value).max()) / scale
    worst = max(errors, key=lambda name: errors[name])
    return errors[worst], worst


def verify(module: Any, bundle: Bundle) -> tuple[Measured, ...]:  # Any: a torch module
    """Compare everything with torch; the rows are also what the manifest keeps.

    Raises:
        GraphError: a row is over its limit; nothing may be written.
    """
    manifest = bundle.manifest
    runner = Runner(manifest=manifest, files=bundle.files)
    parameters: Arrays = {
        tensor.name: draw_parameter(0, tensor, index)
        for index, tensor in enumerate(manifest.tensors)
        if tensor.tied_to is None
    }
    _livelier(parameters)
    reference = DecoderReference(module=module)
    inputs = _inputs(manifest)
    rows: list[Measured] = []
    gradients: list[Arrays] = []
    for masked in (False, True):
        masks = _masks(manifest, masked=masked)
        step = reference.step(parameters, inputs, [m for s in masks for m in s.values()])
        gradients.append(step.gradients)
        for form in FORMS:
            label = f"{form}, {'random' if masked else 'open'} masks"
            ours, found = runner.step(form=form, parameters=parameters, inputs=inputs, masks=masks)
            error, worst = gradient_error(found, step.gradients)
            relative = abs(float(ours) - step.loss) / abs(step.loss)
            rows.append(Measured(name=f"loss ({label})", error=relative, limit=LOSS_ERROR_MAX))
            rows.append(
                Measured(
                    name=f"gradients ({label})", error=error, limit=GRADIENT_ERROR_MAX, worst=worst
                )
            )
    rows.append(_update_row(runner, parameters, gradients, "adamw"))
    rows.append(_update_row(runner, parameters, gradients, "sgd"))
    rows.append(_inference_row(reference, bundle, parameters, inputs))
    for row in rows:
        if not row.passed:
            raise GraphError(
                f"{row.name}: error {row.error:.2e} against torch, over {row.limit:.0e}"
                + (f", worst in {row.worst}" if row.worst else ""),
                hint="an operator's gradient or lowering rule is wrong; nothing was written",
            )
    return tuple(rows)


def _livelier(parameters: Arrays) -> None:
    """Move zeros and ones off their values, and give attention something to attend to."""
    generator = np.random.Generator(np.random.Philox(11))
    for name, value in parameters.items():
        noise = generator.standard_normal(value.shape).astype(np.float32)
        parameters[name] = value + np.float32(0.05) * noise


def _inputs(manifest: Manifest) -> Arrays:
    generator = np.random.Generator(np.random.Philox(12))
    shape = (_BATCH, manifest.data.context)
    high = manifest.data.vocabulary
    labels = generator.integers(0, high, shape)
    labels[0, :2] = -100
    weight = np.array(1.0 / (labels >= 0).sum(), np.float32)
    return {DATA: generator.integers(0, high, shape), LABELS: labels, LOSS_WEIGHT: weight}


def _masks(manifest: Manifest, *, masked: bool) -> list[Arrays]:
    """Per segment: masks of ones, or of 0 and 1 / (1 - p)."""
    generator = np.random.Generator(np.random.Philox(13))
    drawn = []
    for segment in manifest.segments:
        masks: Arrays = {}
        for site in manifest.kinds[segment.kind].masks:
            shape = manifest.shape(site.value, batch=_BATCH)
            open_ = generator.random(shape) >= site.probability * masked
            scale = 1.0 / (1.0 - site.probability) if masked else 1.0
            masks[site.value.name] = open_.astype(np.float32) * np.float32(scale)
        drawn.append(masks)
    return drawn


def _torch_step(
    module: Any, inputs: Arrays, masks: list[NDArray[Any]]
) -> tuple[float, Arrays]:  # Any: a torch module
    """Loss and gradients by torch in float64 with the parameters that the module has."""
    parameters = {name: value.detach().numpy() for name, value in module.named_parameters()}
    step = DecoderReference(module=module).step(parameters, inputs, masks)
    return step.loss, step.gradients


HYPERPARAMETERS: Final = {
    "learning_rate": 1e-2,
    "weight_decay": 0.1,
    "beta1": 0.9,
    "beta2": 0.95,
    "epsilon": 1e-8,
    "momentum": 0.9,
    "clip_scale": 0.5,
}


def _update_row(
    runner: Runner, parameters: Arrays, gradients: list[Arrays], rule_name: str
) -> Measured:
    """Three steps of an update graph against torch's optimizer on the same gradients.

    The error is relative to how far torch moved the tensor, at least 10 % of its size.
    """
    ours = {name: value.copy() for name, value in parameters.items()}
    theirs = _torch_updates(parameters, gradients, rule_name)
    rule = runner.manifest.updates[rule_name]
    states = {
        name: {f"state.{s}": np.zeros(v.size, np.float32) for s in rule.state}
        for name, v in parameters.items()
    }
    for step in range(UPDATE_STEPS):
        for name, value in ours.items():
            feeds = {
                "parameter": value.reshape(-1),
                "gradient": gradients[step % len(gradients)][name].reshape(-1).astype(np.float32),
                **states[name],
                **_scalars(rule.scalars, step + 1),
            }
            out = runner.run(rule.graph, feeds)
            ours[name] = out["new.parameter"].reshape(value.shape)
            states[name] = {f"state.{s}": out[f"new.state.{s}"] for s in rule.state}
    errors = {
        name: float(np.abs(ours[name] - t).max() / _movement(parameters[name], t))
        for name, t in theirs.items()
    }
    worst = max(errors, key=lambda name: errors[name])
    return Measured(
        name=f"{rule_name}, {UPDATE_STEPS} steps",
        error=errors[worst],
        limit=GRADIENT_ERROR_MAX,
        worst=worst,
    )


def _movement(before: NDArray[Any], after: NDArray[Any]) -> float:  # Any: float32
    return float(max(np.abs(after - before).max(), 0.1 * np.abs(after).max()))


def _scalars(names: tuple[str, ...], step: int) -> Arrays:
    beta1, beta2 = HYPERPARAMETERS["beta1"], HYPERPARAMETERS["beta2"]
    values = HYPERPARAMETERS | {
        "one_minus_beta1": 1.0 - beta1,
        "one_minus_beta2": 1.0 - beta2,
        "correction1": 1.0 - beta1**step,
        "correction2_sqrt": (1.0 - beta2**step) ** 0.5,
    }
    return {name: np.array(values[name], np.float32) for name in names}


def _torch_updates(parameters: Arrays, gradients: list[Arrays], rule_name: str) -> Arrays:
    import torch

    h = HYPERPARAMETERS
    moving = {n: torch.nn.Parameter(torch.from_numpy(v.copy())) for n, v in parameters.items()}
    optimizer: torch.optim.Optimizer
    if rule_name == "adamw":
        optimizer = torch.optim.AdamW(
            moving.values(),
            lr=h["learning_rate"],
            betas=(h["beta1"], h["beta2"]),
            eps=h["epsilon"],
            weight_decay=h["weight_decay"],
        )
    else:
        optimizer = torch.optim.SGD(
            moving.values(),
            lr=h["learning_rate"],
            momentum=h["momentum"],
            weight_decay=h["weight_decay"],
        )
    for step in range(UPDATE_STEPS):
        for name, parameter in moving.items():
            gradient = gradients[step % len(gradients)][name].astype(np.float32)
            parameter.grad = torch.from_numpy(gradient * np.float32(h["clip_scale"]))
        optimizer.step()
    return {name: parameter.detach().numpy() for name, parameter in moving.items()}


def _inference_row(
    reference: DecoderReference, bundle: Bundle, parameters: Arrays, inputs: Arrays
) -> Measured:
    """Logits of the inference graph with weights appended, on half the context."""
    content = bundle.files[bundle.manifest.inference.graph]
    session = session_of(b"".join(append_initialisers(content, parameters.items())))
    ids = inputs[DATA][:, : max(1, bundle.manifest.data.context // 2)]
    expected = reference.infer(parameters, {DATA: ids})
    found = session.run([bundle.manifest.inference.output.name], {DATA: ids})[0]
    error = float(np.abs(found - expected).max() / np.abs(expected).max())
    return Measured(name="inference logits", error=error, limit=GRADIENT_ERROR_MAX)
