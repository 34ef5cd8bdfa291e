"""Token ids laid out for the data ports that a model of text has.

Shapes: B samples of a microbatch, T context.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from p2ptrain.bundle.manifest import Manifest, Port
from p2ptrain.errors import BundleError

Array = NDArray[Any]  # Any: the ports' dtypes
FILLED_PORTS: Final = ("attention_mask", "token_type_ids", "position_ids")
"""Data ports that follow from the length of a text; one more takes the token ids."""


class TokenPorts:
    """Fills the data ports of a model whose samples are `context` token ids each."""

    def __init__(self, manifest: Manifest) -> None:
        self._ports = manifest.data_ports
        self._context = manifest.data.context
        self._pad = manifest.data.special_tokens.get("pad", 0)
        others = [port.value.name for port in self._ports if port.value.name not in FILLED_PORTS]
        if len(others) != 1:
            raise BundleError(
                f"the model wants {', '.join(others) or 'nothing'} beside"
                f" {', '.join(FILLED_PORTS)}; from text there is one array of tokens",
                hint="give arrays, one named after each input of the model",
            )
        for port in self._ports:
            _check_shape(manifest, port, self._context)

    def whole(self, tokens_BT: Array) -> tuple[Array, ...]:
        """Samples without padding."""
        return self._filled(tokens_BT, np.ones(tokens_BT.shape, bool))

    def padded(self, samples: Sequence[Sequence[int]]) -> tuple[Array, ...]:
        """Samples of at most `context` tokens each, padded at the end."""
        tokens = np.full((len(samples), self._context), self._pad, np.int64)
        real = np.zeros(tokens.shape, bool)
        for index, sample in enumerate(samples):
            tokens[index, : len(sample)] = sample
            real[index, : len(sample)] = True
        return self._filled(tokens, real)

    def _filled(self, tokens: Array, real: Array) -> tuple[Array, ...]:
        made = {
            "attention_mask": real,
            "token_type_ids": np.zeros_like(tokens),
            "position_ids": np.broadcast_to(np.arange(self._context), tokens.shape),
        }
        values = [(made.get(port.value.name, tokens), port.value.dtype) for port in self._ports]
        return tuple(np.ascontiguousarray(value, dtype) for value, dtype in values)


def token_labels(manifest: Manifest, labels_BT: Array) -> Array:
    """Labels per token as the labels port wants them."""
    port = manifest.labels_port
    _check_shape(manifest, port, manifest.data.context)
    return np.ascontiguousarray(labels_BT, port.value.dtype)


def _check_shape(manifest: Manifest, port: Port, context: int) -> None:
    shape = manifest.shape(port.value, batch=1)
    if shape != (1, context):
        raise BundleError(f"port {port.value.name!r} has shape {shape}, not (1, {context})")
