"""Models of every data kind as manifests only: what a reader of data needs to know of them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from p2ptrain.bundle.manifest import DataSection, Loss, Manifest, Port, Symbol, Value
from p2ptrain.data.opening import OpenData, open_samples
from p2ptrain.data.options import DataOptions
from tests.bundles import tiny_bundle

CONTEXT = 8
Shape = tuple[str, ...]
TOKENS: Mapping[str, tuple[Shape, str]] = {"input_ids": (("sequence",), "int64")}


def manifest_for(
    kind: str,
    *,
    inputs: Mapping[str, tuple[Shape, str]] = TOKENS,
    labels: tuple[Shape, str] = ((), "int64"),
    loss: str = "cross-entropy",
    **data: object,
) -> Manifest:
    """A manifest with these ports; `data` are fields of its data section."""
    whole = tiny_bundle(blocks=1).manifest
    ports = tuple(_port(name, *described, "data") for name, described in inputs.items())
    last = whole.kinds["head"]
    kept = tuple(port for port in last.inputs if port.role != "labels")
    kinds = {
        "embed": dataclasses.replace(whole.kinds["embed"], inputs=ports),
        "block": whole.kinds["block"],
        "head": dataclasses.replace(last, inputs=(*kept, _port("labels", *labels, "labels"))),
    }
    symbols = {**whole.symbols, "sequence": Symbol(size=CONTEXT, kind="sequence")}
    section = DataSection(kind=kind, sampling="philox-1", **data)  # type: ignore[arg-type]  # by name
    return dataclasses.replace(
        whole, kinds=kinds, symbols=symbols, data=section, loss=Loss(kind=loss)
    )


def _port(name: str, shape: Shape, dtype: str, role: str) -> Port:
    value = Value(name=name, shape=("batch", *shape), dtype=dtype)
    return Port(value=value, role=role, differentiable=False)


def text_model(kind: str = "texts", **changes: object) -> Manifest:
    """Byte tokens, three classes without names, unless changed."""
    per_token = kind in ("windows", "masked-windows", "words")
    given: dict[str, object] = {
        "labels": (("sequence",) if per_token else (), "int64"),
        "tokenizer": "bytes", "vocabulary": 256, "context": CONTEXT,
        "classes": 0 if "windows" in kind else 3,
    }  # fmt: skip
    return manifest_for(kind, **{**given, **changes})  # type: ignore[arg-type]  # by name


def opened(
    manifest: Manifest,
    path: Path,
    *,
    heldout: Path | None = None,
    bundle: Path | None = None,
    minibatch_size: int = 4,
    **options: str,
) -> OpenData:
    """Open a path as `train` does; the cache lies beside it."""
    return open_samples(
        manifest,
        bundle if bundle is not None else path.parent,
        str(path),
        None if heldout is None else str(heldout),
        DataOptions(**options),
        path.parent / "cache",
        minibatch_size=minibatch_size,
    )


def write_lines(path: Path, records: Iterable[object]) -> Path:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path
