"""Compare a bundle with torch before it is written: loss, every gradient, three updates.

The bundle's graphs run segment by segment, as a run would; torch runs the module with the same
parameters, inputs and dropout masks.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from p2ptrain.bundle.manifest import FORMS, Manifest
from p2ptrain.bundle.protobuf import append_initialisers
from p2ptrain.errors import GraphError
from p2ptrain.graph.export import DATA, LABELS, LOSS, LOSS_WEIGHT, Bundle
from p2ptrain.graph.torch_export import loss_module
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
            parameters: By tensor name.
            inputs: ids, labels and loss_weight.
            masks: Per segment, by local name.
        """
        kept: list[Arrays] = []
        flowing: Arrays = dict(inputs)
        for segment, mask in zip(self.manifest.segments, masks, strict=True):
            kind = self.manifest.kinds[segment.kind]
            local = {n: parameters[t] for n, t in segment.parameters.items()}
            feeds = {**flowing, **local, **mask}
            produced = self.run(kind.forms[form].forward, feeds)
            kept.append({**feeds, **produced})
            flowing = {**inputs, "x": produced.get("y", np.zeros(0, np.float32))}
        loss = np.float32(produced[LOSS])
        gradients: Arrays = {}
        incoming: Arrays = {f"cotangent.{LOSS}": np.array(1.0, np.float32)}
        for segment, feeds in zip(reversed(self.manifest.segments), reversed(kept), strict=True):
            pair = self.manifest.kinds[segment.kind].forms[form]
            out = self.run(pair.backward, {**feeds, **incoming})
            for local_name, tensor in segment.parameters.items():
                gradients[tensor] = out[f"gradient.{local_name}"]
            if "cotangent.x" in out:
                incoming = {"cotangent.y": out["cotangent.x"]}
        return loss, gradients


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

    The module's parameters are overwritten by those drawn with seed 0.

    Raises:
        GraphError: a row is over its limit; nothing may be written.
    """
    manifest = bundle.manifest
    runner = Runner(manifest=manifest, files=bundle.files)
    parameters: Arrays = {
        tensor.name: draw_parameter(0, tensor, index)
        for index, tensor in enumerate(manifest.tensors)
    }
    _livelier(parameters)
    _load(module, parameters)
    inputs = _inputs(manifest)
    rows: list[Measured] = []
    gradients: list[Arrays] = []
    for masked in (False, True):
        masks = _masks(manifest, masked=masked)
        loss, reference = _torch_step(module, inputs, [m for s in masks for m in s.values()])
        gradients.append(reference)
        for form in FORMS:
            label = f"{form}, {'random' if masked else 'open'} masks"
            ours, found = runner.step(form=form, parameters=parameters, inputs=inputs, masks=masks)
            error, worst = gradient_error(found, reference)
            relative = abs(float(ours) - loss) / abs(loss)
            rows.append(Measured(name=f"loss ({label})", error=relative, limit=LOSS_ERROR_MAX))
            rows.append(
                Measured(
                    name=f"gradients ({label})", error=error, limit=GRADIENT_ERROR_MAX, worst=worst
                )
            )
    rows.append(_update_row(runner, parameters, gradients, "adamw"))
    rows.append(_update_row(runner, parameters, gradients, "sgd"))
    rows.append(_inference_row(module, bundle, parameters, inputs))
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


def _load(module: Any, parameters: Arrays) -> None:  # Any: a torch module
    import torch

    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.from_numpy(parameters[name]))


def _torch_step(
    module: Any, inputs: Arrays, masks: list[NDArray[Any]]
) -> tuple[float, Arrays]:  # Any: a torch module
    """Loss and gradients by torch in float64, Dropout multiplying by our masks in call order."""
    import torch

    wrapped = loss_module(copy.deepcopy(module).double()).train()
    weight = torch.from_numpy(inputs[LOSS_WEIGHT]).double()
    with _given_masks(masks):
        loss = wrapped(torch.from_numpy(inputs[DATA]), torch.from_numpy(inputs[LABELS]), weight)
    loss.backward()
    gradients = {name: p.grad.numpy() for name, p in wrapped.model.named_parameters()}
    return float(loss.detach()), gradients


@contextlib.contextmanager
def _given_masks(masks: list[NDArray[Any]]) -> Iterator[None]:  # Any: float32
    import torch

    waiting = iter(masks)

    def forward(dropout: Any, value: Any) -> Any:  # Any: a torch module and tensor
        return value * torch.from_numpy(next(waiting)) if dropout.p > 0.0 else value

    with mock.patch.object(torch.nn.Dropout, "forward", forward):
        yield


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
    module: Any, bundle: Bundle, parameters: Arrays, inputs: Arrays
) -> Measured:  # Any: a torch module
    """Logits of the inference graph with weights appended, on half the context."""
    import torch

    content = bundle.files[bundle.manifest.inference.graph]
    session = session_of(b"".join(append_initialisers(content, parameters.items())))
    ids = inputs[DATA][:, : max(1, bundle.manifest.data.context // 2)]
    module.eval()
    with torch.no_grad():
        reference = module(torch.from_numpy(ids)).numpy()
    found = session.run([bundle.manifest.inference.output.name], {DATA: ids})[0]
    error = float(np.abs(found - reference).max() / np.abs(reference).max())
    return Measured(name="inference logits", error=error, limit=GRADIENT_ERROR_MAX)
