"""HELLO: who it is must fit the certificate, and a common version must exist."""

from __future__ import annotations

import dataclasses

import pytest

from p2ptrain.errors import RemoteProtocolError
from p2ptrain.ids import DeviceId, GroupId
from p2ptrain.training.contract import RuntimeBuild
from p2ptrain.wire.hello import Hello, encode_hello, negotiate, parse_hello, version_gap

BUILD = RuntimeBuild(
    runtime="onnxruntime", version="1.20", numpy="2.1", machine="aarch64", isa="neon"
)
US, THEM = DeviceId("a" * 26), DeviceId("b" * 26)
HELLO = Hello(
    protocol_min=1,
    protocol_max=3,
    features=("bf16", "resume"),
    group=GroupId("g" * 16),
    device=US,
    instance=7,
    kind="control",
    build=BUILD,
    clock_s=1000.0,
    listen_port=7000,
)
THEIRS = dataclasses.replace(HELLO, device=THEM, features=("int8", "bf16"), clock_s=1060.0)


def test_hello_round_trips() -> None:
    assert parse_hello(encode_hello(HELLO)) == HELLO


def test_highest_common_version_and_common_features_are_agreed() -> None:
    older = dataclasses.replace(THEIRS, protocol_max=2)
    newer = dataclasses.replace(THEIRS, protocol_min=3, protocol_max=9)
    assert negotiate(HELLO, older, device=THEM).protocol == 2
    assert negotiate(HELLO, newer, device=THEM).protocol == 3
    agreement = negotiate(HELLO, THEIRS, device=THEM)
    assert agreement.features == ("bf16",)
    assert agreement.clock_ahead_s == 60.0


@pytest.mark.parametrize(
    ("spoken", "sentence"),
    [
        ((1, 9), None),
        ((3, 3), None),
        ((4, 5), "it speaks protocol 4 to 5, this device 1 to 3; update p2ptrain on this device"),
        ((0, 0), "it speaks protocol 0, this device 1 to 3; update p2ptrain on the other device"),
    ],
)
def test_version_gap_says_which_device_to_update(
    spoken: tuple[int, int], sentence: str | None
) -> None:
    theirs = dataclasses.replace(THEIRS, protocol_min=spoken[0], protocol_max=spoken[1])
    assert version_gap(HELLO, theirs) == sentence


@pytest.mark.parametrize(
    "change",
    [
        {"protocol_min": 4, "protocol_max": 5},
        {"device": DeviceId("c" * 26)},
        {"group": GroupId("h" * 16)},
        {"kind": "data"},
    ],
)
def test_hello_that_does_not_fit_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(RemoteProtocolError):
        negotiate(HELLO, dataclasses.replace(THEIRS, **change), device=THEM)


@pytest.mark.parametrize(
    "change",
    [
        {"protocol_min": 2, "protocol_max": 1},
        {"protocol_min": -1},
        {"features": tuple("x" for _ in range(33))},
        {"features": ("x" * 33,)},
        {"device": "A" * 26},
        {"group": "g"},
        {"kind": "bulk"},
        {"listen_port": 65_536},
    ],
)
def test_hello_out_of_range_cannot_be_built(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        dataclasses.replace(HELLO, **change)


@pytest.mark.parametrize("body", [b"", b"\x80", b"\xc1", b"\x91" * 4000, bytes(4097)])
def test_garbage_is_refused(body: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        parse_hello(body)
