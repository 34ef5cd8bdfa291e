"""Bundles are hostile until checked: each bad one is refused before onnxruntime is imported."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NoReturn

import onnx
import pytest

from p2ptrain import limits
from p2ptrain.bundle.contradictions import contradictions
from p2ptrain.bundle.graph_checks import graph_problems
from p2ptrain.bundle.reading import check_manifest, decode_manifest, parse_manifest
from p2ptrain.engine import onnxruntime_engine
from p2ptrain.errors import BundleError
from p2ptrain.ids import Digest, RunId
from p2ptrain.runtime.planning.job import TrainRequest, open_job
from p2ptrain.store.bundles import Bundle, bundle_from_parts, load_bundle
from tests.bundles import graph_files, tiny_bundle
from tests.hostile import GRAPHS, MANIFESTS, Change, Parts, changed_by, node, parts_of, setting
from tests.parted_bundle import parted_bundle

CASES = GRAPHS | MANIFESTS


@pytest.fixture(scope="module")
def tiny() -> Bundle:
    return tiny_bundle(blocks=2)


@pytest.fixture
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test when anything would be compiled."""

    def refuse() -> NoReturn:
        pytest.fail("onnxruntime was asked for")

    monkeypatch.setattr(onnxruntime_engine, "import_onnxruntime", refuse)


def test_the_bundle_that_is_changed_is_sound(tiny: Bundle, tmp_path: Path) -> None:
    parts = parts_of(tiny)
    bundle_from_parts(parts.manifest_bytes, parts.graphs)
    load_bundle(parts.write(tmp_path / "b")).check()


@pytest.mark.parametrize("case", CASES)
def test_bad_bundle_over_the_wire_is_refused(case: str, tiny: Bundle) -> None:
    change, said = CASES[case]
    parts = changed_by(tiny, change)
    with pytest.raises(BundleError, match=said):
        bundle_from_parts(parts.manifest_bytes, parts.graphs)


@pytest.mark.parametrize("case", CASES)
def test_bad_bundle_on_disk_is_refused_before_a_run_compiles_it(
    case: str, tiny: Bundle, tmp_path: Path, no_engine: None
) -> None:
    change, said = CASES[case]
    directory = changed_by(tiny, change).write(tmp_path / "b")
    (tmp_path / "text").write_text("words " * 100)
    request = TrainRequest(bundle=str(directory), data=str(tmp_path / "text"), steps=1)
    with pytest.raises(BundleError, match=said):
        open_job(request, runs_path=tmp_path, new_run=RunId("r" * 26), default_threads=1)


def test_graph_that_two_parts_share_must_fit_both(tiny: Bundle) -> None:
    def share(parts: Parts) -> None:
        unused = parts.digest("embed", "backward")
        parts.manifest["kinds"]["embed"]["forms"]["portable"]["backward"] = parts.digest(
            "block", "backward"
        )
        del parts.manifest["graphs"][unused], parts.graphs[unused]

    parts = changed_by(tiny, share)
    with pytest.raises(BundleError, match="backward graph of kind 'embed'"):
        bundle_from_parts(parts.manifest_bytes, parts.graphs)


def _frozen_blocks(*, declared: bool) -> Change:
    """Freeze `w` of the block segments, as an exporter does: graphs read it undeclared."""

    def change(parts: Parts) -> None:
        for tensor in parts.manifest["tensors"]:
            if tensor["name"].endswith(".w"):
                tensor["binding"] = "frozen"
        if declared:
            return
        for which in ("forward", "backward"):
            parts.edit_graph(parts.digest("block", which), _without_w)

    return change


def _without_w(model: onnx.ModelProto) -> None:
    graph = model.graph
    for values in (graph.input, graph.output):
        for value in [v for v in values if v.name in ("w", "gradient.w")]:
            values.remove(value)


def test_frozen_parameter_is_read_without_being_declared(tiny: Bundle) -> None:
    parts = changed_by(tiny, _frozen_blocks(declared=False))
    bundle_from_parts(parts.manifest_bytes, parts.graphs)
    parts = changed_by(tiny, _frozen_blocks(declared=True))
    with pytest.raises(BundleError, match="'w' is not in the manifest"):
        bundle_from_parts(parts.manifest_bytes, parts.graphs)


