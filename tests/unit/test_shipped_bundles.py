"""Every committed bundle is whole, small, drawable, checked, described and part of the wheel."""

from __future__ import annotations

import hashlib
import tomllib
from pathlib import Path

import pytest

from p2ptrain.bundle.manifest import Manifest
from p2ptrain.bundle.reading import parse_manifest
from p2ptrain.training.random import parameters_digest

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "onnx_models"
NAMES = sorted(path.parent.name for path in MODELS.glob("*/manifest.json"))
BUNDLE_BYTES_MAX = 1_200_000
PARAMETERS_MAX = 4_000_000


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture
def manifest(name: str) -> Manifest:
    return parse_manifest((MODELS / name / "manifest.json").read_bytes())


def test_bundle_files_are_those_the_manifest_names(name: str, manifest: Manifest) -> None:
    found = {path.stem: path.read_bytes() for path in (MODELS / name / "graphs").iterdir()}
    assert {d: hashlib.sha256(c).hexdigest() for d, c in found.items()} == {d: d for d in found}
    assert {d: len(c) for d, c in found.items()} == {
        d: graph.bytes for d, graph in manifest.graphs.items()
    }


def test_bundle_is_small_and_has_no_weights(name: str, manifest: Manifest) -> None:
    files = [path for path in (MODELS / name).rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".json", ".onnx", ".md"}
    assert sum(path.stat().st_size for path in files) < BUNDLE_BYTES_MAX
    assert manifest.weights is None
    assert 0 < manifest.parameter_count < PARAMETERS_MAX


def test_bundle_parameters_are_drawn_with_the_golden_bits(manifest: Manifest) -> None:
    assert parameters_digest(manifest, 0) == manifest.golden_parameters
    assert parameters_digest(manifest, 1) != manifest.golden_parameters


def test_bundle_was_checked_against_torch(manifest: Manifest) -> None:
    assert {"adamw, 3 steps", "sgd, 3 steps", "evaluation loss", "inference logits"} < set(
        manifest.checks
    )
    exact = {name: error for name, error in manifest.checks.items() if "float64" in name}
    if exact:  # float32 shows too little of such a model, in torch as here
        assert max(exact.values()) <= 1e-9
        assert {name.partition(" (")[0] for name in exact} >= {"loss", "gradients"}
        return
    assert all(0.0 <= error <= 1e-5 for error in manifest.checks.values())
    losses = [error for name, error in manifest.checks.items() if name.startswith("loss")]
    assert losses
    assert max(losses) <= 1e-6


SHARDED = {
    "bert-mini": ({"attention": 4, "mlp": 1024, "head": 256}, 128),
    "gpt-nano": ({"attention": 6, "mlp": 768}, 128),
    "llama-nano": ({"attention": 3, "mlp": 512}, 128),
    "vit-tiny": ({"attention": 4, "mlp": 512}, 0),
}
"""Units by kind under tensor sharding, and positions of every kind under sequence sharding."""


def test_bundle_says_how_it_is_sharded_or_why_not(name: str, manifest: Manifest) -> None:
    units, positions = SHARDED.get(name, ({}, 0))
    tensor, sequence = manifest.sharding["tensor"], manifest.sharding["sequence"]
    assert {kind: [units[kind]] for kind in units} == {
        kind: list(manifest.units(sharded).values()) for kind, sharded in tensor.kinds.items()
    }
    assert set(tensor.whole) == set(manifest.kinds) - set(units)
    assert set(sequence.kinds) == set(manifest.kinds if positions else ())
    for sharded in sequence.kinds.values():
        assert manifest.units(sharded) == {"positions": positions}


def test_bundle_has_its_name_a_description_and_a_section(name: str, manifest: Manifest) -> None:
    assert manifest.name == name
    assert manifest.description
    assert f"\n## {name}\n" in (MODELS / "README.md").read_text(encoding="utf-8")


def test_wheel_holds_every_bundle() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    included = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert included == {f"onnx_models/{name}": f"p2ptrain/bundles/{name}" for name in NAMES}
