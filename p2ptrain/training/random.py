"""Parameters drawn on the device, the same bits on every CPU.

Philox raw integers come from the counter-based generator of numpy; from there only exact integer
arithmetic, one IEEE multiplication and one rounding to float32 follow. numpy's own `normal` uses
log and exp, whose last bits change with the CPU, so it is not used here.
"""

from __future__ import annotations

import hashlib
from typing import Final

import numpy as np
from numpy.typing import NDArray

from p2ptrain.bundle.manifest import Manifest, Tensor
from p2ptrain.errors import BundleError
from p2ptrain.ids import Digest

PARAMETER_STREAM: Final = 1 << 56
"""Upper part of the Philox key's second word: keeps this stream apart from those of masks."""
_SUMMANDS: Final = 12
_HALF_RANGE: Final = 1 << 16
_CHUNK_ELEMENTS: Final = 1 << 18
_LANES: Final = np.uint64(0x0000FFFF_0000FFFF)
"""16-bit integers in lanes of 32 bits."""
_LOWER_LANE: Final = np.uint64(0xFFFFFFFF)


def draw_parameter(seed: int, tensor: Tensor, tensor_index: int) -> NDArray[np.float32]:
    """The starting value of one parameter, drawn without weights.

    Args:
        seed: The run's seed, 0 <= seed < 2^63.
        tensor: Its initialiser and shape.
        tensor_index: Its place in the manifest; every tensor has its own Philox stream.

    Returns:
        float32 of the tensor's shape, in C order.

    Raises:
        BundleError: an unknown initialiser or dtype; the bundle is refused.
    """
    if tensor.dtype != "float32":
        raise BundleError(f"tensor {tensor.name!r}: only float32 can be drawn, not {tensor.dtype}")
    kind, scale = tensor.initialiser.kind, tensor.initialiser.scale
    if kind in ("zeros", "ones"):
        return np.full(tensor.shape, 1.0 if kind == "ones" else 0.0, np.float32)
    generator = np.random.Philox(key=_key(seed, tensor_index))
    drawn = np.empty(tensor.elements, np.float32)
    for start in range(0, tensor.elements, _CHUNK_ELEMENTS):
        part = drawn[start : start + _CHUNK_ELEMENTS]
        if kind == "normal":
            part[:] = _normal(generator, part.size) * (scale / _HALF_RANGE)
        elif kind == "uniform":
            part[:] = _uniform(generator, part.size) * (scale / (1 << 24))
        else:
            raise BundleError(f"tensor {tensor.name!r} has unknown initialiser {kind!r}")
    return drawn.reshape(tensor.shape)


def draw_tensor(manifest: Manifest, seed: int, tensor_index: int) -> NDArray[np.float32]:
    """The starting value of one of the manifest's tensors: a tied copy is drawn as its owner.

    Raises:
        BundleError: as `draw_parameter`.
    """
    tensor = manifest.tensors[tensor_index]
    if tensor.tied_to is None:
        return draw_parameter(seed, tensor, tensor_index)
    names = [each.name for each in manifest.tensors]
    owner_index = names.index(tensor.tied_to)
    return draw_parameter(seed, manifest.tensors[owner_index], owner_index)


def parameters_digest(manifest: Manifest, seed: int) -> Digest:
    """sha256 over all tensors that are drawn: little-endian float32, manifest order.

    Those with a digest of their own are not drawn but come from the bundle's weights.
    """
    digest = hashlib.sha256()
    for index, tensor in enumerate(manifest.tensors):
        if tensor.digest is None:
            digest.update(draw_tensor(manifest, seed, index).astype("<f4").tobytes())
    return Digest(digest.hexdigest())


def _key(seed: int, tensor_index: int) -> NDArray[np.uint64]:
    return np.array([seed, PARAMETER_STREAM | tensor_index], np.uint64)


def _normal(generator: np.random.Philox, count: int) -> NDArray[np.float64]:
    """Sums of twelve 16-bit integers, centred: exact integers of variance 2^32 - 1.

    Three raw integers hold twelve; two lanes of a word are added at once, and none overflows.
    """
    raw = generator.random_raw(count * _SUMMANDS // 4)
    pairs = raw >> np.uint64(16)
    pairs &= _LANES
    raw &= _LANES
    pairs += raw
    sums = pairs[0::3] + pairs[1::3]
    sums += pairs[2::3]
    total = ((sums >> np.uint64(32)) + (sums & _LOWER_LANE)).astype(np.int64)
    return (total - _SUMMANDS * (_HALF_RANGE - 1) // 2).astype(np.float64)


def _uniform(generator: np.random.Philox, count: int) -> NDArray[np.float64]:
    """Odd integers between -2^24 and 2^24, symmetric about zero, exact."""
    bits = (generator.random_raw(count) >> np.uint64(40)).astype(np.int64)
    return (2 * bits + 1 - (1 << 24)).astype(np.float64)
