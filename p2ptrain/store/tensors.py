"""Tensor files on the disk, in the safetensors format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from p2ptrain.errors import CheckpointError, NotFound
from p2ptrain.store.atomic import write_atomic
from p2ptrain.training.safetensors import Array, TensorFile, decode_tensors, encode_tensors


def write_tensors(
    path: Path, tensors: Mapping[str, Array], metadata: Mapping[str, str], mode: int = 0o644
) -> None:
    """Write named tensors, atomically and fsynced; OSError when the disk refuses."""
    write_atomic(path, encode_tensors(tensors, metadata), mode)


def read_tensors(path: Path) -> TensorFile:
    """Read named tensors.

    Raises:
        NotFound: there is no such file.
        CheckpointError: it cannot be read, or is not a whole safetensors file.
    """
    return decode_tensors(read_file(path))


def read_file(path: Path) -> bytes:
    """All bytes of a state file; NotFound and CheckpointError as `read_tensors`."""
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise NotFound(f"there is no file {path}") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
