"""Test vectors for other implementations, as JSON: what goes in, and the bytes that come out.

    python -m tests.interop.make_vectors        write tests/interop/vectors/*.json

Run it after a deliberate change of the protocol, and read the difference before committing it:
`test_vectors.py` fails whenever the code and the files disagree. `vectors/README.md` describes
each file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np

from p2ptrain.bundle.manifest import Initialiser, Tensor
from p2ptrain.errors import RemoteProtocolError
from p2ptrain.ids import DeviceId, Digest, GroupId, Lineage, ViewNumber
from p2ptrain.training.contract import RuntimeBuild
from p2ptrain.training.masks import MaskPlace, draw_mask
from p2ptrain.training.random import draw_parameter
from p2ptrain.training.sampling import heldout_records, training_records, training_spans
from p2ptrain.training.tensor_codec import (
    CODECS,
    ErrorFeedback,
    ResidualKey,
    decode,
    encode,
)
from p2ptrain.trust.enrolment import PREFIX as ENROL_PREFIX
from p2ptrain.trust.invite import Invite
from p2ptrain.wire import codec as messages
from p2ptrain.wire.frames import (
    PREFIX,
    TENSOR_KINDS,
    BulkHeader,
    FrameType,
    TensorHeader,
    encode_frame_head,
    encode_header,
)
from p2ptrain.wire.hello import Hello, encode_hello, negotiate
from tests.interop.message_samples import RUN, product_messages, sample
from tests.interop.trust_vectors import trust_vectors

FOLDER: Final = Path(__file__).parent / "vectors"
VERSION: Final = 1
CHUNK: Final = bytes(range(16))
Document = dict[str, Any]  # Any: JSON


def hello(**changes: Any) -> Hello:  # Any: fields of a HELLO
    build = RuntimeBuild(
        runtime="onnxruntime", version="1.20.0", numpy="2.1.0", machine="aarch64", isa="neon"
    )
    given = {"protocol_min": 4, "protocol_max": 4, "features": ("renew",)} | changes
    return Hello(
        group=GroupId("abcdefghijklmnop"), device=DeviceId("abcdefghijklmnopqrstuvwxyz"),
        instance=1234567890123, kind="control", build=build, clock_s=1800000000.5,
        listen_port=7000, **given,
    )  # fmt: skip


def frame_vectors() -> Document:
    """Whole frames of every type, and prefixes that must be refused."""
    frames = [
        _frame("HELLO", FrameType.HELLO, b"", encode_hello(hello()), None),
        _frame("CONTROL", FrameType.CONTROL, b"", _ready(), None),
        *(_tensor_frame(kind) for kind in TENSOR_KINDS),
        _bulk_frame(),
        _frame("MOVED", FrameType.MOVED, b"", b"", None),
    ]
    refused = {
        "another magic": (b"P2T2", 1, 0, 0, 0),
        "unknown type": (b"P2T1", 9, 0, 0, 0),
        "flags": (b"P2T1", 2, 1, 0, 1),
        "a CONTROL frame with a header": (b"P2T1", 2, 0, 1, 1),
        "a TENSOR frame without a header": (b"P2T1", 3, 0, 0, 1),
        "a header over 4096 bytes": (b"P2T1", 3, 0, 4097, 1),
        "a HELLO over 4096 bytes": (b"P2T1", 1, 0, 0, 4097),
        "a CONTROL body over 256 KiB": (b"P2T1", 2, 0, 0, (256 << 10) + 1),
        "a TENSOR over 1 GiB": (b"P2T1", 3, 0, 10, (1 << 30) + 1),
        "a chunk over 1 MiB": (b"P2T1", 4, 0, 10, (1 << 20) + 1),
        "a MOVED with a body": (b"P2T1", 5, 0, 0, 1),
    }
    return {
        "frames": frames,
        "refused_prefixes": [
            {"why": why, "prefix": PREFIX.pack(*fields).hex()} for why, fields in refused.items()
        ],
    }


def _frame(
    name: str, kind: FrameType, header: bytes, body: bytes, fields: Document | None
) -> Document:
    head = encode_frame_head(kind, header, len(body))
    return {
        "name": name, "type": int(kind), "header": fields, "body": body.hex(),
        "frame": (head + body).hex(),
    }  # fmt: skip


def _ready() -> bytes:
    return messages.encode(sample(product_messages()["ready"]))


def _tensor_frame(kind: str) -> Document:
    header = TensorHeader(
        run=RUN, lineage=Lineage(0), view=ViewNumber(1),
        plan=Digest(hashlib.sha256(b"plan").hexdigest()), kind=kind, phase="train", step=1000,
        microbatch=3, segment=2, index=0,
    )  # fmt: skip
    body = b"" if kind == "release" else CHUNK
    fields = messages.to_plain(header)
    return _frame(f"TENSOR {kind}", FrameType.TENSOR, encode_header(header), body, fields)


def _bulk_frame() -> Document:
    digest = Digest(hashlib.sha256(CHUNK).hexdigest())
    header = BulkHeader(request=7, kind="blob", digest=digest, offset=0, total=16, chunk=digest)
    fields = messages.to_plain(header)
    return _frame("BULK", FrameType.BULK, encode_header(header), CHUNK, fields)


def hello_vectors() -> Document:
    """HELLO bodies, and what two sides agree on."""
    bodies = [hello(), hello(refusal="duplicate"), hello(renews=True), hello(features=())]
    pairs = [
        ((2, 2, ("renew",)), (2, 2, ("renew",))),
        ((2, 4, ("a", "b")), (3, 9, ("b", "c"))),
        ((5, 9, ("a",)), (1, 5, ())),
        ((2, 2, ()), (3, 4, ())),
        ((4, 6, ()), (1, 3, ())),
    ]
    return {
        "bodies": [{"fields": _hello_fields(h), "body": encode_hello(h).hex()} for h in bodies],
        "negotiations": [_negotiated(*pair) for pair in pairs],
    }


def _hello_fields(value: Hello) -> Document:
    fields: Document = messages.to_plain(value)
    if not value.renews:
        del fields["renews"]
    return fields


def _negotiated(ours: tuple[int, int, tuple[str, ...]], theirs: Any) -> Document:  # Any: as ours
    def spoken(side: tuple[int, int, tuple[str, ...]]) -> Document:
        return dict(zip(("protocol_min", "protocol_max", "features"), side, strict=True))

    one, other = hello(**spoken(ours)), hello(**spoken(theirs))
    try:
        agreed = negotiate(one, other, device=other.device)
        result: Document = {"protocol": agreed.protocol, "features": list(agreed.features)}
    except RemoteProtocolError:
        result = {"refusal": "version"}
    listed = [{**spoken(side), "features": list(side[2])} for side in (ours, theirs)]
    return {"ours": listed[0], "theirs": listed[1], "agreed": result}


def message_vectors() -> Document:
    """One body of every control message."""
    made = {name: sample(cls) for name, cls in product_messages().items()}
    return {
        "messages": [
            {
                "name": name,
                "fields": _as_json(messages.to_plain(value)),
                "body": messages.encode(value).hex(),
            }
            for name, value in made.items()
        ],
        "refused_bodies": [
            {"why": why, "body": body.hex()} for why, body in REFUSED_BODIES.items()
        ],
    }


REFUSED_BODIES: Final = {
    "empty": b"",
    "not a map": b"\x93\x01\x02\x03",
    "no name": b"\x80",
    "unknown message": b"\x81\xa1t\xa4nope",
    "a field is missing": b"\x81\xa1t\xa2go",
    "a key is a number": b"\x81\x01\xa2go",
    "something follows": b"\x82\xa1t\xacblob_missing\xa7request\x01\x00",
    "ends early": b"\x82\xa1t\xacblob_missing\xa7request",
    "another type": b"\x82\xa1t\xacblob_missing\xa7request\xa11",
    "an integer over 2^63 - 1": b"\x82\xa1t\xacblob_missing\xa7request\xcf" + b"\xff" * 8,
    "claims items that are not there": b"\x81\xa1t\xdd\x00\x01\x00\x00",
    "nested over 16 levels": b"\x81\xa1t" + b"\x91" * 17 + b"\x00",
    "an extension type": b"\x81\xa1t\xd4\x01\x00",
    "text that is not UTF-8": b"\x81\xa1t\xa2\xff\xfe",
}


def _as_json(value: Any) -> Any:  # Any: JSON
    if isinstance(value, bytes):
        return {"hex": value.hex()}
    if isinstance(value, dict):
        return {key: _as_json(item) for key, item in value.items()}
    return [_as_json(item) for item in value] if isinstance(value, list) else value


def codec_vectors() -> Document:
    """Tensors under each codec, and a cotangent over three steps with error feedback."""
    made = {
        "plain": np.linspace(-3, 5, 300, dtype=np.float32),
        "ties": np.array([127, 0.5, 1.5, 2.5, -0.5, -1.5, 1.00390625, 1.01171875], np.float32),
        "tiny and large": np.array([1e-38, -1e-39, 3e38, -3.4e38, 0.0, -0.0], np.float32),
        "a block of zeros": np.zeros(257, np.float32),
    }
    tensors = [
        {"name": name, "codec": codec, "values": values.astype("<f4").tobytes().hex(),
         "encoded": encode(codec, values).tobytes().hex(), "decoded": _decoded(codec, values)}
        for name, values in made.items()
        for codec in CODECS
    ]  # fmt: skip
    return {"tensors": tensors, "error_feedback": _feedback(made["plain"])}


def _decoded(codec: str, values: np.ndarray) -> str:
    out = np.empty_like(values)
    decode(codec, encode(codec, values), out)
    return out.astype("<f4").tobytes().hex()


def _feedback(values: np.ndarray) -> Document:
    feedback, key, steps = ErrorFeedback("int8"), ResidualKey(segment=0, index=0, microbatch=0), []
    for step in range(1, 4):
        encoded = feedback.encode(key, values * np.float32(step)).tobytes().hex()
        feedback.commit()
        residual = feedback.state()[key].astype("<f4").tobytes().hex()
        steps.append({"step": step, "encoded": encoded, "residual": residual})
    raw = values.astype("<f4").tobytes().hex()
    return {"codec": "int8", "values": raw, "cotangent": "step * values", "steps": steps}


def enrolment_vectors() -> Document:
    """What follows from an invite's secret; whole exchanges are in golden/enrol-*.hex."""
    invite = Invite(
        group_name="home", addresses=("192.0.2.1:7000",), root_hash="ab" * 32,
        secret="000102030405060708090a0b0c0d0e0f", expires_at_s=1800000000.0,
    )  # fmt: skip
    return {
        "prefix_bytes": ENROL_PREFIX.size,
        "secret": invite.secret,
        "invite_id": invite.id,
        "shared_key": invite.shared_key.hex(),
    }


