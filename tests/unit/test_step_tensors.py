"""One step's tensors, packed: what fits is read back, anything else is refused."""

from __future__ import annotations

import struct
from types import SimpleNamespace

import numpy as np
import pytest

from p2ptrain.errors import InvariantBroken, RemoteProtocolError
from p2ptrain.training.feed import Feed
from p2ptrain.training.minibatch import Minibatch
from p2ptrain.training.replay_inputs import StepPlace, needed_places, sent_places, step_inputs
from p2ptrain.training.step_tensors import (
    PackedTensor,
    encoded,
    expected_tensors,
    joined,
    pack,
    pack_bodies,
    packed_bytes,
    unpack,
    unpack_arrays,
)
from p2ptrain.training.tensor_codec import encode
from tests.bundles import CONTEXT, VOCABULARY, WIDTH, contract_for, tiny_bundle
from tests.varied_bundle import varied_bundle

MANIFEST = varied_bundle().manifest
CONTRACT = contract_for(varied_bundle(), microbatch_size=3, microbatches=2)
EXPECTED = expected_tensors(MANIFEST, CONTRACT, "activation", 0)


def packed() -> bytes:
    return pack([
        PackedTensor(
            microbatch=each.microbatch, index=each.index,
            body=encoded(np.full(each.shape, index, each.dtype)),
        )
        for index, each in enumerate(EXPECTED)
    ])  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "segment", "one"),
    [
        ("activation", 0, [((3, CONTEXT, WIDTH), "float32"), ((3, CONTEXT), "bool")]),
        ("activation", 3, [((3, CONTEXT, WIDTH), "float32")]),
        ("cotangent", 0, [((3, CONTEXT, WIDTH), "float32")]),
        ("input", 0, [((3, CONTEXT), "int64"), ((3, CONTEXT), "bool")]),
        ("labels", 0, [((3, CONTEXT), "int64"), ((1,), "float64")]),
    ],
)
def test_expected_tensors_follow_from_manifest_and_contract(
    kind: str, segment: int, one: list[tuple[tuple[int, ...], str]]
) -> None:
    found = expected_tensors(MANIFEST, CONTRACT, kind, segment)  # type: ignore[arg-type]  # a case
    assert [(e.microbatch, e.index, e.shape, e.dtype) for e in found] == [
        (microbatch, index, shape, dtype)
        for microbatch in (0, 1)
        for index, (shape, dtype) in enumerate(one)
    ]


def test_tied_tensors_are_named_by_their_manifest_index() -> None:
    (head,) = expected_tensors(MANIFEST, CONTRACT, "tied", 6)
    assert MANIFEST.tensors[head.index].name == "head.table"
    assert (head.microbatch, head.shape) == (0, (VOCABULARY, WIDTH))
    assert expected_tensors(MANIFEST, CONTRACT, "tied", 3) == ()


@pytest.mark.parametrize(
    ("kind", "segment"),
    [("activation", 6), ("cotangent", 6), ("activation", -1), ("tied", 7), ("input", 1)],
)
def test_places_that_the_model_lacks_are_refused(kind: str, segment: int) -> None:
    with pytest.raises(RemoteProtocolError):
        expected_tensors(MANIFEST, CONTRACT, kind, segment)  # type: ignore[arg-type]  # a case


def test_packed_tensors_are_read_back() -> None:
    content = packed()
    assert len(content) == packed_bytes(EXPECTED)
    values = unpack_arrays(content, EXPECTED)
    assert [[array.dtype.name for array in each] for each in values] == [["float32", "bool"]] * 2
    np.testing.assert_array_equal(values[1][0], np.full((3, CONTEXT, WIDTH), 2.0))
    assert not values[1][0].flags.writeable
    assert pack(unpack(content, EXPECTED)) == content
    assert unpack_arrays(pack([]), ()) == ()


@pytest.mark.parametrize(
    ("offset", "value"),
    [
        (0, b"P2TT"),
        (4, struct.pack("<H", 2)),
        (6, struct.pack("<H", 1)),
        (8, struct.pack("<I", 3)),
        (8, struct.pack("<I", 2**32 - 1)),
        (12, struct.pack("<I", 1)),
        (16, struct.pack("<I", 1)),
        (20, struct.pack("<Q", 2**63)),
        (28, struct.pack("<I", 1)),
    ],
)
def test_packed_step_that_says_something_else_is_refused(offset: int, value: bytes) -> None:
    content = bytearray(packed())
    content[offset : offset + len(value)] = value
    with pytest.raises(RemoteProtocolError):
        unpack(content, EXPECTED)


@pytest.mark.parametrize("size", [0, 1, 11, 12, 27])
def test_packed_step_of_another_length_is_refused(size: int) -> None:
    content = packed()
    for wrong in (content[:size], content[:-1], content + b"\0"):
        with pytest.raises(RemoteProtocolError, match="bytes, not"):
            unpack(wrong, EXPECTED)


