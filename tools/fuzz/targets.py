"""What a fuzzer throws at the readers of hostile bytes, and what they must keep to.

A target takes any bytes and returns when they were read or refused as PROTOCOL.md says. Anything
else that is raised is a finding. `check` also holds the memory of one input to a bound.
"""

from __future__ import annotations

import json
import os
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import trio
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from p2ptrain import limits
from p2ptrain.data.portable import DataFile, DataManifest, DataPlace, parse_data_manifest
from p2ptrain.errors import RemoteProtocolError, TrustError
from p2ptrain.ids import DeviceId, GroupId
from p2ptrain.membership.record import MemberRecord
from p2ptrain.net.connection import BodyReader, Connection
from p2ptrain.net.tls_link import LinkBroken, LinkStatistics, TlsLink
from p2ptrain.runtime import peer  # noqa: F401  (registers every message that a peer understands)
from p2ptrain.training.step_tensors import Expected, pack, pack_bodies, unpack_arrays
from p2ptrain.training.tensor_codec import decode as decode_tensor
from p2ptrain.trust.code import read_pending_code
from p2ptrain.trust.code_enrolment import CodeJoiner, CodeSponsor
from p2ptrain.trust.enrolment import (
    CODE_ANSWER,
    CODE_CONFIRM,
    CODE_OFFER,
    CODE_PROOF,
    PREFIX,
    EnrolFrame,
    EnrolmentGrant,
    EnrolmentRequest,
    Sponsor,
    parse_enrol_prefix,
)
from p2ptrain.trust.invite import invite_url, read_invite, read_invite_url, read_pending
from p2ptrain.wire import codec, frames
from p2ptrain.wire.hello import parse_hello

ROOT: Final = Path(__file__).resolve().parents[2]
CORPUS: Final = Path(__file__).resolve().parent / "corpus"
VECTORS: Final = ROOT / "tests" / "interop" / "vectors"
REFUSALS: Final = (RemoteProtocolError, TrustError, LinkBroken)
STEP: Final = (
    Expected(microbatch=0, index=0, shape=(2, 2), dtype="float32"),
    Expected(microbatch=0, index=1, shape=(3,), dtype="bool"),
    Expected(microbatch=1, index=0, shape=(300,), dtype="float32", codec="int8"),
)
ALLOWANCE_BYTES: Final = 256 * 1024
BYTES_PER_BYTE: Final = 100
"""Python objects per byte of msgpack: an empty map is one byte there and 64 here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One reader of hostile bytes."""

    name: str
    run: Callable[[bytes], object]
    seeds: Callable[[], list[bytes]]
    allowance_bytes: int = ALLOWANCE_BYTES
    """What it may allocate beside BYTES_PER_BYTE for each byte of input."""


def check(target: Target, data: bytes) -> None:
    """Run one input; AssertionError when it took more memory than it may, or what was raised."""
    allowed = target.allowance_bytes + BYTES_PER_BYTE * len(data)
    peak = _peak_bytes(target, data)
    if peak > allowed and (peak := _peak_bytes(target, data)) > allowed:  # caches are filled now
        raise AssertionError(f"{peak} bytes allocated for an input of {len(data)}")


def _peak_bytes(target: Target, data: bytes) -> int:
    """The most memory that one input took."""
    begun = tracemalloc.is_tracing()
    if not begun:
        tracemalloc.start()
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    try:
        target.run(data)
    except REFUSALS:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1] - before
        if not begun:
            tracemalloc.stop()
    return peak


def corpus(target: Target) -> list[bytes]:
    """Seeds, and what earlier campaigns kept."""
    path = CORPUS / f"{target.name}.hex"
    lines = path.read_text(encoding="ascii").splitlines() if path.is_file() else []
    return [*target.seeds(), *map(bytes.fromhex, lines)]


# Messages: what is read must be written again without an error.


def run_message(data: bytes) -> None:
    """A CONTROL frame's body."""
    codec.encode(codec.decode(data))


def run_hello(data: bytes) -> None:
    """A HELLO frame's body."""
    parse_hello(data)


def run_record(data: bytes) -> None:
    """A member's record, as gossip or a journal holds it."""
    fields = codec.unpack_map(data, bytes_max=limits.CONTROL_BODY_BYTES_MAX)
    codec.from_plain(MemberRecord, fields)


def run_frame(data: bytes) -> None:
    """One frame: prefix, then its header."""
    prefix = frames.parse_prefix(data[: frames.PREFIX_BYTES])
    header = data[frames.PREFIX_BYTES :][: prefix.header_length]
    if prefix.type is frames.FrameType.TENSOR:
        frames.parse_tensor_header(header, body_length=prefix.body_length)
    elif prefix.type is frames.FrameType.BULK:
        parsed = frames.parse_bulk_header(header, body_length=prefix.body_length)
        frames.check_chunk(parsed, data[frames.PREFIX_BYTES + prefix.header_length :])


