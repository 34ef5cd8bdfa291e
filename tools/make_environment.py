"""Make the virtual environments of this repository, and do nothing where they are up to date.

    python tools/make_environment.py demo runtime export stock stock-3.13

Prints one line per environment that it made: seconds, name, folder. Needs only Python 3.11's
standard library. A stamp in each environment holds what it was made from.

    .venv             the product as it is installed, with onnxruntime-training where it exists
    .venv-export      the same with torch, for the exporter
    .venv-stock       the product as a wheel, with stock onnxruntime in place of the training one
    .venv-stock-3.13  that on Python 3.13; skipped with a note where there is none
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import subprocess
import sys
import threading
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[1]
RECIPE: Final = 1
STAMP: Final = "p2ptrain.stamp"
AT_ONCE: Final = 2
BUILDING: Final = threading.Lock()
"""Builds of the project write into its own folder: one at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How one environment is made."""

    folder: str
    python: str
    """Version that it needs: 3.11 or 3.13."""
    extras: tuple[str, ...] = ()
    is_stock: bool = False
    is_optional: bool = False


RECIPES: Final = {
    "demo": Recipe(folder=".venv", python="3.11"),
    "runtime": Recipe(folder=".venv", python="3.11", extras=("test", "lint")),
    "export": Recipe(folder=".venv-export", python="3.11", extras=("export", "test")),
    "stock": Recipe(folder=".venv-stock", python="3.11", extras=("test",), is_stock=True),
    "stock-3.13": Recipe(
        folder=".venv-stock-3.13",
        python="3.13",
        extras=("test",),
        is_stock=True,
        is_optional=True,
    ),
}


def main() -> int:
    """Make what the command line names; 0 when everything is there."""
    parser = argparse.ArgumentParser(description="make virtual environments")
    parser.add_argument("names", nargs="+", choices=sorted(RECIPES))
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return 0 if all(list(pool.map(is_made, parser.parse_args().names))) else 1


def is_made(name: str) -> bool:
    """Make one environment; False, after saying why, when that failed."""
    try:
        make(name, RECIPES[name])
    except subprocess.CalledProcessError as error:
        print(f"make_environment: {name} failed: {' '.join(map(str, error.cmd))}", flush=True)
        return False
    return True


def make(name: str, recipe: Recipe) -> None:
    """Make one environment unless its stamp says that it is what the recipe asks for.

    Raises:
        subprocess.CalledProcessError: pip or venv failed, and has said why.
        SystemExit: there is no interpreter for it; the message says which one it needs.
    """
    folder = ROOT / recipe.folder
    stamp = stamp_of(recipe)
    found = read_stamp(folder)
    if found is not None and stamp <= found:
        install_wheel(folder, recipe)
        return
    interpreter = find_python(recipe.python)
    if interpreter is None:
        if recipe.is_optional:
            print(f"make_environment: no Python {recipe.python} here, so no {name}", flush=True)
            return
        raise SystemExit(f"make_environment: {name} needs Python {recipe.python}")
    started_s = time.monotonic()
    print(f"make_environment: making {recipe.folder}, this takes a minute or two", flush=True)
    make_venv(interpreter, folder)
    install(folder, recipe)
    (folder / STAMP).write_text("\n".join(sorted(stamp | (found or frozenset()))))
    print(f"make_environment: {recipe.folder} in {time.monotonic() - started_s:.0f} s", flush=True)


def stamp_of(recipe: Recipe) -> frozenset[str]:
    """What the environment is made from: one line per requirement, so that more is enough too."""
    project = read_project()
    lines = set(requirements(project, recipe))
    scripts = hashlib.sha256(repr(sorted(project.get("scripts", {}).items())).encode())
    return frozenset({f"recipe {RECIPE}", f"scripts {scripts.hexdigest()[:16]}", *lines})


def read_stamp(folder: Path) -> frozenset[str] | None:
    """The stamp of an environment that works; None when it has to be made."""
    try:
        lines = (folder / STAMP).read_text().splitlines()
        subprocess.run([python_of(folder), "-c", ""], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return frozenset(lines)


def find_python(version: str) -> str | None:
    """An interpreter that runs: this one, one on the path, or one of pyenv; newer than 3.11 is
    accepted for 3.11, but not 3.13, which the training runtime does not support."""
    wanted = [version] if version != "3.11" else ["3.11", "3.12"]
    for each in wanted:
        places = [sys.executable, f"python{each}", "python3"]
        versions = Path.home() / ".pyenv" / "versions"
        places += [str(path) for path in sorted(versions.glob(f"{each}*/bin/python"))]
        for place in places:
            if python_version(place) == each:
                return place
    return sys.executable if version == "3.11" else None


def python_version(interpreter: str) -> str | None:
    """`3.11` for an interpreter that starts (a shim of pyenv may not), otherwise None."""
    code = "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2])"
    try:
        ran = subprocess.run(
            [interpreter, "-c", code], capture_output=True, text=True, check=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return ran.stdout.strip()


def make_venv(interpreter: str, folder: Path) -> None:
    """A fresh environment; one that is there and runs is kept, so that packages are reused."""
    if python_version(str(python_of(folder))) is None:
        subprocess.run([interpreter, "-m", "venv", "--clear", folder], check=True)


def install(folder: Path, recipe: Recipe) -> None:
    """Install dependencies and the project: editable, or, in a stock environment, as a wheel."""
    pip(folder, *requirements(read_project(), recipe))
    if recipe.is_stock:
        install_wheel(folder, recipe)
        return
    with BUILDING:
        pip(folder, "--no-deps", "-e", str(ROOT))


def install_wheel(folder: Path, recipe: Recipe) -> None:
    """Build and install the present sources; their runtime is already there."""
    if recipe.is_stock:
        with BUILDING:
            pip(folder, "--no-deps", "--force-reinstall", str(ROOT))


def requirements(project: dict[str, Any], recipe: Recipe) -> list[str]:  # Any: TOML values
    """The requirement lines of a recipe; a stock one swaps the runtime, whatever the machine."""
    lines = list(project["dependencies"])
    for extra in recipe.extras:
        lines += project["optional-dependencies"][extra]
    if not recipe.is_stock:
        return lines
    others = [line for line in lines if not re.match(r"onnxruntime(-training-cpu)?\b", line)]
    (stock,) = (line for line in lines if re.match(r"onnxruntime\b(?!-)", line))
    return [*others, stock.partition(";")[0]]


def read_project() -> dict[str, Any]:  # Any: TOML values
    """The [project] table of pyproject.toml."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        document = tomllib.load(file)
    project: dict[str, Any] = document["project"]  # Any: TOML values
    return project


def pip(folder: Path, *arguments: str) -> None:
    """`pip install`, quietly; CalledProcessError when it fails, after pip has said why.

    Bytecode is left to the first import: half of the time went into modules that nobody imports.
    """
    line = [python_of(folder), "-m", "pip", "install", "--quiet", "--quiet", "--no-input"]
    line += ["--disable-pip-version-check", "--no-warn-script-location", "--no-compile"]
    subprocess.run([*line, *arguments], check=True, cwd=ROOT)


def python_of(folder: Path) -> Path:
    """The interpreter of an environment."""
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


if __name__ == "__main__":
    sys.exit(main())
