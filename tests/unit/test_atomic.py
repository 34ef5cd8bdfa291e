"""Atomic writes: whole or not at all, with the asked mode, nothing left behind."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from p2ptrain.store.atomic import write_atomic


def test_write_atomic_joins_chunks_of_any_buffer_kind(tmp_path: Path) -> None:
    target = tmp_path / "state"
    write_atomic(target, [b"ab", bytearray(b"c"), np.arange(3, dtype="<u2"), b"", np.zeros(0)])
    assert target.read_bytes() == b"abc\x00\x00\x01\x00\x02\x00"
    assert os.listdir(tmp_path) == ["state"]


@pytest.mark.skipif(os.name != "posix", reason="modes are a POSIX matter")
@pytest.mark.parametrize("mode", [0o600, 0o644])
def test_write_atomic_sets_the_mode_whatever_the_umask(tmp_path: Path, mode: int) -> None:
    target = tmp_path / "key"
    target.write_bytes(b"old")
    target.chmod(0o666)
    before = os.umask(0o077)
    try:
        write_atomic(target, [b"new"], mode=mode)
    finally:
        os.umask(before)
    assert stat.S_IMODE(target.stat().st_mode) == mode
    assert target.read_bytes() == b"new"


def test_write_atomic_keeps_the_old_file_when_a_chunk_fails(tmp_path: Path) -> None:
    target = tmp_path / "state"
    target.write_bytes(b"old")

    def chunks() -> Iterator[bytes]:
        yield b"half"
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError, match="source broke"):
        write_atomic(target, chunks())
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["state"]


def test_write_atomic_reports_a_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_atomic(tmp_path / "absent" / "state", [b"x"])
