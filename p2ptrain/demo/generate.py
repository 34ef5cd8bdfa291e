"""Let a trained byte-level model write: from trained.onnx, with nothing else than the engine.

Shapes: T context, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from p2ptrain.bundle.manifest import Manifest
from p2ptrain.engine.contract import Engine
from p2ptrain.engine.onnxruntime_engine import open_engine
from p2ptrain.errors import NotFound, NumericsError

TEMPERATURE: Final = 0.7


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How to write: the same choice gives the same text from the same logits."""

    prompt: bytes
    count: int
    """Bytes to add to the prompt."""
    seed: int = 0
    temperature: float = TEMPERATURE

    def __post_init__(self) -> None:
        if not self.prompt or self.count < 0 or self.temperature <= 0:
            raise ValueError("sampling needs a prompt, a count and a temperature above 0")


class Writer:
    """A trained model, loaded once; gives the logits of the next byte."""

    def __init__(self, engine: Engine, model: bytes, manifest: Manifest) -> None:
        (source,) = manifest.inference.inputs
        shape = manifest.shape(source, batch=1)
        logits_shape = manifest.shape(manifest.inference.output, batch=1)
        tokens = np.zeros(shape, dtype=np.dtype(source.dtype))
        self._tokens_1T = engine.wrap(tokens)
        self._logits_1TV = engine.wrap(np.zeros(logits_shape, dtype=np.float32))
        program = engine.compile(model)
        self._binding = program.bind()
        self._binding.set_input(source.name, self._tokens_1T)
        self._binding.set_output(manifest.inference.output.name, self._logits_1TV)

    def next_logits(self, text: bytes) -> NDArray[np.float32]:
        """Logits of the byte after `text`, shape (V,); only the last T bytes are read.

        The model is causal, so what stands behind the last byte does not matter.
        """
        tokens_T = self._tokens_1T.host()[0]
        recent = np.frombuffer(text[-len(tokens_T) :], dtype=np.uint8)
        tokens_T[: len(recent)] = recent
        self._binding.run()
        logits_V: NDArray[np.float32] = self._logits_1TV.host()[0, len(recent) - 1]
        return logits_V


def write_text(model: Path, manifest: Manifest, sampling: Sampling) -> str:
    """The prompt and what the model at `model` adds to it, as printable text.

    Raises:
        NotFound: there is no such file.
        EngineError: onnxruntime refuses the file.
        NumericsError: the model gives a logit that is not finite.
    """
    if not model.is_file():
        raise NotFound(f"there is no trained model at {model}")
    writer = Writer(open_engine(threads=1), model.read_bytes(), manifest)
    text = sampling.prompt
    draws = np.random.Generator(np.random.Philox(sampling.seed)).random(sampling.count)
    for draw in draws:
        text += bytes([pick(writer.next_logits(text), float(draw), sampling.temperature)])
    return "".join(c if " " <= c <= "~" or c == "\n" else "?" for c in text.decode("latin-1"))


def pick(logits_V: NDArray[np.float32], draw: float, temperature: float) -> int:
    """The byte that a uniform draw in [0, 1) chooses from the softmax of logits / temperature."""
    scaled_V = logits_V[:256].astype(np.float64) / temperature
    if not np.isfinite(scaled_V).all():
        raise NumericsError("the trained model gives a logit that is not finite")
    weights_V = np.exp(scaled_V - scaled_V.max())
    cumulative_V = np.cumsum(weights_V)
    chosen = np.searchsorted(cumulative_V, draw * cumulative_V[-1], side="right")
    return int(min(chosen, len(weights_V) - 1))
