"""Bundles whose tensors come from a weights file."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from p2ptrain.bundle.manifest import Tensor
from p2ptrain.engine.contract import Array
from p2ptrain.ids import Digest
from p2ptrain.store.bundles import Bundle, bundle_from_parts, load_bundle
from p2ptrain.training.random import parameters_digest
from p2ptrain.training.safetensors import encode_tensors, tensor_digest
from tests.bundles import graph_files, write_bundle


def some_weights(bundle: Bundle, names: tuple[str, ...], seed: int = 5) -> dict[str, Array]:
    """Ordinary values for these tensors, none of which a run would draw."""
    rng = np.random.Generator(np.random.Philox(seed))
    shapes = {name: bundle.manifest.tensor(name).shape for name in names}
    return {n: (rng.random(shape, np.float32) - 0.5) * 0.3 for n, shape in shapes.items()}


def write_weighted(directory: Path, bundle: Bundle, tensors: Mapping[str, Array]) -> Bundle:
    """Write a bundle whose named tensors, and tied copies of them, come from a weights file."""

    def given(tensor: Tensor) -> Tensor:
        source = tensor.name if tensor.tied_to is None else tensor.tied_to
        if source not in tensors:
            return tensor
        return dataclasses.replace(tensor, digest=tensor_digest(tensors[source]))

    file = b"".join(encode_tensors(tensors, {}))
    manifest = dataclasses.replace(
        bundle.manifest,
        tensors=tuple(given(tensor) for tensor in bundle.manifest.tensors),
        weights=Digest(hashlib.sha256(file).hexdigest()),
    )
    manifest = dataclasses.replace(manifest, golden_parameters=parameters_digest(manifest, 0))
    write_bundle(directory, bundle_from_parts(manifest.to_bytes(), graph_files(bundle)))
    (directory / "weights.safetensors").write_bytes(file)
    return load_bundle(directory)
