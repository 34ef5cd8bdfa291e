"""Compare one microbatch of a bundle with the reference: loss, gradients, running values.

Float32 is compared first. In a deep network with kinks that can fail though every rule is right:
rounding decides on which side of a ReLU a value lies, in torch as here. Then the portable graphs
are held against the reference in float64, where that noise is gone, and float32 may be off by no
more than a small multiple of what torch's own float32 is off.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final

from numpy.typing import NDArray

from p2ptrain.bundle.manifest import FORMS, Manifest, Tensor
from p2ptrain.graph.measured import (
    EXACT_ERROR_MAX,
    GRADIENT_ERROR_MAX,
    LOSS_ERROR_MAX,
    TORCH_ERRORS_MAX,
    Measured,
    gradient_error,
    relative_error,
)
from p2ptrain.graph.runner import Arrays, Ran, Runner
from p2ptrain.graph.source import Source, Step

LIMITS: Final = {
    "loss": LOSS_ERROR_MAX,
    "gradients": GRADIENT_ERROR_MAX,
    "running values": GRADIENT_ERROR_MAX,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Microbatch:
    """What a step runs on."""

    masked: str
    """Which dropout masks, as the table says it; empty without dropout."""
    values: Arrays
    """Every tensor of the bundle."""
    merged: Arrays
    """The model's own tensors."""
    masks: list[Arrays]
    """Per segment."""

    def label(self, computed: str) -> str:
        return f"{computed}, {self.masked}" if self.masked else computed


def wanted_step(source: Source, manifest: Manifest, on: Microbatch, *, dtype: str) -> Ran:
    """What the reference gives, by the bundle's tensors."""
    flat = [mask for segment in on.masks for mask in segment.values()]
    found = source.reference.step(on.merged, source.example, flat, dtype=dtype)
    gradients = trainable_gradients(manifest, on.values, found)
    return Ran(loss=found.loss, gradients=gradients, running=found.running)


def step_rows(source: Source, runner: Runner, on: Microbatch, wanted: Ran) -> list[Measured]:
    """Both forms against the reference, in float32; float64 beside it where that is not enough."""
    found = {form: _ran(source, runner, on, form) for form in FORMS}
    rows = [row for form in FORMS for row in _rows(on.label(form), found[form], wanted, LIMITS)]
    if all(row.passed for row in rows):
        return rows
    noise = _noise(wanted_step(source, runner.manifest, on, dtype="float32"), wanted)
    limits = {what: max(LIMITS[what], TORCH_ERRORS_MAX * noise[what]) for what in noise}
    held = [
        *_rows(on.label("portable"), found["portable"], wanted, limits),
        *_rows(on.label("training against portable"), found["training"], found["portable"], limits),
    ]
    noted = [
        replace(row, note=f"torch itself {error:.1e}")
        for row, error in zip(held, [*noise.values(), *noise.values()], strict=True)
    ]
    return [*_exact_rows(source, runner, on, wanted), *noted]


def _noise(single: Ran, wanted: Ran) -> dict[str, float]:
    """How far torch's own float32 is off. A loss is one number and may be right by chance: it
    counts as no better than the running values, which the same forward made."""
    noise = {what: error for what, (error, _) in _errors(single, wanted).items()}
    return noise | {"loss": max(noise["loss"], noise.get("running values", 0.0))}


def _exact_rows(source: Source, runner: Runner, on: Microbatch, wanted: Ran) -> list[Measured]:
    from p2ptrain.graph.exact import float64_function

    exact = Runner(manifest=runner.manifest, files=runner.files, open_graph=float64_function)
    found = _ran(source, exact, on, "portable")
    return _rows(on.label("float64 graphs"), found, wanted, dict.fromkeys(LIMITS, EXACT_ERROR_MAX))


def _ran(source: Source, runner: Runner, on: Microbatch, form: str) -> Ran:
    ran = runner.step(form=form, parameters=on.values, inputs=source.example, masks=on.masks)
    return replace(ran, gradients=sum_over_copies(runner.manifest, ran.gradients))


def _errors(found: Ran, wanted: Ran) -> dict[str, tuple[float, str]]:
    """How far off, and where the largest error is."""
    errors = {
        "loss": (abs(found.loss - wanted.loss) / abs(wanted.loss), ""),
        "gradients": gradient_error(found.gradients, wanted.gradients),
    }
    if wanted.running:
        errors["running values"] = relative_error(found.running, wanted.running)
    return errors


def _rows(label: str, found: Ran, wanted: Ran, limits: dict[str, float]) -> list[Measured]:
    return [
        Measured(name=f"{what} ({label})", error=error, limit=limits[what], worst=worst)
        for what, (error, worst) in _errors(found, wanted).items()
    ]


def trainable_gradients(manifest: Manifest, values: Arrays, reference: Step) -> Arrays:
    """The reference's gradients by trainable tensor; those of adapters by the chain rule."""
    found: Arrays = {}
    for tensor in manifest.tensors:
        own = tensor.binding == "trainable" and tensor.tied_to is None
        if own and tensor.name in reference.gradients:
            found[tensor.name] = reference.gradients[tensor.name]
        if tensor.adapter is not None and tensor.tied_to is None:
            found |= _adapter_gradients(tensor, values, reference.gradients[tensor.name])
    return found


def _adapter_gradients(tensor: Tensor, values: Arrays, gradient: NDArray[Any]) -> Arrays:
    """Of up and down, from the gradient of W + scale * up @ down. (Any: float64.)"""
    adapter = tensor.adapter
    if adapter is None:
        return {}
    plain = (gradient.T if adapter.transposed else gradient) * adapter.scale
    up, down = values[adapter.up].astype(float), values[adapter.down].astype(float)
    return {adapter.up: plain @ down.T, adapter.down: up.T @ plain}


def sum_over_copies(manifest: Manifest, gradients: Arrays) -> Arrays:
    """One gradient per tied tensor: the sum over its copies, in segment order."""
    summed: Arrays = {}
    for name, gradient in gradients.items():
        owner = manifest.tensor(name).tied_to or name
        summed[owner] = summed[owner] + gradient if owner in summed else gradient
    return summed
