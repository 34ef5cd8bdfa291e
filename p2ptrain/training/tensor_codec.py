"""Boundary tensors as bytes: fp32, bf16, or int8 in blocks, the same bits on every machine.

Only float32 tensors are compressed; of any other dtype the raw values go. PROTOCOL.md section 6.7
gives the bytes. Every step is one exact IEEE operation of numpy, so an encoder elsewhere can match
them. int8 keeps what it lost of a cotangent and adds it to the next one (`ErrorFeedback`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from p2ptrain.errors import InvariantBroken, NumericsError, RemoteProtocolError

CODECS: Final = ("fp32", "bf16", "int8")
BLOCK_VALUES: Final = 256
"""Values that share one scale under int8."""
CODE_MAX: Final = 127
SCALE_MIN: Final = float(np.finfo(np.float32).tiny)
"""A block that would need a smaller scale is sent as zeros: subnormals are never used."""
SCALE_MAX: Final = float(np.finfo(np.float32).max) / 128
"""Exact in float32, and no int8 times it overflows."""
_CHUNK_VALUES: Final = 1 << 16
"""Worked on at once: temporaries stay in cache."""
_SCALE_BYTES: Final = 4

Array = NDArray[Any]  # Any: float32, or whatever dtype a port has
Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


def encoded_bytes(codec: str, *, dtype: str, elements: int) -> int:
    """Bytes of one tensor on the wire: plans and receivers predict sizes with it."""
    if dtype != "float32" or codec == "fp32":
        return elements * np.dtype(dtype).itemsize
    if codec == "bf16":
        return elements * 2
    if codec == "int8":
        return elements + _SCALE_BYTES * _block_count(elements)
    raise InvariantBroken(f"unknown codec {codec!r}")


def encode(codec: str, array: Array, out: Bytes | None = None) -> Bytes:
    """Encode one tensor.

    Args:
        codec: One of CODECS.
        array: Of any shape, contiguous; read only. Values are taken in C order.
        out: Receives the bytes; of exactly `encoded_bytes`. None: a fresh one.

    Returns:
        `out`, uint8.

    Raises:
        NumericsError: int8 and a value is not finite; abandon the step, keep the peer.
    """
    size = encoded_bytes(codec, dtype=array.dtype.name, elements=array.size)
    encoded = np.empty(size, np.uint8) if out is None else out
    if encoded.shape != (size,):
        raise InvariantBroken(f"{encoded.shape} bytes for a tensor that takes {size}")
    flat = array.reshape(-1)
    if codec == "fp32" or array.dtype != np.float32:
        encoded.view(_little(array.dtype))[:] = flat
    elif codec == "bf16":
        _encode_bf16(flat, encoded.view("<u2"))
    else:
        scales, codes = _int8_parts(encoded, array.size)
        _encode_int8(flat, scales, codes)
    return encoded


def decode(codec: str, encoded: Bytes, out: Array) -> None:
    """Decode one tensor into `out` (contiguous).

    Raises:
        RemoteProtocolError: not the size of such a tensor, or a scale is out of range; close the
            link.
    """
    size = encoded_bytes(codec, dtype=out.dtype.name, elements=out.size)
    if encoded.shape != (size,):
        raise RemoteProtocolError(f"a tensor of {encoded.size} bytes, not {size}")
    flat = out.reshape(-1)
    if codec == "fp32" or out.dtype != np.float32:
        flat[:] = encoded.view(_little(out.dtype))
    elif codec == "bf16":
        words = flat.view(np.uint32)
        np.left_shift(encoded.view("<u2"), 16, out=words, dtype=np.uint32, casting="unsafe")
    else:
        scales, codes = _int8_parts(encoded, out.size)
        _decode_int8(scales, codes, flat)


def encode_all(codec: str, arrays: tuple[Array, ...]) -> tuple[Array, ...]:
    """What goes over a link for the tensors at one place: fp32 is the arrays themselves, not
    copied; errors as `encode`."""
    return arrays if codec == "fp32" else tuple(encode(codec, array) for array in arrays)


def hand_over(codec: str, sources: tuple[Array, ...], targets: tuple[Array, ...]) -> None:
    """Give `targets` what a link would have brought there from `sources`; errors as `encode`."""
    for source, target in zip(sources, targets, strict=True):
        decode(codec, encode(codec, source), target)


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class ResidualKey:
    """Which cotangents share a residual: those of one microbatch index at one boundary value."""

    segment: int
    """Index of the segment before the boundary."""
    index: int
    """Which of the boundary's values with a cotangent."""
    microbatch: int