def _gradient_kernel(form: str) -> Change:
    """Give the blocks a training form, and one of the two forms another forward graph."""

    def change(parts: Parts) -> None:
        plain = parts.digest("block", "forward")
        model = onnx.load_model_from_string(parts.graphs[plain])
        node("GatherGrad", "x", domain="com.microsoft")(model)
        content = model.SerializeToString()
        digest = Digest(hashlib.sha256(content).hexdigest())
        parts.graphs[digest] = content
        parts.manifest["graphs"][digest] = {
            **parts.manifest["graphs"][plain], "bytes": len(content),
        }  # fmt: skip
        forms = parts.manifest["kinds"]["block"]["forms"]
        forms["training"] = dict(forms["portable"])
        forms[form]["forward"] = digest

    return change


def test_training_form_alone_may_use_gradient_kernels(tiny: Bundle) -> None:
    parts = changed_by(tiny, _gradient_kernel("training"))
    bundle_from_parts(parts.manifest_bytes, parts.graphs)
    parts = changed_by(tiny, _gradient_kernel("portable"))
    with pytest.raises(BundleError, match=r"'com.microsoft.GatherGrad' is not allowed"):
        bundle_from_parts(parts.manifest_bytes, parts.graphs)


def _swap_parts(parts: Parts) -> None:
    both = parts.manifest["kinds"]["block"]["forms"]["portable"]["parts"]
    both["cotangents"], both["gradients"] = both["gradients"], both["cotangents"]


def _name_kept_as_stash(parts: Parts) -> None:
    pair = parts.manifest["kinds"]["block"]["forms"]["portable"]
    pair["parts"]["kept"][0]["name"] = pair["stash"][0]["name"]


def _forget_kept(parts: Parts) -> None:
    parts.manifest["kinds"]["block"]["forms"]["portable"]["parts"]["kept"] = []


def _point_nowhere(parts: Parts) -> None:
    parts.manifest["kinds"]["block"]["forms"]["portable"]["parts"]["gradients"] = "0" * 64


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_swap_parts, "graph of kind 'block', portable form: its output .* is not in the manifest"),
        (_name_kept_as_stash, "kind 'block' has two values 'h'"),
        (_forget_kept, "its output 'kept_0' is not in the manifest"),
        (_point_nowhere, "is referred to but not listed"),
    ],
)
def test_parts_of_a_backward_are_held_against_the_manifest(
    tiny: Bundle, change: Change, said: str
) -> None:
    parted = parted_bundle(tiny)
    assert bundle_from_parts(parted.manifest_bytes, graph_files(parted)).digest == parted.digest
    parts = changed_by(parted, change)
    with pytest.raises(BundleError, match=said):
        bundle_from_parts(parts.manifest_bytes, parts.graphs)


def test_all_problems_are_listed(tiny: Bundle) -> None:
    def change(parts: Parts) -> None:
        setting("checks", value={"a": float("inf")})(parts)
        setting("name", value="../up")(parts)

    content = changed_by(tiny, change).manifest_bytes
    manifest = decode_manifest(content)
    assert [str(problem) for problem in contradictions(manifest)] == [
        "'../up' is not a name",
        "check 'a' found an error of inf",
    ]
    with pytest.raises(BundleError, match="is not a name"):
        check_manifest(manifest)
    parts = changed_by(tiny, GRAPHS["an unknown input"][0])
    manifest = parse_manifest(parts.manifest_bytes)
    digest = parts.digest("block", "forward")
    where = "forward graph of kind 'block', portable form"
    assert list(graph_problems(manifest, digest, parts.graphs[digest])) == [
        f"{where}: its input 'z' is not in the manifest",
        f"{where}: node 'Add' reads 'x' before anything defines it",
    ]


def test_manifest_over_the_limit_is_not_parsed() -> None:
    with pytest.raises(BundleError, match="over the limit"):
        parse_manifest(b"[" * (limits.MANIFEST_BYTES_MAX + 1))
