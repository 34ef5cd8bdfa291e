"""A segment's saved state: round trip, digests, and what is refused."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np
import pytest

from p2ptrain.errors import CheckpointError
from p2ptrain.ids import Digest
from p2ptrain.store.bundles import Bundle
from p2ptrain.training.safetensors import decode_tensors, encode_tensors
from p2ptrain.training.segment_state import (
    SegmentState,
    StateHeader,
    StoredSegment,
    read_segment_state,
    state_digest,
)
from tests.bundles import WIDTH, tiny_bundle
from tests.varied_bundle import varied_bundle


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return tiny_bundle(blocks=1)


def made_state() -> SegmentState:
    shapes = {"block0.w": (WIDTH, WIDTH), "block0.b": (WIDTH,)}
    generator = np.random.default_rng(2)

    def draw() -> dict[str, np.ndarray]:
        return {name: generator.standard_normal(s, np.float32) for name, s in shapes.items()}

    return SegmentState(tensors=draw(), state={"m": draw(), "v": draw()}, step=12)


def header(of: Bundle, **changes: object) -> StateHeader:
    whole = StateHeader(
        run="r" * 26, lineage=1, view=3, plan="3" * 64, step=12, segment=1, bundle=of.digest
    )
    return dataclasses.replace(whole, **changes)


def read(content: bytes, bundle: Bundle, names: tuple[str, ...] = ("m", "v")) -> StoredSegment:
    return read_segment_state(content, bundle.manifest, bundle=bundle.digest, state_names=names)


def test_segment_state_round_trip_keeps_header_bits_and_digest(bundle: Bundle) -> None:
    state = made_state()
    stored = read(state.to_bytes(header(bundle)), bundle)
    assert stored.header == header(bundle)
    assert stored.state.step == 12
    assert stored.state.digest() == state.digest()
    for name, tensor in state.tensors.items():
        assert stored.state.tensors[name].tobytes() == tensor.tobytes()


def test_segment_state_digest_is_over_parameters_then_state() -> None:
    state = made_state()
    parts = [state.tensors, state.state["m"], state.state["v"]]
    raw = b"".join(vector.astype("<f4").tobytes() for part in parts for vector in part.values())
    assert state.digest() == hashlib.sha256(raw).hexdigest()


def test_segment_state_holds_running_values_and_its_digest_covers_them() -> None:
    varied = varied_bundle()
    names = {"mix0.scale": np.ones(WIDTH, np.float32)}
    state = SegmentState(
        tensors=names, state={"momentum": names}, step=3,
        running={"mix0.mean": np.arange(WIDTH, dtype=np.float32)},
    )  # fmt: skip
    content = state.to_bytes(header(varied, step=3))
    stored = read(content, varied, ("momentum",)).state
    np.testing.assert_array_equal(stored.running["mix0.mean"], state.running["mix0.mean"])
    assert stored.digest() == state.digest()
    assert stored.digest() != dataclasses.replace(state, running={}).digest()
    without = dataclasses.replace(state, running={})
    with pytest.raises(CheckpointError, match="other tensors"):
        read(without.to_bytes(header(varied, step=3)), varied, ("momentum",))


def test_segment_state_of_version_1_is_read_where_nothing_runs(bundle: Bundle) -> None:
    state = made_state()
    file = decode_tensors(state.to_bytes(header(bundle)))
    content = b"".join(encode_tensors(file.tensors, {**file.metadata, "version": "1"}))
    assert read(content, bundle).state.digest() == state.digest()


@pytest.mark.parametrize("part", ["tensors", "m", "v"])
def test_segment_state_digest_sees_every_bit(part: str) -> None:
    state = made_state()
    before = state.digest()
    vectors = state.tensors if part == "tensors" else state.state[part]
    vectors["block0.b"].view(np.uint32)[3] ^= 1
    assert state.digest() != before


def test_state_digest_depends_on_the_order_of_segments() -> None:
    a, b = Digest("a" * 64), Digest("b" * 64)
    assert state_digest([a, b]) == hashlib.sha256(bytes.fromhex(a + b)).hexdigest()
    assert state_digest([a, b]) != state_digest([b, a])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bundle": Digest("9" * 64)}, "another model"),
        ({"segment": 99}, "another model"),
        ({"segment": 0}, "other tensors"),
        ({"lineage": "x"}, "header is damaged"),
    ],
)
def test_segment_state_of_something_else_is_refused(
    bundle: Bundle, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        read(made_state().to_bytes(header(bundle, **changes)), bundle)


def test_segment_state_of_another_optimizer_is_refused(bundle: Bundle) -> None:
    with pytest.raises(CheckpointError, match="other tensors") as caught:
        read(made_state().to_bytes(header(bundle)), bundle, ("momentum",))
    assert "optimizer" in caught.value.hint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "else"}, "not a checkpoint of p2ptrain"),
        ({"version": "4"}, "version '4' is unknown"),
        ({"step": None}, "header is damaged"),
    ],
)
def test_segment_state_with_another_header_is_refused(
    bundle: Bundle, changes: dict[str, str | None], message: str
) -> None:
    file = decode_tensors(made_state().to_bytes(header(bundle)))
    metadata = {k: v for k, v in {**file.metadata, **changes}.items() if v is not None}
    content = b"".join(encode_tensors(file.tensors, metadata))
    with pytest.raises(CheckpointError, match=message):
        read(content, bundle)


def test_segment_state_of_another_dtype_is_refused(bundle: Bundle) -> None:
    file = decode_tensors(made_state().to_bytes(header(bundle)))
    doubled = {name: tensor.astype(np.float64) for name, tensor in file.tensors.items()}
    with pytest.raises(CheckpointError, match="float32"):
        read(b"".join(encode_tensors(doubled, file.metadata)), bundle)


@pytest.mark.parametrize("cut", [0, 7, 100, -1])
def test_segment_state_cut_short_is_refused(bundle: Bundle, cut: int) -> None:
    with pytest.raises(CheckpointError, match="safetensors"):
        read(made_state().to_bytes(header(bundle))[:cut], bundle)
