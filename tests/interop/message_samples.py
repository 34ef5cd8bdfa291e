"""One valid object of every control message, made up from its fields, the same every time."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import p2ptrain
from p2ptrain.energy.ledger import PhaseAmount
from p2ptrain.energy.phases import PHASES
from p2ptrain.ids import DeviceId, Digest, GroupId, Lineage, RunId, ViewNumber
from p2ptrain.membership.accusation import SILENT, VERDICTS
from p2ptrain.planner.plan import Plan, StagePlan
from p2ptrain.recovery.inventory import SegmentSpan
from p2ptrain.recovery.restoration import SpanAt
from p2ptrain.training.contract import Contract, OptimizerChoice
from p2ptrain.training.owners import DataOwner
from p2ptrain.training.step_record import StepRecord
from p2ptrain.wire.codec import registered

RUN: Final = RunId("abcdefghijklmnopqrstuvwxyz")
DEVICES: Final = tuple(DeviceId(letter * 26) for letter in "abc")
WORDS: Final = {
    "form": "portable", "codec": "fp32", "schedule": "1f1b", "phase": "train", "kind": "activation",
    "activity": "idle", "power_source": "mains", "runtime": "onnxruntime", "machine": "aarch64",
    "isa": "neon", "host": "host-1", "reason": "because", "error": "PeerLost", "version": "1.20.0",
    "numpy": "2.1.0", "scope": "package", "quality": "measured",
}  # fmt: skip
"""Text fields that may not hold anything."""


def import_messages() -> None:
    """Import every module of the library that registers messages."""
    root = Path(p2ptrain.__file__).parent
    for path in sorted(root.rglob("*.py")):
        if "\n@message(" in path.read_text(encoding="utf-8"):
            name = ".".join(path.relative_to(root.parent).with_suffix("").parts)
            importlib.import_module(name)


def product_messages() -> dict[str, type]:
    """The product's messages by wire name; tests register some of their own."""
    import_messages()
    found = registered().items()
    return dict(sorted((n, c) for n, c in found if c.__module__.startswith("p2ptrain.")))


def sample(cls: type) -> Any:  # Any: an object of `cls`
    """A valid object of a message or of a dataclass in one.

    Every field says something where that is valid; else those with a default keep it.
    """
    try:
        return cls(**_fields(cls, dataclasses.fields(cls)))
    except ValueError:
        needed = [f for f in dataclasses.fields(cls) if _is_needed(f)]
    try:
        return cls(**_fields(cls, needed))
    except ValueError as error:
        where = "say how to make its fields in SPECIAL of tests/interop/message_samples.py"
        raise ValueError(f"no valid {cls.__name__} was made up ({error}): {where}") from error


def _is_needed(field: dataclasses.Field[Any]) -> bool:  # Any: whatever it holds
    defaults = (field.default, field.default_factory)
    return all(default is dataclasses.MISSING for default in defaults)


def _fields(cls: type, fields: Iterable[dataclasses.Field[Any]]) -> dict[str, Any]:  # Any: as above
    hints, special, values = typing.get_type_hints(cls), SPECIAL.get(cls.__name__, {}), {}
    for field in fields:
        if field.name in special:
            values[field.name] = special[field.name]()
        elif field.name != "version" or _is_needed(field):
            values[field.name] = _value(hints[field.name], field.name)
    if isinstance(values.get("plan"), Plan) and isinstance(values.get("contract"), Contract):
        contract = values["contract"].digest
        values["plan"] = dataclasses.replace(values["plan"], contract=contract)
    return values


def _value(kind: Any, name: str) -> Any:  # Any: type forms and values
    if kind in _BY_TYPE:
        return _BY_TYPE[kind](name)
    if isinstance(kind, typing.NewType):
        return _value(kind.__supertype__, name)
    origin, of = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return of[0]
    if origin in (types.UnionType, typing.Union):
        return _value(next(each for each in of if each is not type(None)), name)
    if origin is tuple:
        return (_value(of[0], name),)
    if origin is dict:
        return {"block": _value(of[1], name)}
    return sample(kind)


def _digest(name: str) -> Digest:
    return Digest(hashlib.sha256(name.encode()).hexdigest())


def _text(name: str) -> str:
    return WORDS.get(name, name.replace("_", "-"))


_BY_TYPE: Final[dict[Any, Any]] = {  # Any: type forms and what makes their values
    RunId: lambda name: RUN,
    DeviceId: lambda name: DEVICES[0],
    GroupId: lambda name: GroupId("abcdefghijklmnop"),
    Digest: _digest,
    Lineage: lambda name: Lineage(0),
    ViewNumber: lambda name: ViewNumber(1),
    bool: lambda name: True,
    int: lambda name: 1 + len(name),
    float: lambda name: 0.5 + len(name),
    str: _text,
    bytes: lambda name: bytes(range(16)),
}


def _stages() -> tuple[StagePlan, ...]:
    first = StagePlan(
        device=DEVICES[0], first_segment=0, segment_count=5, in_flight_max=2,
        step_compute_ns=1_000_000, memory_bytes=1 << 28, parameter_count=100_000,
    )  # fmt: skip
    return first, dataclasses.replace(first, device=DEVICES[1], first_segment=5)


def _aim() -> tuple[SpanAt, ...]:
    spans = (SegmentSpan(first=0, count=4), SegmentSpan(first=4, count=6))
    return tuple(
        SpanAt(span=span, device=device) for span, device in zip(spans, DEVICES, strict=False)
    )


def _owners() -> tuple[DataOwner, ...]:
    """Of a step of 13 microbatches, as `sample` makes it."""
    first = sample(DataOwner)
    return (
        dataclasses.replace(first, microbatches=7),
        dataclasses.replace(first, device=DEVICES[1], microbatches=6),
    )


def _fingerprints() -> tuple[str, ...]:
    return (_digest("key"),)


SPECIAL: Final[dict[str, dict[str, Any]]] = {  # Any: what makes a field's value
    "Plan": {
        "members": lambda: DEVICES,
        "home": lambda: DEVICES[0],
        "holders": lambda: DEVICES[:1],
        "private": lambda: False,
        "replicas": lambda: (DEVICES[1], None),
        "stages": _stages,
    },
    "Accusation": {"verdict": lambda: VERDICTS[0], "kind": lambda: SILENT},
    "Wanted": {"what": lambda: "state"},
    "HeldLog": {"last_step": lambda: 20},
    "View": {
        "journals": lambda: (7, 8, 0),
        "resume_step": lambda: sample(StepRecord).step,
        "aim": lambda: _aim(),
    },
    "Replay": {"shares": lambda: (3, 1)},
    "LiveShard": {"weights": lambda: (3, 1), "rank": lambda: 1},
    "Contract": {
        "dropout": lambda: 0.1,
        "optimizer": OptimizerChoice,
        "parallelism": lambda: "data",
        "owners": lambda: _owners(),
    },
    "Amounts": {"phases": lambda: {phase: sample(PhaseAmount) for phase in PHASES}},
    "Known": {
        "revocations": _fingerprints,
        "chains": lambda: {DEVICES[0]: _digest("chain")},
    },
    "ChainShown": {"certificates": lambda: (b"leaf", b"issuer")},
    "Kept": {"key": lambda: _digest("key"), "certificate": lambda: "3000"},
    "Revocation": {"keys": _fingerprints, "chain": lambda: ("3000",), "name": lambda: "phone"},
    "Rotation": {
        "number": lambda: 1,
        "root": lambda: "3000",
        "issuers": lambda: ("3001",),
        "until_s": lambda: 100,
    },
}
"""Class -> field -> what makes its value, where any value of its type will not do."""
