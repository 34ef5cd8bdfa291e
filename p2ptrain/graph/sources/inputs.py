"""What a model eats: the name, dtype and axes of each data input, and arrays that fit them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from p2ptrain.bundle.manifest import BATCH
from p2ptrain.errors import ConfigError

Array = NDArray[Any]  # Any: float32, int64 and bool

SEQUENCE: Final = "sequence"
EXAMPLE_BATCH: Final = 3
"""Samples of the microbatch that checks run on: no size that a model would have by itself."""
INPUT_DTYPES: Final = ("float32", "int64")
IDS: Final = "input_ids"
MASK: Final = "attention_mask"
TYPES: Final = "token_type_ids"


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """One data input of a model."""

    name: str
    dtype: str
    axes: tuple[str, ...]
    """`batch` first; then numbers or `sequence`."""
    high: int = 2
    """Integers lie below it: the vocabulary of ids, 2 of a mask."""
    is_padding_mask: bool = False
    """1 where a token is, 0 where a short text is filled up."""

    def shape(self, *, batch: int, sequence: int) -> tuple[int, ...]:
        """The axes as numbers."""
        sizes = {BATCH: batch, SEQUENCE: sequence}
        return tuple(sizes[axis] if axis in sizes else int(axis) for axis in self.axes)

    def example(self, generator: np.random.Generator, *, batch: int, sequence: int) -> Array:
        """An array that the model accepts; padding masks end at another token in each sample."""
        shape = self.shape(batch=batch, sequence=sequence)
        if self.is_padding_mask:
            lengths = generator.integers(min(2, sequence), sequence + 1, (batch, 1))
            return (np.arange(sequence)[None, :] < lengths).astype(self.dtype)
        if self.dtype == "int64":
            return generator.integers(0, self.high, shape)
        return generator.standard_normal(shape).astype(np.float32)


def text_inputs(names: Sequence[str], *, vocabulary: int) -> tuple[Input, ...] | None:
    """Token ids, padding mask and token types by their usual names; a lone input is ids whatever
    its name. None: there are others, or no ids."""
    ids = [name for name in names if name not in (MASK, TYPES)]
    if len(ids) != 1 or (len(names) > 1 and ids[0] not in (IDS, "ids")):
        return None
    return tuple(parse_input(f"{name}=int64:{BATCH},{SEQUENCE}", high=vocabulary) for name in names)


def parse_input(text: str, *, high: int) -> Input:
    """An input as the command line says it: `NAME=dtype:batch,3,32,32`.

    Raises:
        ConfigError: anything else; the message shows the form.
    """
    name, _, rest = text.partition("=")
    dtype, _, shape = rest.partition(":")
    axes = tuple(part.strip() for part in shape.split(",")) if shape else ()
    sound = all(axis == SEQUENCE or (axis.isdigit() and int(axis) > 0) for axis in axes[1:])
    if not name or dtype not in INPUT_DTYPES or axes[:1] != (BATCH,) or not sound:
        raise ConfigError(
            f"--input {text!r} is not NAME=DTYPE:batch,SIZE,...",
            hint=f"dtypes: {', '.join(INPUT_DTYPES)}; sizes: numbers or `sequence`",
        )
    return Input(
        name=name,
        dtype=dtype,
        axes=axes,
        high=2 if name in (MASK, TYPES) else high,
        is_padding_mask=name == MASK and axes == (BATCH, SEQUENCE),
    )
