"""Which onnxruntime is installed, whether it is intact, and the instruction-set class."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from p2ptrain.engine import build
from p2ptrain.engine.build import installation_problem, instruction_set_class, runtime_name
from p2ptrain.engine.onnxruntime_engine import import_onnxruntime
from p2ptrain.errors import EngineError

TRAINING = "onnxruntime-training-cpu"


@pytest.mark.parametrize(
    ("installed", "imported", "has_training", "problem"),
    [
        ({TRAINING: "1.19.2"}, "1.19.2", True, None),
        ({TRAINING: "1.19.2"}, "1.19.2+cpu", True, None),
        ({"onnxruntime": "1.32.0"}, "1.32.0", False, None),
        ({}, "1.17.0", False, None),
        ({TRAINING: "1.19.2", "onnxruntime": "1.32.0"}, "1.32.0", False, "both installed"),
        ({TRAINING: "1.19.2", "onnxruntime": "1.19.2"}, "1.19.2", True, "both installed"),
        ({TRAINING: "1.19.2"}, "1.32.0", False, "overwritten by onnxruntime 1.32.0"),
        ({TRAINING: "1.19.2"}, "1.19.2", False, "overwritten by another"),
        ({"onnxruntime": "1.19.2"}, "1.19.2", True, "overwritten by another"),
    ],
)
def test_installation_problem_cases(
    installed: dict[str, str], imported: str, has_training: bool, problem: str | None
) -> None:
    found = installation_problem(installed, imported_version=imported, has_training=has_training)
    assert found is None if problem is None else found is not None and problem in found


@pytest.mark.parametrize(
    ("installed", "has_training", "name"),
    [
        ({TRAINING: "1.19.2"}, True, "onnxruntime-training"),
        ({"onnxruntime": "1.32.0"}, False, "onnxruntime"),
        ({}, True, "onnxruntime-training"),
        ({}, False, "onnxruntime"),
    ],
)
def test_runtime_name_cases(installed: dict[str, str], has_training: bool, name: str) -> None:
    assert runtime_name(installed, has_training=has_training) == name


@pytest.mark.parametrize(
    ("machine", "cpuinfo", "name"),
    [
        ("x86_64", "flags\t\t: fpu sse2 avx avx2 avx512f\n", "avx512"),
        ("x86_64", "processor: 0\nflags : sse2 avx avx2\nflags : avx512f\n", "avx2"),
        ("x86_64", "flags : sse2 avx\n", "avx"),
        ("x86_64", "flags : sse2\n", "sse2"),
        ("x86_64", "", "unknown"),
        ("aarch64", "Features\t: fp asimd crc32\n", "neon"),
        ("aarch64", "flags : sse2 avx2\n", "neon"),
        ("aarch64", "", "neon"),
        ("armv7l", "Features : neon vfpv4\n", "neon"),
        ("riscv64", "", "unknown"),
    ],
)
def test_instruction_set_class_cases(machine: str, cpuinfo: str, name: str) -> None:
    assert instruction_set_class(machine, cpuinfo) == name


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise ModuleNotFoundError(\"No module named 'onnxruntime'\", name='onnxruntime')", None),
        ("from onnxruntime.capi import missing", "damaged"),
        ("raise OSError('libonnxruntime.so: cannot open')", "damaged"),
        ("", "damaged"),
    ],
)
def test_import_onnxruntime_explains_a_broken_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, message: str | None
) -> None:
    import_onnxruntime()  # so that the real modules are put back afterwards
    (tmp_path / "onnxruntime").mkdir()
    (tmp_path / "onnxruntime" / "__init__.py").write_text(body)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.startswith("onnxruntime")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(build, "installed_distributions", dict)
    with pytest.raises(EngineError, match=message or "not installed") as caught:
        import_onnxruntime.__wrapped__()
    assert "pip" in caught.value.hint
