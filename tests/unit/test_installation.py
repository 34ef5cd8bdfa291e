"""Installed files against their RECORD: what a second package overwrote is found."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

from p2ptrain.engine.installation import installed_runtimes

FILES = {
    "onnxruntime/__init__.py": b"__version__ = '1.20.1'\n",
    "onnxruntime/capi/state.so": b"\x7fELF" * 1000,
}


def install(site: Path, name: str, version: str) -> None:
    """A distribution with two files, as pip leaves it."""
    records = []
    for file, content in FILES.items():
        path = site / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content + name.encode())
        digest = base64.urlsafe_b64encode(hashlib.sha256(path.read_bytes()).digest()).rstrip(b"=")
        records.append(f"{file},sha256={digest.decode()},{path.stat().st_size}")
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "RECORD").write_text("\n".join([*records, f"{info.name}/RECORD,,"]) + "\n")


def test_intact_installation_has_no_changed_file(tmp_path: Path) -> None:
    install(tmp_path, "onnxruntime", "1.20.1")
    (found,) = installed_runtimes([str(tmp_path)])
    assert (found.name, found.version, found.changed) == ("onnxruntime", "1.20.1", ())


def test_second_package_shows_in_the_first_ones_record(tmp_path: Path) -> None:
    install(tmp_path, "onnxruntime-training-cpu", "1.19.2")
    install(tmp_path, "onnxruntime", "1.20.1")
    found = {each.name: each.changed for each in installed_runtimes([str(tmp_path)])}
    assert found == {"onnxruntime-training-cpu": tuple(FILES), "onnxruntime": ()}


def test_missing_and_damaged_files_are_found(tmp_path: Path) -> None:
    install(tmp_path, "onnxruntime", "1.20.1")
    (tmp_path / "onnxruntime/__init__.py").unlink()
    assert installed_runtimes([str(tmp_path)])[0].changed == ("onnxruntime/__init__.py",)
    library = tmp_path / "onnxruntime/capi/state.so"
    library.write_bytes(library.read_bytes()[:-1] + b"?")
    assert installed_runtimes([str(tmp_path)])[0].changed == tuple(FILES)


def test_nothing_installed_is_nothing(tmp_path: Path) -> None:
    assert installed_runtimes([str(tmp_path)]) == ()
