"""Boundary tensors as bytes: exact roundings, bounds, hostile bytes, residuals that commit."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from p2ptrain.errors import InvariantBroken, NumericsError, RemoteProtocolError
from p2ptrain.training.tensor_codec import (
    BLOCK_VALUES,
    CODE_MAX,
    CODECS,
    SCALE_MAX,
    SCALE_MIN,
    ErrorFeedback,
    ResidualKey,
    decode,
    encode,
    encoded_bytes,
)

FLOAT_MAX = np.finfo(np.float32).max
KEY = ResidualKey(segment=3, index=0, microbatch=2)


def floats(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def through(codec: str, array: np.ndarray) -> np.ndarray:
    out = np.full_like(array, 99)
    decode(codec, encode(codec, array), out)
    return out


@pytest.mark.parametrize(
    ("codec", "dtype", "elements", "size"),
    [
        ("fp32", "float32", 10, 40),
        ("bf16", "float32", 10, 20),
        ("int8", "float32", 0, 0),
        ("int8", "float32", 1, 5),
        ("int8", "float32", 256, 260),
        ("int8", "float32", 257, 265),
        ("int8", "int64", 10, 80),
        ("bf16", "bool", 10, 10),
    ],
)
def test_size_follows_from_codec_dtype_and_count(
    codec: str, dtype: str, elements: int, size: int
) -> None:
    assert encoded_bytes(codec, dtype=dtype, elements=elements) == size
    assert encode(codec, np.zeros(elements, dtype)).nbytes == size


def test_fp32_is_the_little_endian_values() -> None:
    array = floats(3, 5)
    assert encode("fp32", array).tobytes() == struct.pack("<15f", *array.ravel())
    assert (through("fp32", array) == array).all()


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", ["int64", "bool", "float64"])
def test_other_dtypes_go_raw_under_every_codec(codec: str, dtype: str) -> None:
    array = np.arange(700).reshape(7, 100).astype(dtype)
    assert encode(codec, array).tobytes() == array.tobytes()
    assert (through(codec, array) == array).all()


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        (0x3F800000, 0x3F80),  # 1
        (0x3F808000, 0x3F80),  # a tie goes to the even one: down
        (0x3F818000, 0x3F82),  # and up
        (0x3F808001, 0x3F81),
        (0x3F807FFF, 0x3F80),
        (0x80000000, 0x8000),  # minus zero
        (0x00000001, 0x0000),  # subnormals round as all others
        (0x00018000, 0x0002),
        (0x7F7FFFFF, 0x7F80),  # the largest float is nearer to infinity
        (0xFF800000, 0xFF80),
        (0x7F800001, 0x7FC0),  # a NaN stays one
        (0xFFFFFFFF, 0xFFFF),
    ],
)
def test_bf16_rounds_to_nearest_even(word: int, expected: int) -> None:
    array = np.array([word], np.uint32).view(np.float32)
    assert int(encode("bf16", array).view("<u2")[0]) == expected
    assert int(through("bf16", array).view(np.uint32)[0]) == expected << 16


def test_bf16_is_within_half_a_unit_and_a_second_pass_changes_nothing() -> None:
    array = floats(300, 500)
    once = through("bf16", array)
    assert (np.abs(once - array) <= np.abs(array) * 2.0**-8).all()
    assert (through("bf16", once) == once).all()


@pytest.mark.parametrize("count", [1, 255, 256, 257, 65_536, 65_537, 200_001])
def test_int8_error_is_at_most_half_a_scale(count: int) -> None:
    array = floats(count) * np.float32(1e3)
    encoded = encode("int8", array)
    scales = encoded[: 4 * -(-count // BLOCK_VALUES)].view("<f4")
    bound = np.repeat(scales, BLOCK_VALUES)[:count] * 0.5001
    assert (np.abs(through("int8", array) - array) <= bound).all()
    largest = np.abs(array[:BLOCK_VALUES]).max()
    assert scales[0] == largest / np.float32(CODE_MAX)


def test_int8_rounds_ties_to_even_and_keeps_signs_symmetric() -> None:
    values = [127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -127.0, 126.5]
    encoded = encode("int8", np.array(values, np.float32))
    assert encoded[:4].view("<f4")[0] == 1.0
    assert encoded[4:].view(np.int8).tolist() == [127, 0, 2, 2, 0, -2, -127, 126]


@pytest.mark.parametrize("largest", [0.0, 1e-45, SCALE_MIN, float(np.float32(126 * SCALE_MIN))])
def test_int8_sends_blocks_of_tiny_values_as_zeros(largest: float) -> None:
    array = np.full(300, largest, np.float32)
    assert not encode("int8", array).any()
    assert (through("int8", array) == 0).all()


@pytest.mark.parametrize("value", [FLOAT_MAX, -FLOAT_MAX, np.float32(SCALE_MAX) * 127])
def test_int8_never_overflows(value: np.float32) -> None:
    array = np.full(300, value, np.float32)
    decoded = through("int8", array)
    assert np.isfinite(decoded).all()
    assert np.allclose(decoded, array, rtol=0.01)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_int8_refuses_what_is_not_finite(bad: float) -> None:
    array = floats(70_000)
    array[69_999] = bad
    with pytest.raises(NumericsError, match="not finite"):
        encode("int8", array)


def test_only_the_block_of_an_outlier_gets_coarse() -> None:
    array = floats(2 * BLOCK_VALUES)
    array[0] = 1e6
    error = np.abs(through("int8", array) - array)
    assert error[BLOCK_VALUES:].max() < 0.02 < error[:BLOCK_VALUES].max()


def test_encoding_into_a_given_buffer_gives_the_same_bytes() -> None:
    array = floats(10, 77)
    for codec in CODECS:
        out = np.empty(encoded_bytes(codec, dtype="float32", elements=array.size), np.uint8)
        assert encode(codec, array, out) is out
        assert out.tobytes() == encode(codec, array).tobytes()
        with pytest.raises(InvariantBroken, match="bytes for a tensor"):
            encode(codec, array, out[1:])


def test_unknown_codec_is_our_own_bug() -> None:
    with pytest.raises(InvariantBroken, match="fp8"):
        encode("fp8", floats(3))


@pytest.mark.parametrize("codec", CODECS)
def test_wrong_size_is_refused(codec: str) -> None:
    encoded = encode(codec, floats(400))
    for wrong in (encoded[:-1], np.append(encoded, np.uint8(0)), encoded[:0]):
        with pytest.raises(RemoteProtocolError, match="bytes, not"):
            decode(codec, wrong, np.empty(400, np.float32))


@pytest.mark.parametrize("scale", [np.nan, np.inf, -1.0, 1e-45, float(FLOAT_MAX)])
def test_scale_out_of_range_is_refused(scale: float) -> None:
    encoded = encode("int8", floats(400))
    encoded[4:8].view("<f4")[0] = scale
    with pytest.raises(RemoteProtocolError, match="scale"):
        decode("int8", encoded, np.empty(400, np.float32))


def test_every_byte_of_an_int8_tensor_decodes_to_something_finite() -> None:
    encoded = np.concatenate([
        np.frombuffer(struct.pack("<f", SCALE_MAX), np.uint8), np.arange(256).astype(np.uint8)
    ])  # fmt: skip
    out = np.empty(256, np.float32)
    decode("int8", encoded, out)
    assert np.isfinite(out).all()


def test_feedback_adds_what_the_committed_step_lost() -> None:
    feedback, array = ErrorFeedback("int8"), floats(5, 100)
    first = feedback.encode(KEY, array)
    assert first.tobytes() == encode("int8", array).tobytes()
    feedback.commit()
    lost = array - through("int8", array)
    assert (feedback.state()[KEY] == lost).all()
    second = feedback.encode(KEY, array)
    assert second.tobytes() == encode("int8", array + lost).tobytes()


def test_feedback_of_a_constant_averages_out() -> None:
    feedback, array = ErrorFeedback("int8"), floats(300)
    array[0] = 1e3  # a coarse scale: most values are below half of it
    total, decoded = np.zeros(300), np.empty(300, np.float32)
    for _ in range(200):
        decode("int8", feedback.encode(KEY, array), decoded)
        feedback.commit()
        total += decoded
    with_feedback = np.abs(total / 200 - array).max()
    without = np.abs(through("int8", array) - array).max()
    assert with_feedback < 0.05 < without


def test_abandoned_step_is_encoded_again_to_the_same_bytes() -> None:
    feedback, array = ErrorFeedback("int8"), floats(1000)
    feedback.encode(KEY, array)
    feedback.commit()
    begun = feedback.encode(KEY, array).tobytes()
    assert feedback.encode(KEY, array).tobytes() == begun  # asked twice within a step
    feedback.abandon()
    feedback.commit()
    assert feedback.encode(KEY, array).tobytes() == begun


def test_refused_tensor_leaves_residuals_alone() -> None:
    feedback, array = ErrorFeedback("int8"), floats(1000)
    feedback.encode(KEY, array)
    feedback.commit()
    before = feedback.state()[KEY].tobytes()
    for bad in (np.full(1000, np.inf, np.float32), np.full(1000, FLOAT_MAX)):
        feedback.restore({KEY: np.full(1000, FLOAT_MAX, np.float32)})
        with pytest.raises(NumericsError):
            feedback.encode(KEY, bad.astype(np.float32))
        feedback.commit()
        assert (feedback.state()[KEY] == FLOAT_MAX).all()
    assert before != feedback.state()[KEY].tobytes()


def test_restored_feedback_goes_on_with_the_same_bits() -> None:
    feedback, other = ErrorFeedback("int8"), ResidualKey(segment=1, index=1, microbatch=0)
    for key, seed in ((KEY, 1), (other, 2)):
        feedback.encode(key, floats(3, 200, seed=seed))
    feedback.commit()
    saved = feedback.state()
    assert list(saved) == [other, KEY]
    again = ErrorFeedback("int8")
    again.restore(saved)
    array = floats(3, 200, seed=3)
    assert again.encode(KEY, array).tobytes() == feedback.encode(KEY, array).tobytes()
    again.keep([1])
    assert list(again.state()) == [other]


@pytest.mark.parametrize("codec", ["fp32", "bf16"])
def test_other_codecs_keep_no_residual(codec: str) -> None:
    feedback, array = ErrorFeedback(codec), floats(50)
    assert feedback.encode(KEY, array).tobytes() == encode(codec, array).tobytes()
    feedback.commit()
    assert feedback.state() == {}


def test_feedback_leaves_integers_alone() -> None:
    feedback = ErrorFeedback("int8")
    feedback.encode(KEY, np.arange(9))
    feedback.commit()
    assert feedback.state() == {}
