"""The values that a bundle ships: `weights.safetensors` and what the manifest says of it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from numpy.typing import NDArray

from p2ptrain.bundle.manifest import Manifest, Tensor
from p2ptrain.errors import GraphError
from p2ptrain.ids import Digest
from p2ptrain.training.random import parameters_digest
from p2ptrain.training.safetensors import encode_tensors, tensor_digest

Array = NDArray[Any]  # Any: every dtype of a manifest


def with_weights(manifest: Manifest, weights: Mapping[str, Array]) -> Manifest:
    """The manifest with the digests of what is shipped; the rest of the tensors is drawn.

    Args:
        weights: By name, those of tied copies under their owner's; names that the manifest does
            not have are left out.

    Raises:
        GraphError: a value has another shape than its tensor.
    """
    if not any(tensor.name in weights for tensor in manifest.tensors):
        return manifest
    tensors = tuple(
        tensor if value is None else replace(tensor, digest=tensor_digest(_value(tensor, value)))
        for tensor, value in ((t, weights.get(t.tied_to or t.name)) for t in manifest.tensors)
    )
    shipped = replace(manifest, tensors=tensors)
    file = hashlib.sha256()
    for chunk in weights_file(shipped, weights):
        file.update(chunk)
    return replace(
        shipped,
        weights=Digest(file.hexdigest()),
        golden_parameters=parameters_digest(shipped, 0),
    )


def weights_file(manifest: Manifest, weights: Mapping[str, Array]) -> list[bytes | memoryview]:
    """The chunks of `weights.safetensors`: tensors in manifest order, tied copies once."""
    return encode_tensors(
        {
            tensor.name: _value(tensor, weights[tensor.name])
            for tensor in manifest.tensors
            if tensor.tied_to is None and tensor.digest is not None
        },
        {},
    )


def _value(tensor: Tensor, value: Array) -> Array:
    """With the dtype of the manifest."""
    if value.shape != tensor.shape:
        raise GraphError(
            f"the weights have {tensor.name!r} as {value.shape}, the graph as {tensor.shape}"
        )
    return value.astype(tensor.dtype, copy=False)
