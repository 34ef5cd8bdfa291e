"""Labels as the labels port wants them: classes by name or number, or plain numbers.

C classes of a classification.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from p2ptrain.bundle.manifest import Manifest
from p2ptrain.errors import DataError

Array = NDArray[Any]  # Any: the labels port's dtype
FLOAT32_MAX: Final = float(np.finfo(np.float32).max)
_NAMES_SHOWN: Final = 8


class LabelRule:
    """Turns a value of the data into the label of one sample or token."""

    def __init__(self, manifest: Manifest, class_names: tuple[str, ...]) -> None:
        value = manifest.labels_port.value
        self._shape = manifest.shape(value, batch=1)[1:]
        self._dtype = np.dtype(value.dtype)
        self._classes = manifest.data.classes
        self.class_names = class_names
        self._numbers = {name: index for index, name in enumerate(class_names)}

    @property
    def is_class(self) -> bool:
        """Whether labels are classes, by name or number, and not measured values."""
        return self._classes > 0

    def sample(self, value: object) -> Array:
        """The label of one sample, of the port's dtype and shape without its batch axis.

        Raises:
            ValueError: says what is wrong with the value; the caller adds the place.
        """
        if isinstance(value, list):
            return self._vector(value)
        if not self.is_class:
            return self._filled(number(value))
        label = self.class_index(value)
        if self._dtype.kind == "f" and self._shape == (self._classes,) and self._classes > 1:
            hot = np.zeros(self._shape, self._dtype)
            hot[label] = 1
            return hot
        return self._filled(label)

    def class_index(self, value: object) -> int:
        """0 to C - 1; ValueError as above."""
        if isinstance(value, str) and value in self._numbers:
            return self._numbers[value]
        index = whole_number(value)
        if index is None:
            raise ValueError(f"label {value!r:.60} is not one of the {self._wanted()}")
        if not 0 <= index < self._classes:
            raise ValueError(f"label {index} is out of range; the model has the {self._wanted()}")
        return index

    def _wanted(self) -> str:
        if self.class_names:
            return f"classes {listed(self.class_names)}"
        return f"classes 0 to {self._classes - 1}"

    def _vector(self, values: list[object]) -> Array:
        if self._shape != (len(values),):
            raise ValueError(
                f"a label of {len(values)} values where the model wants shape {self._shape}"
            )
        return np.array([number(value) for value in values]).astype(self._dtype)

    def _filled(self, value: float) -> Array:
        if math.prod(self._shape) != 1:
            raise ValueError(f"one value where the model wants labels of shape {self._shape}")
        return np.full(self._shape, value, self._dtype)


def whole_number(value: object) -> int | None:
    """An integer, or text of digits; None for anything else."""
    if isinstance(value, int):
        return int(value)
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            return None
    return None


def number(value: object) -> float:
    """A finite number, or text of one; ValueError says what it is instead."""
    try:
        found = float(value) if isinstance(value, int | float | str) else math.nan
    except ValueError:
        found = math.nan
    if not abs(found) <= FLOAT32_MAX:
        raise ValueError(f"{value!r:.60} is not a finite float32 number")
    return found


def infer_class_names(
    values: Iterable[object], manifest: Manifest, *, what: str
) -> tuple[str, ...]:
    """Class names of a bundle that has none: the data's distinct labels, sorted, if they are words.

    The first label decides whether labels are words or numbers.

    Raises:
        DataError: there are not as many words as classes; names `what`, the file.
    """
    classes = manifest.data.classes
    found: set[str] = set()
    for value in values:
        if not isinstance(value, str) or (not found and whole_number(value) is not None):
            return ()
        found.add(value)
        if len(found) > classes:
            break
    if len(found) != classes:
        more = "more than " if len(found) > classes else ""
        count = min(len(found), classes)
        raise DataError(
            f"{what}: {more}{count} different labels ({listed(sorted(found))}); the model has"
            f" {classes} classes",
            hint="export the model with as many classes, or give labels as numbers",
        )
    return tuple(sorted(found))


def listed(names: Iterable[str]) -> str:
    """`a, b, c ...` of at most a few names."""
    shown = list(names)
    return ", ".join(shown[:_NAMES_SHOWN]) + (" ..." if len(shown) > _NAMES_SHOWN else "")
