"""What every contender trains: one model, one start, one order of data.

Shape suffixes: S steps, M microbatches, B samples of a microbatch, T context.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

import numpy as np

from p2ptrain.bundle.manifest import Manifest
from p2ptrain.demo.corpus import standard_corpus, write_corpus
from p2ptrain.errors import ConfigError
from p2ptrain.training.contract import OptimizerChoice
from p2ptrain.training.learning_rate import learning_rate
from p2ptrain.training.random import draw_parameter
from p2ptrain.training.sampling import training_windows
from p2ptrain.training.text import byte_tokens

ROOT: Final = Path(__file__).resolve().parents[2]
FACTORY: Final = "onnx_models.gpt:gpt"
BUNDLE_NAME: Final = "gpt-13.8m"
_LEARNING_RATE: Final = 3e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Arguments of `onnx_models.gpt.gpt`; the defaults have 13.8 million parameters."""

    layers: int = 6
    width: int = 384
    heads: int = 6
    vocabulary: int = 4096
    context: int = 128
    dropout: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One turn: `warm_up` steps that are not counted, then `steps` that are."""

    model: ModelShape = field(default_factory=ModelShape)
    microbatch_size: int = 4
    microbatches: int = 8
    warm_up: int = 1
    steps: int = 3
    seed: int = 0
    form: str = "portable"
    threads: int = 1
    optimizer: OptimizerChoice = field(
        default_factory=lambda: OptimizerChoice(
            peak_learning_rate=_LEARNING_RATE, final_learning_rate=_LEARNING_RATE, warmup_steps=0
        )
    )

    @property
    def steps_all(self) -> int:
        return self.warm_up + self.steps


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """Real English as bytes, on disk for the peers."""

    train: Path
    heldout: Path


def write_texts(folder: Path) -> Texts:
    """Write the corpus of the running Python into `folder`."""
    train, heldout = write_corpus(standard_corpus(), folder)
    return Texts(train=train, heldout=heldout)


def write_torch_inputs(folder: Path, workload: Workload, manifest: Manifest, texts: Texts) -> None:
    """Give torch the parameters, samples and rates that our peers draw for themselves.

    Writes `workload.json`, `initial.npz` (one array per parameter, by name) and `batches.npz`
    (`inputs` and `labels`, int64 (S, M, B, T)).
    """
    drawn = {
        tensor.name: draw_parameter(workload.seed, tensor, index)
        for index, tensor in enumerate(manifest.tensors)
    }
    np.savez(folder / "initial.npz", **drawn)  # type: ignore[arg-type]  # names are the data's
    windows = [_windows(workload, texts, step) for step in range(1, workload.steps_all + 1)]
    np.savez(
        folder / "batches.npz",
        inputs=np.stack([inputs for inputs, _ in windows]),
        labels=np.stack([labels for _, labels in windows]),
    )
    (folder / "workload.json").write_text(json.dumps(torch_settings(workload, manifest)))


def torch_settings(workload: Workload, manifest: Manifest) -> dict[str, object]:
    """What `torch_worker` reads from `workload.json`."""
    steps = workload.steps_all
    return {
        "model": asdict(workload.model),
        "optimizer": asdict(workload.optimizer),
        "learning_rates": [
            learning_rate(workload.optimizer, step=step, steps=steps)
            for step in range(1, steps + 1)
        ],
        "undecayed": [tensor.name for tensor in manifest.tensors if not tensor.decay],
    }


def _windows(
    workload: Workload, texts: Texts, step: int
) -> tuple[np.ndarray[tuple[int, ...], np.dtype[np.int64]], ...]:
    shape = (workload.microbatches, workload.microbatch_size, workload.model.context)
    windows = training_windows(
        byte_tokens(texts.train.read_bytes()),
        seed=workload.seed,
        step=step,
        first_sample=0,
        count=workload.microbatches * workload.microbatch_size,
        context=workload.model.context,
    )
    return tuple(part.reshape(shape) for part in windows)


def exported_bundle(cache: Path, model: ModelShape, torch_python: str) -> Path:
    """The model's bundle, exported when the cache has none made by these sources.

    Raises:
        ConfigError: the exporter failed; its own words are above.
    """
    folder = cache / f"{BUNDLE_NAME}-{_sources_digest(model)}"
    if (folder / "manifest.json").is_file():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    command = [torch_python, str(ROOT / "tools" / "export_model.py"), "--model", FACTORY]
    for name, value in asdict(model).items():
        command += ["--arg", f"{name}={value}"]
    command += ["--out", str(folder), "--name", BUNDLE_NAME]
    if subprocess.run(command, cwd=ROOT, check=False).returncode != 0:
        raise ConfigError(
            "the model could not be exported",
            hint="give an interpreter that has torch and onnxscript with --torch-python",
        )
    return folder


def _sources_digest(model: ModelShape) -> str:
    """Changes when the exporter, its graph surgery or the model does."""
    digest = hashlib.sha256(repr(model).encode())
    sources = [ROOT / "tools" / "export_model.py", ROOT / "onnx_models" / "gpt.py"]
    sources += sorted((ROOT / "p2ptrain" / "graph").rglob("*.py"))
    sources += [ROOT / "p2ptrain" / "bundle" / "manifest.py"]
    for source in sources:
        digest.update(source.read_bytes())
    return digest.hexdigest()[:12]
