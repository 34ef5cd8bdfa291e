"""The rules of CONVENTIONS and DESIGN section 12 that a machine can check."""

from __future__ import annotations

import ast
import functools
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import click
import pytest

import p2ptrain
from p2ptrain.cli.main import cli

ROOT: Final = Path(__file__).resolve().parents[2]
LIBRARY: Final = ROOT / "p2ptrain"

WORDS: Final = frozenset({"errors", "ids", "units", "limits"})
CORES: Final = frozenset({
    "agreement", "membership", "training", "planner", "schedule", "bundle", "energy", "wire",
    "trust", "recovery", "diagnosis",
})  # fmt: skip
LAYERS: Final[tuple[frozenset[str], ...]] = (
    frozenset({"__init__"}),
    WORDS,
    CORES,
    frozenset({"engine", "power", "graph"}),
    frozenset({"runtime", "net", "store", "data"}),
    frozenset({"embed", "doctor"}),
    frozenset({"demo"}),
    frozenset({"cli"}),
    frozenset({"__main__"}),
)
"""From the bottom up; a module imports from its own layer or from lower ones. `__init__` hands
the public names out lazily, so whoever imports p2ptrain itself pulls in nothing; the demo starts
peers as processes and uses the control socket, so it lies between embed and cli."""

RUNTIME_LAYERS: Final[tuple[frozenset[str], ...]] = (
    frozenset({"__init__", "config", "driver", "reports", "signal"}),
    frozenset({"compute", "device", "exchange", "journal", "reporting"}),
    frozenset({"credentials", "services"}),
    frozenset({"planning"}),
    frozenset({"home"}),
    frozenset({"keeping"}),
    frozenset({"views"}),
    frozenset({"runs"}),
    frozenset({"status"}),
    frozenset({"peer"}),
    frozenset({"control"}),
)
"""The same within the runtime; what stands in one layer knows nothing of its neighbours there."""

IMPORT_EXCEPTIONS: Final[dict[tuple[str, str], str]] = {
    ("__init__", "embed"): "the public API, imported when it is first used",
    ("__init__", "runtime"): "the public API's reports, imported when they are first used",
    ("__init__", "errors"): "the public API's errors",
    ("__init__", "training"): "the public API's optimizer settings",
}

IMPURE: Final = frozenset({
    "trio", "socket", "ssl", "threading", "time", "asyncio", "subprocess", "multiprocessing",
    "concurrent", "selectors", "signal", "pathlib", "os", "shutil", "tempfile", "secrets", "io",
    "datetime", "zeroconf", "onnxruntime", "mmap", "platform",
})  # fmt: skip
PURITY_EXCEPTIONS: Final[dict[tuple[str, str], str]] = {
    ("trust", "datetime"): "certificates carry dates; the time itself is handed in as `now`",
    ("trust", "os"): "random salts and nonces of key encryption, not files",
}

FOREIGN_HOMES: Final[dict[str, frozenset[str]]] = {
    "onnx": frozenset({"graph"}),
    "onnxscript": frozenset({"graph"}),
    "onnx_ir": frozenset({"graph"}),
    "torch": frozenset({"graph"}),
    "onnxruntime": frozenset({"engine", "graph"}),
    "zeroconf": frozenset({"net"}),
    "PIL": frozenset({"data"}),
    "tokenizers": frozenset({"data"}),
    "rich": frozenset({"cli"}),
    "click": frozenset({"cli"}),
    "msgpack": frozenset({"wire", "trust"}),
    "spake2": frozenset({"trust"}),
    "segno": frozenset({"cli"}),
}
"""Who may import what comes from outside."""

LINES_MAX: Final = 600
FUNCTION_LINES_MAX: Final = 60
COLUMNS_MAX: Final = 100
LENGTH_EXCEPTIONS: Final[dict[str, str]] = {}
"""`path` or `path:function` -> why it may be longer."""

FORBIDDEN_NAMES: Final = frozenset({"utils", "util", "helpers", "helper", "common", "manager"})
SOURCE_FOLDERS: Final = ("p2ptrain", "tests", "tools", "peers")


@dataclass(frozen=True, slots=True, kw_only=True)
class Import:
    """One import statement's target, with who says it."""

    path: Path
    line: int
    target: str

    @property
    def place(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line} imports {self.target}"