def run_tensor(data: bytes) -> None:
    """An encoded tensor; the first two bytes say which the receiver waits for."""
    if len(data) < 2:
        return
    elements, compressed = 8 * data[0], "int8" if data[1] & 1 else "bf16"
    out = np.zeros(elements, np.float32)
    decode_tensor(compressed, np.frombuffer(data[2:], np.uint8), out)
    if compressed == "int8" and not np.isfinite(out).all():
        raise AssertionError("an int8 tensor decodes to something that is not finite")


def run_packed_step(data: bytes) -> None:
    """The packed tensors of a replayed step."""
    unpack_arrays(data, STEP)


def run_data_list(data: bytes) -> None:
    """The list of a run's data; a name that is taken stays below its place."""
    for place in parse_data_manifest(data).places:
        for file in place.files:
            whole = os.path.normpath(f"/here/{file.name}")
            if whole != f"/here/{file.name}" or not whole.startswith("/here/"):
                raise AssertionError(f"{file.name!r} leads elsewhere")
            if sum(size for _, size in file.blobs) != file.bytes:
                raise AssertionError(f"{file.name!r} has parts of another size")


# Trust.


def run_invite(data: bytes) -> None:
    """An invite file or URL, and a sponsor's half of one."""
    for read in (read_invite, read_pending, read_pending_code, _read_url):
        try:
            read(data)
        except TrustError:
            continue


def run_enrolment(data: bytes) -> None:
    """A joiner's messages one after the other, at a sponsor; then what would be sealed in them."""
    sponsor = Sponsor(X25519PrivateKey.from_private_bytes(b"s" * 32), root_hash="ab" * 32)
    messages, rest = [], data
    while len(rest) >= PREFIX.size and len(messages) < 3:
        kind, length = parse_enrol_prefix(rest[: PREFIX.size])
        messages.append(EnrolFrame(kind=kind, body=rest[PREFIX.size :][:length]))
        rest = rest[PREFIX.size + length :]
    if messages:
        sponsor.invite_id(messages[0])
        _, sealed = sponsor.answer(messages[0], bytes(32))
        for message in messages[1:]:
            sealed.asked(message)


def run_code(data: bytes) -> None:
    """Both sides of the exchange with a short code, at each step; the first byte says which."""
    if not data:
        return
    step = data[0] % 4
    kind = (CODE_OFFER, CODE_ANSWER, CODE_PROOF, CODE_CONFIRM)[step]
    frame = EnrolFrame(kind=kind, body=data[1:])
    joiner = CodeJoiner(b"password", bytes(16), entropy=_sevens)
    sponsor = CodeSponsor(GroupId("a" * 16), bytes(16), entropy=_sevens)
    if step == 0:
        sponsor.answer(frame, b"password")
        return
    answer = sponsor.answer(joiner.offer(), b"password")
    if step == 1:
        joiner.proof(frame)
        return
    proof = joiner.proof(answer)
    if step == 2:
        sponsor.agreed(frame)
        return
    sponsor.agreed(proof)
    joiner.agreed(frame)


def run_enrolment_fields(data: bytes) -> None:
    """What an authenticated side of an enrolment says."""
    for cls in (EnrolmentRequest, EnrolmentGrant):
        try:
            codec.from_plain(cls, codec.unpack_map(data, bytes_max=limits.ENROL_BODY_BYTES_MAX))
        except RemoteProtocolError:
            continue


def _read_url(data: bytes) -> None:
    read_invite_url(data.decode("utf-8", "replace"))


def _sevens(count: int) -> bytes:
    return bytes([7]) * count


# Whole connections.


class ByteLink:
    """A link whose peer sent these bytes and then went away; what is sent to it is dropped."""

    made_at_s = 0.0

    def __init__(self, data: bytes) -> None:
        self._left = memoryview(data)

    async def recv_frame_start(self, target: memoryview) -> bool:
        """Fill `target`, or tell that the stream has ended."""
        if not self._left:
            return False
        await self.recv_exactly(target)
        return True

    async def recv_exactly(self, target: memoryview) -> None:
        """Fill `target`."""
        if len(self._left) < len(target):
            raise LinkBroken("cut short", closed_by_peer=True)
        target[:] = self._left[: len(target)]
        self._left = self._left[len(target) :]

    async def send_all(self, *buffers: bytes) -> None:
        """Drop it."""

    def statistics(self) -> LinkStatistics:
        """Nothing was counted."""
        return LinkStatistics(
            plaintext_bytes_sent=0, plaintext_bytes_received=0, socket_bytes_sent=0,
            socket_bytes_received=0, unsent_bytes=0,
        )  # fmt: skip


def run_connection(data: bytes) -> None:
    """HELLO, then frames, on a link whose kind the first byte says."""
    trio.run(_read_connection, data)


async def _read_connection(data: bytes) -> None:
    link = cast(TlsLink, ByteLink(data[1:]))
    connection = Connection(link, device=DeviceId("a" * 26), kind="", dialled_here=False)
    await connection.receive_hello()
    if data[0] & 1:
        await connection.read_control(_drop)
    else:
        await connection.read_data(_discard, _drop)


async def _drop(*_: object) -> None:
    """Take a message or chunk and forget it."""


async def _discard(_: object, header: object, length: int, reader: BodyReader) -> None:
    await reader.discard()


