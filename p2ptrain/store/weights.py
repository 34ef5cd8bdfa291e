"""Weights on the disk: a bundle's own, and those of single segments that a peer has fetched.

Both are safetensors files, mapped read-only: a tensor is read when it is used, and what the engine
binds as a constant stays in the file. Names are those of the manifest's tensors; a tied copy may
be there under its owner's name alone.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from p2ptrain.bundle.manifest import Manifest, Tensor
from p2ptrain.errors import BundleError, CheckpointError
from p2ptrain.store.atomic import FileWriter, sync_directory, temporary_for
from p2ptrain.store.bundles import Bundle, size_inside
from p2ptrain.training.safetensors import TensorPlace, encode_head, read_layout, tensor_digest

Array = NDArray[Any]  # Any: every dtype of a manifest

WEIGHTS_FILE: Final = "weights.safetensors"
_HINT: Final = "fetch or export the bundle again"


class Weights(Mapping[str, Array]):
    """Mapped tensors by the manifest's names; each is checked when it is first asked for.

    Asking raises BundleError when the bytes are not those of the manifest's digest, and KeyError
    for a tensor that is drawn.
    """

    def __init__(self, arrays: Mapping[str, Array], tensors: Mapping[str, Tensor]) -> None:
        self._arrays = arrays
        self._tensors = tensors
        self._checked: set[str] = set()

    def __getitem__(self, name: str) -> Array:
        array = self._arrays[name]
        if name not in self._checked:
            if tensor_digest(array) != self._tensors[name].digest:
                raise BundleError(f"the weights of {name!r} are damaged: their hash differs")
            self._checked.add(name)
        return array

    def __contains__(self, name: object) -> bool:
        return name in self._arrays

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def unchecked(self, name: str) -> Array:
        """A tensor that whoever receives it will check."""
        return self._arrays[name]


def open_weights(bundle: Bundle) -> Weights:
    """A bundle's weights; empty when all of its tensors are drawn.

    Raises:
        BundleError: the file is missing, no safetensors file, or lacks a tensor of the manifest.
    """
    manifest = bundle.manifest
    given = [tensor for tensor in manifest.tensors if tensor.digest is not None]
    if not given:
        return Weights({}, {})
    if bundle.directory is None:
        raise BundleError("the bundle came without its weights")
    path = bundle.directory / WEIGHTS_FILE
    size_inside(bundle.directory, path)
    return _weights(_map(path), given)


def keep_weights(bundle: Bundle, directory: Path) -> None:
    """Put a bundle's weights into `directory`, where the run's copy of the bundle is.

    The file is linked where the file system can do that and copied elsewhere, so a run costs no
    second copy; should someone change it later, its digests tell.

    Raises:
        CheckpointError: the disk refuses.
    """
    if bundle.directory is None or not any(t.digest for t in bundle.manifest.tensors):
        return
    source, target = bundle.directory / WEIGHTS_FILE, directory / WEIGHTS_FILE
    temporary = temporary_for(target)
    try:
        if target.exists() and source.samefile(target):
            return
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
        os.replace(temporary, target)
        sync_directory(directory)
    except OSError as error:
        raise CheckpointError(
            f"the bundle's weights cannot be stored: {error.strerror or error}",
            hint="make room on the disk, then start again",
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def needed_weights(manifest: Manifest, segment_index: int, *, resumed: bool) -> tuple[Tensor, ...]:
    """The tensors of a segment that come from the bundle's weights, parameters first.

    A checkpoint holds all but the frozen ones.
    """
    tensors = manifest.segment_tensors(segment_index) + manifest.segment_running(segment_index)
    return tuple(
        tensor
        for tensor in tensors
        if tensor.digest is not None and (tensor.binding == "frozen" or not resumed)
    )


def open_segment_weights(path: Path, tensors: Sequence[Tensor]) -> Weights | None:
    """One segment's fetched weights; None when there is no file with exactly these bytes."""
    try:
        weights = _weights(_map(path), tensors)
        for name in weights:
            weights[name]  # asking checks the digest
    except (OSError, BundleError):
        return None
    return weights


class SegmentWeightsWriter(FileWriter):
    """Writes one segment's weights as they arrive: the tensors' bytes in the order given."""

    def __init__(self, path: Path, tensors: Sequence[Tensor]) -> None:
        super().__init__(path)
        described = {tensor.name: (np.dtype(tensor.dtype), tensor.shape) for tensor in tensors}
        self.write(encode_head(described, {}))


def _map(path: Path) -> Mapping[str, Array]:
    """Every tensor of a safetensors file as a read-only view of one map of it."""
    try:
        mapped = np.memmap(path, np.uint8, "r")
        layout = read_layout(mapped.data)
    except (OSError, ValueError, CheckpointError) as error:
        reason = error.message if isinstance(error, CheckpointError) else str(error)
        raise BundleError(f"{path.name} cannot be used: {reason}", hint=_HINT) from error
    return {name: _view(mapped, place) for name, place in layout.places.items()}


def _view(mapped: Array, place: TensorPlace) -> Array:
    raw = mapped[place.start : place.start + place.nbytes]
    if place.start % place.dtype.alignment == 0:
        return raw.view(place.dtype).reshape(place.shape)
    return np.frombuffer(raw.tobytes(), place.dtype).reshape(place.shape)


def _weights(arrays: Mapping[str, Array], tensors: Sequence[Tensor]) -> Weights:
    """Exactly these tensors, by name or by their owner's; BundleError when one does not fit."""
    found: dict[str, Array] = {}
    for tensor in tensors:
        array = arrays.get(tensor.name)
        if array is None and tensor.tied_to is not None:
            array = arrays.get(tensor.tied_to)
        if array is None or array.shape != tensor.shape or array.dtype.name != tensor.dtype:
            raise BundleError(f"the weights lack {tensor.name!r} as it should be", hint=_HINT)
        found[tensor.name] = array
    return Weights(found, {tensor.name: tensor for tensor in tensors})