def library_files() -> list[Path]:
    return sorted(LIBRARY.rglob("*.py"))


def source_files() -> list[Path]:
    return [path for name in SOURCE_FOLDERS for path in sorted((ROOT / name).rglob("*.py"))]


def area(path: Path) -> str:
    """`p2ptrain/net/x.py` -> `net`, `p2ptrain/errors.py` -> `errors`."""
    return path.relative_to(LIBRARY).parts[0].removesuffix(".py")


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path) -> Iterator[Import]:
    """Every import of a file, also those inside functions; relative ones are not used here."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(path=path, line=node.lineno, target=alias.name)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} has a relative import"
            yield from _from_targets(path, node)


def _from_targets(path: Path, node: ast.ImportFrom) -> Iterator[Import]:
    module = node.module or ""
    for alias in node.names:
        target = f"{module}.{alias.name}" if module == "p2ptrain" else module
        yield Import(path=path, line=node.lineno, target=target)


def layer(name: str) -> int:
    found = [index for index, names in enumerate(LAYERS) if name in names]
    assert found, f"{name} is in no layer: add it to the picture of DESIGN section 12"
    return found[0]


def test_imports_point_down() -> None:
    wrong = [
        found.place
        for path in library_files()
        for found in imports(path)
        if found.target.startswith("p2ptrain.") and not _points_down(path, found.target)
    ]
    assert wrong == []


def _points_down(path: Path, target: str) -> bool:
    here, there = area(path), target.split(".")[1]
    if not (LIBRARY / there).is_dir() and not (LIBRARY / f"{there}.py").is_file():
        there = "__init__"  # a public name
        return layer(here) > layer("engine") or here in ("cli", "demo")
    return (here, there) in IMPORT_EXCEPTIONS or layer(there) <= layer(here)


def test_the_parts_of_the_runtime_import_down() -> None:
    home = LIBRARY / "runtime"
    wrong = [
        found.place
        for path in sorted(home.rglob("*.py"))
        for found in imports(path)
        if found.target.startswith("p2ptrain.runtime.")
        and not _is_below(found.target.split(".")[2], path.relative_to(home).parts[0])
    ]
    assert wrong == []


def _is_below(there: str, here: str) -> bool:
    """Whether one part of the runtime may be imported by another, or is the same."""
    layers = {part: n for n, parts in enumerate(RUNTIME_LAYERS) for part in parts}
    here = here.removesuffix(".py")
    return there == here or layers[there] < layers[here]


def test_cores_know_no_clock_file_thread_or_socket() -> None:
    wrong = [
        found.place
        for path in library_files()
        if area(path) in CORES | WORDS
        for found in imports(path)
        if (top := found.target.split(".")[0]) in IMPURE
        and (area(path), top) not in PURITY_EXCEPTIONS
    ]
    assert wrong == []


def test_cores_use_no_global_randomness() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in library_files()
        if area(path) in CORES
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "random"
        and node.attr != "Random"
    ]
    assert wrong == []


def test_foreign_packages_stay_where_they_belong() -> None:
    wrong = [
        found.place
        for path in library_files()
        for found in imports(path)
        if (home := FOREIGN_HOMES.get(found.target.split(".")[0])) is not None
        and area(path) not in home
    ]
    assert wrong == []


def test_graph_surgery_is_never_imported_by_a_peer() -> None:
    wrong = [
        found.place
        for path in library_files()
        if area(path) != "graph"
        for found in imports(path)
        if found.target.startswith("p2ptrain.graph")
    ]
    assert wrong == []


def test_exceptions_are_still_needed() -> None:
    used = {
        (area(path), found.target.split(".")[0])
        for path in library_files()
        for found in imports(path)
    }
    assert [pair for pair in PURITY_EXCEPTIONS if pair not in used] == []


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_file_is_short_and_narrow(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    name = str(path.relative_to(ROOT))
    assert len(lines) <= LINES_MAX or name in LENGTH_EXCEPTIONS
    code = [re.sub(r"\s+# (type: ignore|noqa).*", "", line) for line in lines]
    assert [n for n, line in enumerate(code, 1) if len(line) > COLUMNS_MAX] == []
    long = [
        f"{name}:{node.name}"
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or node.lineno) - _body_start(node) >= FUNCTION_LINES_MAX
    ]
    assert [place for place in long if place not in LENGTH_EXCEPTIONS] == []


def _body_start(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """The line of `def`: decorators and docstring describe a function, they are not its length."""
    if ast.get_docstring(node) is None:
        return node.lineno
    docstring = node.body[0]
    return node.lineno + (docstring.end_lineno or docstring.lineno) - docstring.lineno + 1


def test_no_file_is_named_after_nothing() -> None:
    wrong = [path for path in source_files() if path.stem.lower() in FORBIDDEN_NAMES]
    assert wrong == []


def test_every_library_module_and_public_definition_says_what_it_is() -> None:
    wrong = []
    for path in library_files():
        if path.read_text(encoding="utf-8").strip() and ast.get_docstring(tree(path)) is None:
            wrong.append(str(path.relative_to(ROOT)))
        for node in tree(path).body:
            if (
                isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
                and not node.name.startswith("_")
                and ast.get_docstring(node) is None
            ):
                wrong.append(f"{path.relative_to(ROOT)}:{node.name}")
    assert wrong == []


def test_product_code_has_no_assert_and_no_todo() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in library_files()
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Assert)
    ]
    marks = [
        str(path.relative_to(ROOT))
        for path in library_files()
        if re.search(r"\b(TODO|FIXME|XXX)\b", path.read_text(encoding="utf-8"))
    ]
    assert wrong + marks == []


def test_no_private_key_is_in_the_tree() -> None:
    needle = re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----\s+[A-Za-z0-9+/=]{20}")
    wrong = [
        str(path.relative_to(ROOT))
        for path in _tracked_files()
        if needle.search(path.read_bytes()) or path.suffix in {".key", ".p12", ".pfx"}
    ]
    assert wrong == []


def _tracked_files() -> Iterator[Path]:
    for path in sorted(ROOT.rglob("*")):
        parts = path.relative_to(ROOT).parts
        hidden = any(part.startswith(".") and part != ".ci" for part in parts)
        if path.is_file() and not hidden and "__pycache__" not in parts and parts[0] != "build":
            yield path


def test_tests_do_not_sleep() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sorted((ROOT / "tests").rglob("*.py"))
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "time.sleep"
    ]
    assert wrong == []


def commands() -> dict[str, click.Command]:
    """Every command by its full name: `p2ptrain group create`."""
    found: dict[str, click.Command] = {}
    waiting: list[tuple[str, click.Command]] = [("p2ptrain", cli)]
    while waiting:
        name, command = waiting.pop()
        if isinstance(command, click.Group):
            waiting += [(f"{name} {sub}", c) for sub, c in command.commands.items()]
        else:
            found[name] = command
    return dict(sorted(found.items()))


@pytest.mark.parametrize("name", commands())
def test_command_and_its_options_have_help(name: str) -> None:
    command = commands()[name]
    assert command.help
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{name} {parameter.opts[0]} has no help"
            assert all(opt == opt.lower() and "_" not in opt for opt in parameter.opts)


@pytest.mark.parametrize("name", commands())
def test_command_and_its_options_are_in_the_readme(name: str) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert name in readme
    options = [p.opts[0] for p in commands()[name].params if isinstance(p, click.Option)]
    missing = [o for o in options if not re.search(rf"{re.escape(o)}(?![\w-])", readme)]
    assert missing == [], f"README does not mention these options of {name}"


def test_exit_codes_are_in_the_readme() -> None:
    from p2ptrain import errors

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    codes = {
        value.exit_code
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, errors.P2PTrainError)
    }
    assert [code for code in sorted(codes) if not re.search(rf"\| *{code} *\|", readme)] == []


def test_public_names_are_exactly_all() -> None:
    assert p2ptrain.__all__
    assert list(p2ptrain.__all__) == sorted(set(p2ptrain.__all__))
    for name in p2ptrain.__all__:
        assert getattr(p2ptrain, name) is not None


def test_runtime_dependencies_are_few_and_torch_is_none_of_them() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = {re.split(r"[<>=;\[ ]", line)[0] for line in project["dependencies"]}
    assert names == {
        "trio", "numpy", "cryptography", "zeroconf", "msgpack", "rich", "click",
        "spake2",
        "onnxruntime", "onnxruntime-training-cpu",
    }  # fmt: skip
