"""The three workloads of the engine's benchmark, and the files that every contender reads.

Shape suffixes: S steps, M microbatches, B samples of a microbatch.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from p2ptrain.bundle.manifest import Manifest, Port
from p2ptrain.errors import ConfigError
from p2ptrain.training.contract import OptimizerChoice
from p2ptrain.training.random import draw_parameter
from tools.bench.workload import ROOT

Array = NDArray[Any]  # Any: float32 and int64
_RATE: Final = 3e-4
OPTIMIZER: Final = OptimizerChoice(
    peak_learning_rate=_RATE, final_learning_rate=_RATE, warmup_steps=0
)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineWorkload:
    """One model with its batch; the sizes are those of the targets."""

    name: str
    factory: str
    arguments: Mapping[str, object]
    task: str
    microbatch_size: int
    microbatches: int = 8
    options: tuple[str, ...] = field(default=())
    """Further options of the exporter."""


WORKLOADS: Final = {
    each.name: each
    for each in (
        EngineWorkload(
            name="gpt",
            factory="onnx_models.gpt:gpt",
            arguments={
                "layers": 6, "width": 384, "heads": 6, "vocabulary": 4096, "context": 128,
                "dropout": 0.0,
            },
            task="language-modelling",
            microbatch_size=4,
        ),
        EngineWorkload(
            name="bert",
            factory="onnx_models.bert:bert",
            arguments={
                "layers": 4, "width": 512, "heads": 8, "vocabulary": 30522, "context": 128,
                "dropout": 0.0,
            },
            task="sequence-classification",
            microbatch_size=4,
        ),
        EngineWorkload(
            name="mobilenet",
            factory="onnx_models.mobilenet:mobilenet",
            arguments={"channels": 3, "side": 32, "dropout": 0.0},
            task="image-classification",
            microbatch_size=8,
        ),
    )
}  # fmt: skip


def exported(cache: Path, workload: EngineWorkload, torch_python: str) -> Path:
    """The workload's bundle, exported when the cache has none made by these sources.

    Raises:
        ConfigError: the exporter failed; its own words are above.
    """
    folder = cache / f"{workload.name}-{_sources_digest(workload)}"
    if (folder / "manifest.json").is_file():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    command = [torch_python, str(ROOT / "tools" / "export_model.py"), "--model", workload.factory]
    for name, value in workload.arguments.items():
        command += ["--arg", f"{name}={value}"]
    command += ["--task", workload.task, "--out", str(folder), "--name", workload.name]
    if subprocess.run([*command, *workload.options], cwd=ROOT, check=False).returncode != 0:
        raise ConfigError(
            f"{workload.name} could not be exported",
            hint="give an interpreter that has torch and onnxscript with --torch-python",
        )
    return folder


def write_workload(folder: Path, workload: EngineWorkload, manifest: Manifest, steps: int) -> None:
    """Write `workload.json`, `initial.npz` and `batches.npz` for both workers.

    Samples are random: what a step costs does not depend on what the numbers mean.
    """
    index = {tensor.name: place for place, tensor in enumerate(manifest.tensors)}
    drawn = {t.name: draw_parameter(0, t, index[t.name]) for t in manifest.tensors}
    np.savez(folder / "initial.npz", **drawn)  # type: ignore[arg-type]  # names are the data's
    generator = np.random.Generator(np.random.Philox(7))
    lead = (steps, workload.microbatches, workload.microbatch_size)
    arrays = {
        f"input.{port.value.name}": _random(generator, manifest, port, lead)
        for port in manifest.data_ports
    }
    labels = manifest.shape(manifest.labels_port.value, batch=workload.microbatch_size)
    high = manifest.data.classes or manifest.data.vocabulary
    arrays["labels"] = generator.integers(0, high, (*lead, *labels[1:]))
    np.savez(folder / "batches.npz", **arrays)  # type: ignore[arg-type]  # as above
    settings = {
        "factory": workload.factory,
        "arguments": dict(workload.arguments),
        "inputs": [port.value.name for port in manifest.data_ports],
        "optimizer": asdict(OPTIMIZER),
        "undecayed": [tensor.name for tensor in manifest.tensors if not tensor.decay],
        "steps": steps,
    }
    (folder / "workload.json").write_text(json.dumps(settings))


def _random(
    generator: np.random.Generator, manifest: Manifest, port: Port, lead: tuple[int, ...]
) -> Array:
    shape = (*lead, *manifest.shape(port.value, batch=lead[-1])[1:])
    if port.value.dtype == "float32":
        return generator.standard_normal(shape).astype(np.float32)
    if "mask" in port.value.name:
        return np.ones(shape, port.value.dtype)
    if "type" in port.value.name:
        return np.zeros(shape, port.value.dtype)
    return generator.integers(0, manifest.data.vocabulary, shape).astype(port.value.dtype)


def _sources_digest(workload: EngineWorkload) -> str:
    """Changes when the exporter, its graph surgery or the model does."""
    digest = hashlib.sha256(repr(workload).encode())
    sources = [ROOT / "tools" / "export_model.py", ROOT / "p2ptrain" / "bundle" / "manifest.py"]
    sources += sorted((ROOT / "p2ptrain" / "graph").rglob("*.py"))
    sources += sorted((ROOT / "onnx_models").glob("*.py"))
    for source in sources:
        digest.update(source.read_bytes())
    return digest.hexdigest()[:12]
