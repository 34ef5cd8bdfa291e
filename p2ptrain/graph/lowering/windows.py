"""The arithmetic of moving windows: what convolution and pooling share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray

from p2ptrain.errors import GraphError
from p2ptrain.graph.ir import Axis, attribute


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """Windows over `sizes` that give `results`; one entry per spatial axis, pads begins first."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]
    sizes: tuple[int, ...]
    results: tuple[int, ...]

    @property
    def rank(self) -> int:
        return len(self.kernel)

    def moves(self, axis: int) -> bool:
        """Whether a result along this axis is not simply the value at its place."""
        return not _stays(self.kernel[axis], self.strides[axis], *self.pads[axis :: self.rank])

    def begin(self, axis: int) -> int:
        return self.pads[axis]

    def span(self, axis: int) -> int:
        """Values between the first and the last tap of a window, both included."""
        return (self.kernel[axis] - 1) * self.dilations[axis] + 1

    def used(self, axis: int) -> int:
        """Padded values up to the end of the last window."""
        return (self.results[axis] - 1) * self.strides[axis] + self.span(axis)

    def end(self, axis: int) -> int:
        """Padding that the last window needs after the values; negative where some are unread."""
        return self.used(axis) - self.sizes[axis] - self.begin(axis)

    @property
    def transposed_pads(self) -> tuple[int, ...]:
        """Pads of the ConvTranspose that spreads results back over the values."""
        ends = [max(self.end(axis), 0) for axis in range(self.rank)]
        return (*self.pads[: self.rank], *ends)

    @property
    def output_padding(self) -> tuple[int, ...]:
        """Values after the last window, which no result has read."""
        return tuple(max(-self.end(axis), 0) for axis in range(self.rank))

    def real_values(self, axis: int) -> NDArray[np.float32]:
        """How many taps of each window along one axis lie on values, not on padding."""
        starts = np.arange(self.results[axis]) * self.strides[axis] - self.begin(axis)
        taps = starts[:, None] + np.arange(self.kernel[axis]) * self.dilations[axis]
        inside = (taps >= 0) & (taps < self.sizes[axis])
        return np.asarray(inside.sum(1), np.float32)


def windows(
    node: onnx.NodeProto, kernel: Sequence[int], *, sizes: Sequence[Axis], results: Sequence[Axis]
) -> Windows:
    """Read a node's window attributes.

    Raises:
        GraphError: automatic padding, or windows that move along an axis whose size is not fixed.
    """
    rank = len(kernel)
    if attribute(node, "auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
        raise GraphError(
            f"{node.op_type} with automatic padding has no rule",
            hint="state the padding as numbers in the model",
        )
    strides = tuple(attribute(node, "strides", [1] * rank))
    pads = tuple(attribute(node, "pads", [0] * 2 * rank))
    stay = [_stays(kernel[i], strides[i], *pads[i::rank]) for i in range(rank)]
    return Windows(
        kernel=tuple(kernel),
        strides=strides,
        dilations=tuple(attribute(node, "dilations", [1] * rank)),
        pads=pads,
        sizes=tuple(_size(a, stays=s) for a, s in zip(sizes, stay, strict=True)),
        results=tuple(_size(a, stays=s) for a, s in zip(results, stay, strict=True)),
    )


def _stays(kernel: int, stride: int, begin: int, end: int) -> bool:
    return kernel == stride == 1 and begin == end == 0


def _size(axis: Axis, *, stays: bool) -> int:
    """The size of an axis; 1 stands for a symbol along which no window moves."""
    return 1 if stays and isinstance(axis, str) else fixed(axis)


def fixed(axis: Axis) -> int:
    """The size of an axis that has to be known at export.

    Raises:
        GraphError: it is a symbol.
    """
    if isinstance(axis, str):
        raise GraphError(
            f"axis {axis!r} of a convolution or pooling has no fixed size",
            hint="export the model with images of one size; only the batch may vary",
        )
    return axis
