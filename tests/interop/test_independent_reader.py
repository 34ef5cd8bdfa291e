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


TRUST = read("trust")


@pytest.mark.parametrize("kind", ["revocation", "rotation"])
def test_statements_are_signed_and_named_as_the_page_says(kind: str) -> None:
    for vector in TRUST[f"{kind}s"]:
        fields = {name: value for name, value in vector["fields"].items() if name != "signature"}
        canonical = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()
        signed = f"p2ptrain {kind} 1\0".encode() + canonical
        assert signed.hex() == vector["signed"]
        assert hashlib.sha256(signed).hexdigest() == vector["id"]


def test_chains_are_hashed_and_summarised_as_the_page_says() -> None:
    for chain in TRUST["chains"]:
        ders = [bytes.fromhex(der) for der in chain["certificates"]]
        whole = b"".join(len(der).to_bytes(4, "big") + der for der in ders)
        assert hashlib.sha256(whole).hexdigest() == chain["hash"]
    known = TRUST["summary"]["known"]
    parts = [known["rotations"], sorted(known["revocations"]), sorted(known["chains"].items())]
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    assert digest == TRUST["summary"]["digest"]


def test_chains_are_refused_and_led_around_as_the_page_says() -> None:
    statements = {vector["id"]: vector["fields"] for vector in TRUST["revocations"]}
    chains = {chain["name"]: chain for chain in TRUST["chains"]}
    outcomes = set()
    for judged in TRUST["judged"]:
        chain, given = chains[judged["chain"]], [statements[each] for each in judged["statements"]]
        assert judged["refused"] == any(
            key in statement["keys"]
            and not {kept["key"] for kept in statement["keep"]} & set(chain["keys"][:index])
            for index, key in enumerate(chain["keys"])
            for statement in given
        )
        if judged["led_around"] != chain["certificates"]:
            (keeping,) = (statement for statement in given if statement["keep"])
            (kept,) = keeping["keep"]
            leaf = chain["certificates"][0]
            assert judged["led_around"] == [leaf, kept["certificate"], *keeping["chain"]]
            outcomes.add("led around")
        outcomes.add("refused" if judged["refused"] else "passes")
    assert outcomes == {"led around", "refused", "passes"}


def test_chains_move_below_the_new_root_as_the_page_says() -> None:
    (rotation,) = TRUST["rotations"]
    for chain, moved in zip(TRUST["chains"], TRUST["moved"], strict=True):
        assert moved["certificates"][:-1] == chain["certificates"][:-1]
        assert [moved["certificates"][-1]] == rotation["fields"]["issuers"]


def test_messages_of_a_renewal_are_laid_out_as_the_page_says() -> None:
    kinds = {"offer": 10, "answer": 11, "request": 12, "grant": 13}
    frames = {n: bytes.fromhex(raw) for n, raw in TRUST["renewal"]["frames"].items()}
    for name, frame in frames.items():
        assert struct.unpack("<4sBBH", frame[:8]) == (b"P2TE", 1, kinds[name], len(frame) - 8)
    assert frames["offer"][8:24] == TRUST["group"].encode()
    assert len(frames["offer"]) == 8 + 16 + 32
    assert struct.pack(">d", TRUST["renewal"]["clock_s"]) in frames["answer"]  # as msgpack has it
