"""The vectors read by code that shares nothing with ours: what the pages say is enough.

Only the standard library, as an implementation in another language would have it.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

VECTORS = Path(__file__).parent / "vectors"
WORD = (1 << 64) - 1
MULTIPLIERS = 0xD2E7470EE14C6C93, 0xCA5A826395121157
WEYL = 0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B


def read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((VECTORS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def philox(key: tuple[int, int], counter: tuple[int, int, int, int]) -> Iterator[int]:
    """Philox4x64-10; the counter is raised before each block."""
    number = sum(word << 64 * place for place, word in enumerate(counter))
    while True:
        number += 1
        a, b, c, d = (number >> 64 * place & WORD for place in range(4))
        low, high = key
        for _ in range(10):
            one, other = MULTIPLIERS[0] * a, MULTIPLIERS[1] * c
            a, b, c, d = other >> 64 ^ b ^ low, other & WORD, one >> 64 ^ d ^ high, one & WORD
            low, high = (low + WEYL[0]) & WORD, (high + WEYL[1]) & WORD
        yield from (a, b, c, d)


def single(value: float) -> float:
    """Rounded to float32."""
    rounded: float = struct.unpack("<f", struct.pack("<f", value))[0]
    return rounded


def floats(raw: str) -> list[float]:
    return [value for (value,) in struct.iter_unpack("<f", bytes.fromhex(raw))]


@pytest.mark.parametrize("vector", read("draws")["parameters"], ids=lambda v: v["kind"])
def test_parameters_are_drawn_as_the_page_says(vector: dict[str, Any]) -> None:
    words = philox((vector["seed"], 1 << 56 | vector["tensor_index"]), (0, 0, 0, 0))
    for expected in floats(vector["values"]):
        if vector["kind"] == "normal":
            three = [next(words) for _ in range(3)]
            pieces = [word >> shift & 0xFFFF for word in three for shift in (0, 16, 32, 48)]
            drawn = (sum(pieces) - 12 * 65535 // 2) * (vector["scale"] / (1 << 16))
        else:
            drawn = (2 * (next(words) >> 40) + 1 - (1 << 24)) * (vector["scale"] / (1 << 24))
        assert single(drawn) == expected


@pytest.mark.parametrize("vector", read("draws")["masks"], ids=lambda v: str(v["probability"]))
def test_masks_are_drawn_as_the_page_says(vector: dict[str, Any]) -> None:
    place = 0, vector["segment"] << 32 | vector["site"], vector["microbatch"], vector["step"]
    words = philox((vector["seed"], 2 << 56), place)
    expected, chance = floats(vector["values"]), vector["probability"]
    drawn: list[float] = []
    while len(drawn) < len(expected):
        word = next(words)
        pieces = [word >> shift & 0xFFFF for shift in (0, 16, 32, 48)]
        drawn += [single(1 / (1 - chance)) * (p >= round(chance * (1 << 16))) for p in pieces]
    assert drawn[: len(expected)] == expected


def test_windows_are_drawn_as_the_page_says() -> None:
    vector = read("draws")["windows"]
    offsets = vector["tokens"] - vector["length"] + 1
    key = vector["seed"], 3 << 56
    for sample, expected in enumerate(vector["offsets_of_samples_0_to_7"]):
        word = next(philox(key, (0, sample, vector["step"], 0)))
        assert word * offsets >> 64 == expected


@pytest.mark.parametrize(
    "vector", read("codecs")["tensors"], ids=lambda v: f"{v['codec']} {v['name']}"
)
def test_tensors_decode_as_the_page_says(vector: dict[str, Any]) -> None:
    encoded, expected = bytes.fromhex(vector["encoded"]), floats(vector["decoded"])
    if vector["codec"] == "fp32":
        decoded = floats(vector["encoded"])
    elif vector["codec"] == "bf16":
        words = (word << 16 for (word,) in struct.iter_unpack("<H", encoded))
        decoded = [struct.unpack("<f", struct.pack("<I", word))[0] for word in words]
    else:
        blocks = math.ceil(len(expected) / 256)
        scales = struct.unpack(f"<{blocks}f", encoded[: 4 * blocks])
        codes = struct.unpack(f"{len(expected)}b", encoded[4 * blocks :])
        decoded = [single(code * scales[index // 256]) for index, code in enumerate(codes)]
    assert decoded == expected


def test_invite_keys_are_derived_as_the_page_says() -> None:
    vector = read("enrolment")
    extracted = hmac.digest(bytes(32), bytes.fromhex(vector["secret"]), "sha256")

    def expanded(info: bytes, length: int) -> str:
        return hmac.digest(extracted, info + b"\1", hashlib.sha256)[:length].hex()

    assert expanded(b"p2ptrain invite id", 16) == vector["invite_id"]
    assert expanded(b"p2ptrain invite key", 32) == vector["shared_key"]


def test_frames_are_cut_as_the_page_says() -> None:
    for vector in read("frames")["frames"]:
        frame = bytes.fromhex(vector["frame"])
        magic, kind, flags, header, body = struct.unpack_from("<4sBBHQ", frame)
        assert (magic, kind, flags) == (b"P2T1", vector["type"], 0)
        assert len(frame) == 16 + header + body
        assert frame[16 + header :].hex() == vector["body"]