class ErrorFeedback:
    """What a lossy codec took from the cotangents of one stage, added to those of the next step.

    A step's new residuals count only once the step is committed: an abandoned one is encoded again
    to the same bits. The committed residuals are part of the stage's saved state.

    Source: error feedback after Seide et al. 2014 and Karimireddy et al. 2019.
    """

    def __init__(self, codec: str) -> None:
        self._codec = codec
        self._committed: dict[ResidualKey, Floats] = {}
        self._pending: dict[ResidualKey, Floats] = {}

    def encode(self, key: ResidualKey, array: Array, out: Bytes | None = None) -> Bytes:
        """Encode a cotangent together with what the last committed step lost of it.

        Encoding the same key again before `commit` gives the same bytes for the same array.

        Raises:
            NumericsError: as `encode`; no residual has changed.
        """
        if self._codec != "int8" or array.dtype != np.float32:
            return encode(self._codec, array, out)
        before = self._committed.get(key)
        with np.errstate(over="ignore", invalid="ignore"):  # encode refuses what is not finite
            wanted = array if before is None else array + before
        encoded = encode(self._codec, wanted, out)
        lost = np.empty(array.shape, np.float32)
        decode(self._codec, encoded, lost)
        self._pending[key] = np.subtract(wanted, lost, out=lost)
        return encoded

    def commit(self) -> None:
        """The step is committed: its residuals are the ones to add from now on."""
        self._committed |= self._pending
        self._pending.clear()

    def abandon(self) -> None:
        """The step is begun again: forget what it lost."""
        self._pending.clear()

    def state(self) -> dict[ResidualKey, Floats]:
        """The committed residuals, in key order; do not change the arrays."""
        return dict(sorted(self._committed.items()))

    def restore(self, state: Mapping[ResidualKey, Floats]) -> None:
        """Go on from saved residuals; a key that is missing starts from zero."""
        self._pending.clear()
        self._committed = {key: np.array(value, np.float32) for key, value in state.items()}

    def keep(self, segments: Iterable[int]) -> None:
        """Forget the residuals of other boundaries: cuts have moved."""
        kept = set(segments)
        self._committed = {k: v for k, v in self._committed.items() if k.segment in kept}
        self._pending.clear()


def _block_count(elements: int) -> int:
    return -(-elements // BLOCK_VALUES)


def _little(dtype: np.dtype[Any]) -> np.dtype[Any]:  # Any: the port's own dtype
    return dtype.newbyteorder("<")


def _int8_parts(encoded: Bytes, elements: int) -> tuple[Floats, NDArray[np.int8]]:
    """Views of the scales and of the codes that follow them."""
    scale_bytes = _SCALE_BYTES * _block_count(elements)
    return encoded[:scale_bytes].view("<f4"), encoded[scale_bytes:].view(np.int8)


def _encode_bf16(flat: Floats, out: NDArray[np.uint16]) -> None:
    """Round to nearest, ties to even; a NaN stays one, with its quiet bit set."""
    for start in range(0, flat.size, _CHUNK_VALUES):
        part = flat[start : start + _CHUNK_VALUES]
        words = part.view(np.uint32)
        rounded = (words >> 16) & 1
        rounded += words  # cannot pass 2^32: only NaNs have words that large, replaced below
        rounded += 0x7FFF
        rounded >>= 16
        nan = np.isnan(part)
        if nan.any():
            rounded[nan] = (words[nan] >> 16) | 0x40
        out[start : start + part.size] = rounded


def _encode_int8(flat: Floats, scales: Floats, codes: NDArray[np.int8]) -> None:
    for start in range(0, flat.size, _CHUNK_VALUES):
        part = flat[start : start + _CHUNK_VALUES]
        blocks = _in_blocks(part)
        largest = np.abs(blocks).max(axis=1)
        if not np.isfinite(largest).all():
            raise NumericsError("a boundary tensor is not finite; int8 cannot carry it")
        scale = np.minimum(largest / np.float32(CODE_MAX), np.float32(SCALE_MAX))
        scale[scale < SCALE_MIN] = 0.0
        divisor = np.where(scale == 0.0, np.float32(np.inf), scale)
        quotients = blocks / divisor[:, None]
        np.rint(quotients, out=quotients)
        np.clip(quotients, -CODE_MAX, CODE_MAX, out=quotients)
        first = start // BLOCK_VALUES
        scales[first : first + scale.size] = scale
        codes[start : start + part.size] = quotients.reshape(-1)[: part.size]


def _in_blocks(part: Floats) -> Floats:
    """Shape (n, BLOCK_VALUES), the last row filled up with zeros."""
    missing = -part.size % BLOCK_VALUES
    padded = np.pad(part, (0, missing)) if missing else part
    return padded.reshape(-1, BLOCK_VALUES)


def _decode_int8(scales: Floats, codes: NDArray[np.int8], flat: Floats) -> None:
    usable = (scales == 0.0) | ((scales >= SCALE_MIN) & (scales <= SCALE_MAX))
    if not usable.all():
        raise RemoteProtocolError("an int8 tensor has a scale that is out of range")
    whole = flat.size // BLOCK_VALUES
    blocks = flat[: whole * BLOCK_VALUES].reshape(whole, BLOCK_VALUES)
    fitting = codes[: blocks.size].reshape(blocks.shape)
    np.multiply(fitting, scales[:whole, None], out=blocks, dtype=np.float32)
    if rest := flat[blocks.size :].size:
        np.multiply(codes[-rest:], scales[-1], out=flat[-rest:], dtype=np.float32)