def draw_vectors() -> Document:
    """Philox draws: parameters, dropout masks, windows of a text, the order of records."""
    return {
        "parameters": [_parameter(k, s) for k, s in (("normal", 0.02), ("uniform", 0.5))],
        "masks": [_mask(0.1, 70), _mask(0.5, 33)],
        "windows": _windows(),
        "records": _records(),
    }


def _parameter(kind: str, scale: float) -> Document:
    tensor = Tensor(
        name="w", shape=(13, 5), dtype="float32", binding="trainable",
        initialiser=Initialiser(kind=kind, scale=scale), decay=True,
    )  # fmt: skip
    drawn = draw_parameter(7, tensor, 3).astype("<f4").tobytes().hex()
    return {
        "seed": 7, "tensor_index": 3, "kind": kind, "scale": scale, "shape": [13, 5],
        "values": drawn,
    }  # fmt: skip


def _mask(probability: float, count: int) -> Document:
    place = MaskPlace(seed=7, step=11, microbatch=2, segment=4, site=1)
    out = np.empty(count, np.float32)
    draw_mask(place, probability, out)
    return {
        **dataclasses.asdict(place), "probability": probability,
        "values": out.astype("<f4").tobytes().hex(),
    }  # fmt: skip


def _windows() -> Document:
    tokens = np.arange(1000)
    spans = training_spans(tokens, seed=7, step=11, first_sample=0, count=8, length=17)
    return {
        "tokens": 1000, "length": 17, "seed": 7, "step": 11,
        "offsets_of_samples_0_to_7": spans[:, 0].tolist(),
    }  # fmt: skip


def _records() -> Document:
    visited = [
        training_records(10, seed=7, step=s, minibatch_size=4, first_sample=0, count=4).tolist()
        for s in range(1, 7)
    ]
    heldout = heldout_records(10, sample_count=4, first_sample=0, count=4).tolist()
    return {
        "record_count": 10, "seed": 7, "minibatch_size": 4, "training_by_step": visited,
        "heldout_of_4": heldout,
    }  # fmt: skip


FILES: Final[dict[str, Callable[[], Document]]] = {
    "frames": frame_vectors,
    "hello": hello_vectors,
    "messages": message_vectors,
    "codecs": codec_vectors,
    "enrolment": enrolment_vectors,
    "draws": draw_vectors,
    "trust": trust_vectors,
}


def document(name: str) -> str:
    """The content of one file."""
    made = {"format": "p2ptrain-vectors", "version": VERSION, **FILES[name]()}
    return json.dumps(made, indent=1, ensure_ascii=True) + "\n"


def main() -> None:
    """Write every file."""
    FOLDER.mkdir(exist_ok=True)
    for name in FILES:
        (FOLDER / f"{name}.json").write_text(document(name), encoding="utf-8")


if __name__ == "__main__":
    main()
