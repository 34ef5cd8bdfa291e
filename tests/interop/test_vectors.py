"""The published test vectors say what the code does, in both directions."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from p2ptrain.errors import RemoteProtocolError, TrustError
from p2ptrain.training.tensor_codec import decode
from p2ptrain.trust import certificates as certs
from p2ptrain.trust.chains import read_chain
from p2ptrain.trust.enrolment import PREFIX as ENROL_PREFIX
from p2ptrain.trust.enrolment import EnrolFrame, parse_enrol_prefix
from p2ptrain.trust.renewal import RenewalClient
from p2ptrain.trust.revocation import Revocation, RevokedKeys, check_revocation
from p2ptrain.trust.rotation import Roots, Rotation
from p2ptrain.wire import codec as messages
from p2ptrain.wire.frames import (
    PREFIX_BYTES,
    FrameType,
    parse_bulk_header,
    parse_prefix,
    parse_tensor_header,
)
from p2ptrain.wire.hello import parse_hello
from tests.interop.make_vectors import FILES, FOLDER, document
from tests.interop.message_samples import product_messages

REMAKE = "python -m tests.interop.make_vectors"


def read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    assert (found["format"], found["version"]) == ("p2ptrain-vectors", 1)
    return found


def of(name: str, part: str, key: str) -> list[Any]:
    return [pytest.param(each, id=str(each[key])[:40]) for each in read(name)[part]]


@pytest.mark.parametrize("name", FILES)
def test_code_makes_exactly_the_published_vectors(name: str) -> None:
    published = (FOLDER / f"{name}.json").read_text(encoding="utf-8")
    assert published == document(name), f"if this change is meant, run: {REMAKE}"


def test_folder_holds_nothing_else() -> None:
    found = {path.name for path in FOLDER.iterdir()}
    assert found == {f"{name}.json" for name in FILES} | {"README.md"}
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert [name for name in FILES if f"`{name}.json`" not in readme] == []


def test_every_message_has_a_vector() -> None:
    published = [each["name"] for each in read("messages")["messages"]]
    assert published == list(product_messages())


@pytest.mark.parametrize("vector", of("messages", "messages", "name"))
def test_published_message_is_read_and_written_again(vector: dict[str, Any]) -> None:
    body = bytes.fromhex(vector["body"])
    value = messages.decode(body)
    assert messages.message_name(value) == vector["name"]
    assert messages.encode(value) == body
    assert set(vector["fields"]) == set(messages.to_plain(value))


@pytest.mark.parametrize("vector", of("messages", "refused_bodies", "why"))
def test_refused_body_is_refused(vector: dict[str, Any]) -> None:
    with pytest.raises(RemoteProtocolError):
        messages.decode(bytes.fromhex(vector["body"]))


@pytest.mark.parametrize("vector", of("frames", "frames", "name"))
def test_published_frame_is_read(vector: dict[str, Any]) -> None:
    frame = bytes.fromhex(vector["frame"])
    prefix = parse_prefix(frame[:PREFIX_BYTES])
    header = frame[PREFIX_BYTES : PREFIX_BYTES + prefix.header_length]
    body = frame[PREFIX_BYTES + prefix.header_length :]
    assert (prefix.type, body.hex()) == (FrameType(vector["type"]), vector["body"])
    assert prefix.body_length == len(body)
    if prefix.type is FrameType.TENSOR:
        parsed = parse_tensor_header(header, body_length=len(body))
        assert messages.to_plain(parsed) == vector["header"]
    elif prefix.type is FrameType.BULK:
        assert (
            messages.to_plain(parse_bulk_header(header, body_length=len(body)))
            == (vector["header"])
        )
    else:
        assert vector["header"] is None


@pytest.mark.parametrize("vector", of("frames", "refused_prefixes", "why"))
def test_refused_prefix_is_refused(vector: dict[str, Any]) -> None:
    with pytest.raises(RemoteProtocolError):
        parse_prefix(bytes.fromhex(vector["prefix"]))


def test_published_hellos_are_read() -> None:
    for vector in read("hello")["bodies"]:
        fields = messages.to_plain(parse_hello(bytes.fromhex(vector["body"])))
        assert fields == {"renews": False, **vector["fields"]}


def test_published_tensors_decode_to_the_published_values() -> None:
    for vector in read("codecs")["tensors"]:
        expected = np.frombuffer(bytes.fromhex(vector["decoded"]), "<f4")
        out = np.empty(expected.shape, np.float32)
        encoded = np.frombuffer(bytes.fromhex(vector["encoded"]), np.uint8)
        decode(vector["codec"], encoded, out)
        assert out.tobytes() == expected.tobytes()


def test_published_statements_hold_and_a_changed_one_does_not() -> None:
    vectors = read("trust")
    root, gid = certs.certificate_from_der(bytes.fromhex(vectors["root"])), vectors["group"]
    for vector in vectors["revocations"]:
        statement = messages.from_plain(Revocation, vector["fields"])
        check_revocation(statement, gid=gid, roots=[root])
        assert (statement.id, statement.signed_bytes.hex()) == (vector["id"], vector["signed"])
        forged = dataclasses.replace(statement, reason="lost")
        with pytest.raises(TrustError, match="signature"):
            check_revocation(forged, gid=gid, roots=[root])
    (vector,) = vectors["rotations"]
    rotation = messages.from_plain(Rotation, vector["fields"])
    roots = Roots(root, [rotation], gid=gid)
    for moved in vectors["moved"]:
        ders = [bytes.fromhex(der) for der in moved["certificates"]]
        assert read_chain(ders, gid=gid, roots=roots.ever).generation == 1
    with pytest.raises(TrustError, match="not signed by the root"):
        Roots(root, [dataclasses.replace(rotation, until_s=rotation.until_s - 1)], gid=gid)


def test_published_renewal_is_understood_by_the_member() -> None:
    vectors = read("trust")
    renewal, gid = vectors["renewal"], vectors["group"]
    root = certs.certificate_from_der(bytes.fromhex(vectors["root"]))
    frames = {name: enrol_frame(raw) for name, raw in renewal["frames"].items()}
    key = X25519PrivateKey.from_private_bytes(bytes.fromhex(renewal["member_x25519"]))
    client, roots = RenewalClient(gid, key), Roots(root, gid=gid)
    assert client.offer() == frames["offer"]
    shown = client.met(frames["answer"], roots=roots, revoked=RevokedKeys())
    assert shown.clock_s == renewal["clock_s"]
    assert [r.id for r in roots.rotations] == [each["id"] for each in vectors["rotations"]]
    granted = client.granted(frames["grant"])
    assert [der.hex() for der in granted.issuers] == renewal["granted_issuers"]
    assert granted.leaf == b""


def enrol_frame(raw: str) -> EnrolFrame:
    content = bytes.fromhex(raw)
    kind, length = parse_enrol_prefix(content[: ENROL_PREFIX.size])
    assert len(content) == ENROL_PREFIX.size + length
    return EnrolFrame(kind=kind, body=content[ENROL_PREFIX.size :])
