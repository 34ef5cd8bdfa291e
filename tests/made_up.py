"""Samples of every data kind made from their numbers alone: the same bits on every machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from p2ptrain.bundle.manifest import Manifest, Port
from p2ptrain.data.ports import TokenPorts
from p2ptrain.engine.contract import Array
from p2ptrain.ids import Digest
from p2ptrain.training.feed import Feed

HELDOUT_FROM = 1 << 32
NO_DIGEST = Digest("0" * 64)


@dataclass(frozen=True, slots=True)
class MadeUpSamples:
    """The same few samples at every step, so that a model that trains gets better at them.

    Draws are integers and quotients of integers by a power of two: numpy's other distributions
    go through functions that differ between processors.
    """

    manifest: Manifest
    digest: Digest = NO_DIGEST

    def training(self, *, seed: int, step: int, first_sample: int, count: int) -> Feed:
        return self._feed(range(first_sample, first_sample + count))

    def heldout(self, *, sample_count: int, first_sample: int, count: int) -> Feed:
        start = HELDOUT_FROM + first_sample
        return self._feed(range(start, start + count))

    def _feed(self, numbers: Sequence[int]) -> Feed:
        generators = [np.random.Generator(np.random.Philox(key=number)) for number in numbers]
        data = self.manifest.data
        if data.kind == "windows":
            tokens = np.stack(
                [g.integers(0, data.vocabulary, data.context + 1) for g in generators]
            )
            inputs = TokenPorts(self.manifest).whole(tokens[:, :-1])
            return Feed(inputs=inputs, labels=np.ascontiguousarray(tokens[:, 1:]))
        labels = np.array([g.integers(0, data.classes) for g in generators])
        if data.kind == "texts":
            texts = [self._text(g) for g in generators]
            return Feed(inputs=TokenPorts(self.manifest).padded(texts), labels=labels)
        ports = self.manifest.data_ports
        stacked = tuple(np.stack([self._pixels(g, port) for g in generators]) for port in ports)
        return Feed(inputs=stacked, labels=labels)

    def _text(self, generator: np.random.Generator) -> list[int]:
        """Between half of the context and all of it, so that there is something to pad."""
        data = self.manifest.data
        length = generator.integers(data.context // 2, data.context + 1)
        return generator.integers(0, data.vocabulary, length).tolist()

    def _pixels(self, generator: np.random.Generator, port: Port) -> Array:
        shape = self.manifest.shape(port.value, batch=1)[1:]
        return generator.random(shape, np.float32)
