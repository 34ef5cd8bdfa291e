"""What a tensor starts from: the bundle's weights, else seeded values."""

from __future__ import annotations

from collections.abc import Mapping

from p2ptrain.bundle.manifest import Manifest, Tensor
from p2ptrain.engine.contract import Array
from p2ptrain.errors import BundleError
from p2ptrain.training.random import draw_tensor


def starting_value(
    manifest: Manifest, tensor: Tensor, *, seed: int, weights: Mapping[str, Array] | None
) -> Array:
    """The whole of one tensor before the first step.

    Args:
        manifest: Of the model.
        tensor: One of its own.
        seed: Of the run.
        weights: By name, what the bundle's weights hold; None draws everything.

    Raises:
        BundleError: the weights do not fit the manifest.
    """
    if tensor.digest is None or weights is None:
        names = [each.name for each in manifest.tensors]
        return draw_tensor(manifest, seed, names.index(tensor.name))
    value = weights.get(tensor.name)
    if value is None or value.shape != tensor.shape or value.dtype.name != tensor.dtype:
        raise BundleError(f"the weights lack {tensor.name!r}, or hold it in another shape")
    return value