# Seeds, from the published vectors.


def _vectors(name: str, part: str, key: str) -> list[bytes]:
    found: dict[str, Any] = json.loads((VECTORS / f"{name}.json").read_text(encoding="utf-8"))
    return [bytes.fromhex(each[key]) for each in found[part]]


def _message_seeds() -> list[bytes]:
    return _vectors("messages", "messages", "body") + _vectors("messages", "refused_bodies", "body")


def _hello_seeds() -> list[bytes]:
    return _vectors("hello", "bodies", "body")


def _frame_seeds() -> list[bytes]:
    return _vectors("frames", "frames", "frame") + _vectors("frames", "refused_prefixes", "prefix")


def _tensor_seeds() -> list[bytes]:
    return [bytes([1, 0]) + bytes(16), bytes([1, 1]) + bytes(12), bytes([40, 1]) + bytes(328)]


def _connection_seeds() -> list[bytes]:
    hello, *others = _vectors("frames", "frames", "frame")
    return [bytes([kind]) + hello + other for kind in (0, 1) for other in others]


def _record_seeds() -> list[bytes]:
    for body in _vectors("messages", "messages", "body"):
        message = codec.decode(body)
        record = getattr(message, "record", None)
        if isinstance(record, MemberRecord):
            return [frames.msgpack.packb(codec.to_plain(record))]
    return []


def _enrolment_seeds() -> list[bytes]:
    golden = ROOT / "tests" / "interop" / "golden"
    files = [golden / f"enrol-{name}.hex" for name in ("offer", "request", "answer", "grant")]
    parts = [bytes.fromhex(path.read_text()) for path in files if path.is_file()]
    return [b"".join(parts[:2]), *parts]


def _code_seeds() -> list[bytes]:
    golden = ROOT / "tests" / "interop" / "golden"
    files = [golden / f"code-{name}.hex" for name in ("offer", "answer", "proof", "confirm")]
    bodies = [bytes.fromhex(path.read_text())[PREFIX.size :] for path in files]
    return [bytes([step]) + body for step, body in enumerate(bodies)]


def _field_seeds() -> list[bytes]:
    request = EnrolmentRequest(name="beta", device_csr=b"device", issuer_csr=b"issuer")
    grant = EnrolmentGrant(group_name="home", root=b"root", issuers=(b"a",), clock_s=1.5)
    return [frames.msgpack.packb(codec.to_plain(each)) for each in (request, grant)]


def _invite_seeds() -> list[bytes]:
    invite = {
        "group_name": "home", "addresses": ["192.0.2.1:7000"], "root_hash": "ab" * 32,
        "secret": "00" * 16, "expires_at_s": 1.8e9, "version": 1,
    }  # fmt: skip
    code = {"password": "00" * 32, "expires_at_s": 1.8e9, "tries_left": 3, "admits": True}
    url = invite_url(read_invite(json.dumps(invite).encode())).encode()
    pending = {"shared_key": "00" * 32, "expires_at_s": 1.8e9, "version": 1}
    return [url, *(json.dumps(each).encode() for each in (invite, pending, code))]


def _step_seeds() -> list[bytes]:
    bodies = [bytes(each.nbytes) for each in STEP]
    return [pack_bodies(STEP, bodies) or b"", pack([])]


def _data_list_seeds() -> list[bytes]:
    part = "1" * 64
    large = DataFile(
        name="b/c.txt", bytes=limits.DATA_PART_BYTES + 1, digest=part, parts=(part,) * 2
    )
    small = DataFile(name="a.txt", bytes=9, digest=part)
    places = (
        DataPlace(role="training", is_folder=True, files=(small, large)),
        DataPlace(role="heldout", is_folder=False, files=(small,)),
    )
    manifest = DataManifest(places=places, text_field=None, label_field="kind")
    return [manifest.to_bytes(), b"{}"]


FRAME_BYTES_MAX: Final = limits.BULK_CHUNK_BYTES_MAX + limits.CONTROL_BODY_BYTES_MAX

TARGETS: Final = {
    target.name: target
    for target in (
        Target(name="message", run=run_message, seeds=_message_seeds),
        Target(name="hello", run=run_hello, seeds=_hello_seeds),
        Target(name="record", run=run_record, seeds=_record_seeds),
        Target(name="frame", run=run_frame, seeds=_frame_seeds),
        Target(name="tensor", run=run_tensor, seeds=_tensor_seeds),
        Target(name="packed-step", run=run_packed_step, seeds=_step_seeds),
        Target(name="data-list", run=run_data_list, seeds=_data_list_seeds),
        Target(name="invite", run=run_invite, seeds=_invite_seeds),
        Target(name="enrolment", run=run_enrolment, seeds=_enrolment_seeds),
        Target(name="code", run=run_code, seeds=_code_seeds),
        Target(name="enrolment-fields", run=run_enrolment_fields, seeds=_field_seeds),
        Target(
            name="connection", run=run_connection, seeds=_connection_seeds,
            allowance_bytes=ALLOWANCE_BYTES + FRAME_BYTES_MAX,
        ),
    )
}  # fmt: skip
