"""No bytes make the readers of bundles do anything but read them or refuse them."""

from __future__ import annotations

import contextlib
import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from p2ptrain.bundle.graph_checks import graph_problems
from p2ptrain.bundle.onnx_reader import read_graph
from p2ptrain.bundle.reading import parse_manifest
from p2ptrain.errors import BundleError
from p2ptrain.ids import Digest
from p2ptrain.store.bundles import find_bundle, load_bundle
from tests.bundles import graph_files, tiny_bundle

SHIPPED = load_bundle(find_bundle("gpt-nano"))
GRAPHS = sorted(graph_files(SHIPPED).items())
TINY = json.loads(tiny_bundle(blocks=2).manifest_bytes)
JSON_VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4),
    st.sampled_from(["batch", "batch*sequence", "\u00b2", "block", "frozen", "../x"]),
    st.lists(st.integers(-1, 1 << 40), max_size=4),
)  # fmt: skip


def read(content: bytes) -> None:
    with contextlib.suppress(BundleError):
        read_graph(content)


@given(st.binary(max_size=400))
def test_any_bytes_are_read_or_refused(content: bytes) -> None:
    read(content)


@given(st.lists(st.tuples(st.integers(0, 30), st.sampled_from([0, 1, 2, 5, 3]), st.binary())))
def test_any_fields_are_read_or_refused(fields: list[tuple[int, int, bytes]]) -> None:
    message = b"".join(
        bytes([(number << 3 | wire) & 0x7F, len(payload) & 0x7F]) + payload
        for number, wire, payload in fields
    )
    read(message)
    read(b"\x3a" + bytes([len(message) & 0x7F]) + message)


@settings(max_examples=400)
@given(
    st.sampled_from(GRAPHS),
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=4),
    st.floats(0, 1),
    st.booleans(),
)
def test_damaged_graphs_are_read_or_refused(
    graph: tuple[Digest, bytes], changes: list[tuple[float, int]], cut: float, is_cut: bool
) -> None:
    digest, content = graph
    damaged = bytearray(content)
    for place, byte in changes:
        damaged[int(place * (len(damaged) - 1))] = byte
    if is_cut:
        del damaged[int(cut * len(damaged)) :]
    list(graph_problems(SHIPPED.manifest, digest, bytes(damaged)))


def test_graphs_as_they_are_have_no_problems() -> None:
    for digest, content in GRAPHS:
        assert list(graph_problems(SHIPPED.manifest, digest, content)) == []


def _leaves(value: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Every place of a JSON document (Any: JSON)."""
    found = [path] if path else []
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            found += _leaves(item, (*path, key))
    return found


@settings(max_examples=400)
@given(st.lists(st.tuples(st.sampled_from(_leaves(TINY)), JSON_VALUES), min_size=1, max_size=2))
def test_changed_manifests_are_read_or_refused(
    changes: list[tuple[tuple[str | int, ...], object]],
) -> None:
    document = json.loads(json.dumps(TINY))
    for path, value in changes:
        place: Any = document  # Any: JSON
        with contextlib.suppress(KeyError, IndexError, TypeError):
            for step in path[:-1]:
                place = place[step]
            place[path[-1]] = value
    with contextlib.suppress(BundleError):
        parse_manifest(json.dumps(document).encode())
