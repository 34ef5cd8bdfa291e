"""Frames as bytes, fixed for every implementation; PROTOCOL.md lists the same vectors."""

from __future__ import annotations

import dataclasses
import hashlib
import struct
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from p2ptrain.ids import DeviceId, Digest, GroupId, Lineage, RunId, ViewNumber
from p2ptrain.training.contract import RuntimeBuild
from p2ptrain.training.step_tensors import PackedTensor, pack
from p2ptrain.trust.code import code_password, read_code
from p2ptrain.trust.code_enrolment import CodeJoiner, CodeSponsor
from p2ptrain.trust.enrolment import EnrolmentGrant, EnrolmentRequest, Joiner, Sponsor
from p2ptrain.trust.invite import Invite
from p2ptrain.wire.frames import (
    BulkHeader,
    FrameType,
    TensorHeader,
    encode_frame_head,
    encode_header,
)
from p2ptrain.wire.hello import Hello, encode_hello

GOLDEN = Path(__file__).parent / "golden"
CHUNK = bytes(range(16))

HELLO = Hello(
    protocol_min=1,
    protocol_max=1,
    features=(),
    group=GroupId("abcdefghijklmnop"),
    device=DeviceId("abcdefghijklmnopqrstuvwxyz"),
    instance=1234567890123,
    kind="control",
    build=RuntimeBuild(
        runtime="onnxruntime", version="1.20.0", numpy="2.1.0", machine="aarch64", isa="neon"
    ),
    clock_s=1800000000.5,
    listen_port=7000,
)
TENSOR = TensorHeader(
    run=RunId("abcdefghijklmnopqrstuvwxyz"),
    lineage=Lineage(0),
    view=ViewNumber(1),
    plan=Digest(hashlib.sha256(b"plan").hexdigest()),
    kind="cotangent",
    phase="train",
    step=1000,
    microbatch=3,
    segment=2,
    index=0,
)
TIED = dataclasses.replace(TENSOR, kind="tied", microbatch=0, segment=4, index=17)
LOSS_WEIGHT = dataclasses.replace(TENSOR, kind="labels", segment=0, index=1)
BULK = BulkHeader(
    request=7,
    kind="blob",
    digest=Digest(hashlib.sha256(CHUNK).hexdigest()),
    offset=0,
    total=16,
    chunk=Digest(hashlib.sha256(CHUNK).hexdigest()),
)
PACKED = (
    PackedTensor(microbatch=0, index=0, body=CHUNK),
    PackedTensor(microbatch=0, index=1, body=CHUNK[:1]),
    PackedTensor(microbatch=1, index=0, body=b""),
)


def enrolment_frames() -> dict[str, bytes]:
    """The whole exchange for fixed keys and a fixed invite."""
    invite = Invite(
        group_name="home",
        addresses=("192.0.2.1:7000",),
        root_hash="ab" * 32,
        secret="000102030405060708090a0b0c0d0e0f",
        expires_at_s=1800000000.0,
    )
    joiner = Joiner(invite, X25519PrivateKey.from_private_bytes(b"j" * 32))
    sponsor = Sponsor(X25519PrivateKey.from_private_bytes(b"s" * 32), root_hash="ab" * 32)
    offer = joiner.offer()
    answer, sponsor_keys = sponsor.answer(offer, invite.shared_key)
    asked = EnrolmentRequest(name="beta", device_csr=b"device", issuer_csr=b"issuer")
    request = joiner.agreed(answer).ask(asked)
    sponsor_keys.asked(request)
    granted = EnrolmentGrant(group_name="home", root=b"root", issuers=(b"a",), clock_s=1.5)
    grant = sponsor_keys.grant(granted)
    named = {"offer": offer, "answer": answer, "request": request, "grant": grant}
    return {f"enrol-{name}": frame.encoded() for name, frame in named.items()}


def code_frames() -> dict[str, bytes]:
    """The exchange with a short code up to its confirmation, for fixed secrets of both sides."""
    password = code_password(read_code("0123456789"))
    joiner = CodeJoiner(password, b"j" * 32, entropy=lambda count: b"x" * count)
    sponsor = CodeSponsor(HELLO.group, b"s" * 32, entropy=lambda count: b"y" * count)
    offer = joiner.offer()
    answer = sponsor.answer(offer, password)
    proof = joiner.proof(answer)
    confirm, _ = sponsor.agreed(proof)
    joiner.agreed(confirm)
    named = {"offer": offer, "answer": answer, "proof": proof, "confirm": confirm}
    return {f"code-{name}": frame.encoded() for name, frame in named.items()}


def vectors() -> dict[str, bytes]:
    hello, tensor, bulk = encode_hello(HELLO), encode_header(TENSOR), encode_header(BULK)
    newer = encode_hello(dataclasses.replace(HELLO, protocol_min=2, protocol_max=2))
    tied, weight = encode_header(TIED), encode_header(LOSS_WEIGHT)
    return {
        "hello": encode_frame_head(FrameType.HELLO, b"", len(hello)) + hello,
        "hello-v2": encode_frame_head(FrameType.HELLO, b"", len(newer)) + newer,
        "tensor": encode_frame_head(FrameType.TENSOR, tensor, 16) + CHUNK,
        "tied": encode_frame_head(FrameType.TENSOR, tied, 16) + CHUNK,
        "loss-weight": encode_frame_head(FrameType.TENSOR, weight, 8) + struct.pack("<d", 1 / 96),
        "packed-step": pack(PACKED),
        "bulk": encode_frame_head(FrameType.BULK, bulk, 16) + CHUNK,
        **enrolment_frames(),
        **code_frames(),
    }


@pytest.mark.parametrize("name", sorted(vectors()))
def test_frame_has_the_golden_bytes(name: str) -> None:
    golden = bytes.fromhex((GOLDEN / f"{name}.hex").read_text())
    assert vectors()[name] == golden
