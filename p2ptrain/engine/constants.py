"""Where the constants of a graph come from: their place in a file, or memory.

Measured with a 64 MiB matrix that a MatMul reads, on onnxruntime-training 1.19.2 and onnxruntime
1.32, in anonymous memory beyond what the process had: as raw bytes inside the model 192 and
128 MiB, as an array handed over 128 and 64 MiB, by its place in a file 64 MiB on both, all of it
the copy that the kernel packed for itself (without packing: nothing). So a mapped array goes by
its place, and the runtime maps the file again; the pages are the same.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from p2ptrain.bundle.protobuf import ExternalInitialiser
from p2ptrain.engine.contract import Array

IN_MEMORY: Final = "in-memory"
"""Stands for the file of a constant that is handed over as an array; never opened."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundConstants:
    """The constants of one program."""

    externals: tuple[ExternalInitialiser, ...]
    """Every constant, as the graph declares it."""
    folder: str | None
    """Of the files; None when all are in memory."""
    arrays: dict[str, Array]
    """Those that are handed over, contiguous."""
    kept: tuple[Array, ...]
    """Keeps the callers' arrays and their addresses alive: they are the program's identity."""


@dataclass(frozen=True, slots=True)
class _FilePlace:
    folder: str
    file_name: str
    offset: int


def constants_key(constants: Mapping[str, Array]) -> object:
    """Equal for the same arrays under the same names, as long as they live."""
    return tuple(
        (name, int(array.ctypes.data), array.shape, array.dtype.str)
        for name, array in sorted(constants.items())
    )


def bind_constants(constants: Mapping[str, Array], *, absolute: bool) -> BoundConstants:
    """Find each constant's file; those of any second folder are handed over as arrays.

    Args:
        constants: By the graph's names.
        absolute: Name files by their whole path: onnxruntime 1.19 knows no folder, and later
            releases refuse such names.
    """
    folder: str | None = None
    externals: list[ExternalInitialiser] = []
    arrays: dict[str, Array] = {}
    for name, array in constants.items():
        place = file_place(array)
        if place is None or folder not in (None, place.folder):
            arrays[name] = np.ascontiguousarray(array)
            place = _FilePlace("", IN_MEMORY, 0)
        else:
            folder = place.folder
        file = os.path.join(place.folder, place.file_name) if absolute else place.file_name
        externals.append(
            ExternalInitialiser(name=name, array=array, file_name=file, offset=place.offset)
        )
    return BoundConstants(
        externals=tuple(externals),
        folder=folder,
        arrays=arrays,
        kept=tuple(constants.values()),
    )


def file_place(array: Array) -> _FilePlace | None:
    """Where a view of a read-only `numpy.memmap` lies in its file; None for other arrays."""
    if array.flags.writeable or not array.flags.c_contiguous or array.size == 0:
        return None
    root = _mapping(array)
    if root is None or root.filename is None:
        return None
    start = int(array.ctypes.data) - int(root.ctypes.data)
    if start < 0 or start + array.nbytes > root.nbytes:
        return None
    path = os.path.realpath(root.filename)
    return _FilePlace(os.path.dirname(path), os.path.basename(path), root.offset + start)


def _mapping(array: Array) -> np.memmap[Any, Any] | None:  # Any: the element type is data
    """The outermost map that an array is a view of: only its offset is that of the file."""
    found: np.memmap[Any, Any] | None = None  # Any: as above
    base: object = array
    while isinstance(base, np.ndarray):
        if isinstance(base, np.memmap):
            found = base
        base = base.base
    return found