@pytest.mark.parametrize(("codec", "size"), [("bf16", 2), ("int8", 1)])
def test_boundary_tensors_are_packed_as_they_were_encoded(codec: str, size: int) -> None:
    contract = SimpleNamespace(codec=codec, microbatch_size=3, microbatches=2)
    expected = expected_tensors(MANIFEST, contract, "activation", 0)  # type: ignore[arg-type]  # the part that is read
    elements = 3 * CONTEXT * WIDTH
    scales = 4 * -(-elements // 256) if codec == "int8" else 0
    assert [each.nbytes for each in expected] == [size * elements + scales, 3 * CONTEXT] * 2
    values = [np.full(each.shape, index % 2, each.dtype) for index, each in enumerate(expected)]
    bodies = [encode(each.codec, array).data for each, array in zip(expected, values, strict=True)]
    content = pack_bodies(expected, bodies)
    assert content is not None
    found = [array for each in unpack_arrays(content, expected) for array in each]
    for array, value in zip(found, values, strict=True):
        np.testing.assert_array_equal(array, value)
    assert not found[0].flags.writeable
    assert expected_tensors(MANIFEST, contract, "input", 0)[0].codec == "fp32"  # type: ignore[arg-type]  # as above


def test_parts_of_several_peers_make_the_whole_step() -> None:
    first, second = (
        pack([t for t in unpack(packed(), EXPECTED) if t.microbatch == own]) for own in (0, 1)
    )
    assert joined(EXPECTED, [((1,), second), ((0,), first)]) == packed()
    assert joined(EXPECTED, [((), packed())]) == packed()
    for parts in ([((0,), first)], [((0,), second)], [((0,), first), ((0,), first)]):
        with pytest.raises(RemoteProtocolError):
            joined(EXPECTED, parts)


def test_bodies_of_a_log_are_packed_only_if_all_are_there() -> None:
    bodies = [bytes(each.nbytes) for each in EXPECTED]
    content = pack_bodies(EXPECTED, bodies)
    assert content is not None
    assert len(content) == packed_bytes(EXPECTED)
    assert pack_bodies(EXPECTED, bodies[:-1]) is None
    assert pack_bodies(EXPECTED, [*bodies[:-1], b""]) is None


def test_pack_refuses_tensors_out_of_order() -> None:
    one, other = (PackedTensor(microbatch=0, index=i, body=b"") for i in (0, 1))
    for wrong in ([other, one], [one, one]):
        with pytest.raises(InvariantBroken):
            pack(wrong)


def test_encoded_bytes_are_little_endian() -> None:
    assert encoded(np.array([1, 256], ">i4")) == b"\1\0\0\0\0\1\0\0"


@pytest.mark.parametrize(
    ("segments", "needed", "sent"),
    [
        (range(2), [("input", 0), ("cotangent", 1), ("tied", 6)], [("activation", 1), ("tied", 0)]),
        (range(2, 4), [("activation", 1), ("cotangent", 3)], [("activation", 3), ("cotangent", 1)]),
        (range(4, 7), [("activation", 3), ("labels", 0), ("tied", 0)],
         [("cotangent", 3), ("tied", 6)]),
        (range(7), [("input", 0), ("labels", 0)], []),
    ],
)  # fmt: skip
def test_places_of_a_range(
    segments: range, needed: list[tuple[str, int]], sent: list[tuple[str, int]]
) -> None:
    found = needed_places(MANIFEST, segments)
    assert [(place.kind, place.segment) for place in found] == needed
    found = sent_places(MANIFEST, segments)
    assert [(place.kind, place.segment) for place in found] == sent


def test_places_of_merged_stages_are_those_of_each() -> None:
    found = sent_places(MANIFEST, range(7), cuts={3, 6, 9})
    assert [(place.kind, place.segment) for place in found] == [
        ("activation", 3), ("cotangent", 3), ("tied", 0), ("tied", 6),
    ]  # fmt: skip
    assert needed_places(tiny_bundle().manifest, range(1, 2)) == (
        StepPlace("activation", 0), StepPlace("cotangent", 1),
    )  # fmt: skip


@pytest.mark.parametrize("weights", [(0.5, 0.25), (0.0, 0.0), (2.0, 2.0), (float("nan"),) * 2])
def test_loss_weight_of_a_replayed_step_is_one_fraction(weights: tuple[float, ...]) -> None:
    shape = (3, CONTEXT)
    feed = Feed(inputs=(), labels=np.zeros(shape, np.int64))
    parts = [Minibatch(feeds=(feed, feed), loss_weight=weight) for weight in weights]
    tensors = [
        PackedTensor(microbatch=microbatch, index=index, body=encoded(array))
        for microbatch, part in enumerate(parts)
        for index, array in enumerate(part.arrays("labels", 0))
    ]
    given = {
        place: pack(tensors) if place.kind == "labels" else zeros(place)
        for place in needed_places(MANIFEST, range(4, 7))
    }
    with pytest.raises(RemoteProtocolError, match="loss weight"):
        step_inputs(MANIFEST, CONTRACT, range(4, 7), given)
    given[StepPlace("labels", 0)] = Minibatch(feeds=(feed, feed), loss_weight=0.5).packed("labels")
    read = step_inputs(MANIFEST, CONTRACT, range(4, 7), given)
    assert read.loss_weight == 0.5
    assert [array.shape for array in read.labels] == [shape, shape]
    assert list(read.tied) == ["start.table"]


def zeros(place: StepPlace) -> bytes:
    return pack([
        PackedTensor(microbatch=e.microbatch, index=e.index, body=bytes(e.nbytes))
        for e in expected_tensors(MANIFEST, CONTRACT, place.kind, place.segment)
    ])  # fmt: skip
