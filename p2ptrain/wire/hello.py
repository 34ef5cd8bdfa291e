"""HELLO: the first frame in each direction. A link is up only after both agreed. Section 3.

TLS has proved who the other side is; HELLO says what it speaks. In TLS 1.3 a client learns only
at its first read whether the server took its certificate, so nothing counts before this frame.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import msgpack

from p2ptrain import limits
from p2ptrain.errors import LocalProtocolError, RemoteProtocolError
from p2ptrain.ids import DeviceId, GroupId, is_base32
from p2ptrain.training.contract import RuntimeBuild
from p2ptrain.wire.codec import from_plain, to_plain, unpack_map

PROTOCOL_MIN: Final = 4
PROTOCOL_MAX: Final = 4
RENEW: Final = "renew"
"""Feature: a link may be renewed under way (PROTOCOL.md section 3.3)."""
FEATURES: Final[tuple[str, ...]] = (RENEW,)
QUESTION_PROTOCOL: Final = 0
"""Nobody speaks it: whoever offers nothing else wants an answer and no link. Section 3.1."""
LINK_KINDS: Final = ("control", "data")
REFUSE_DUPLICATE: Final = "duplicate"
REFUSE_FULL: Final = "full"
REFUSE_VERSION: Final = "version"
REFUSE_REVOKED: Final = "revoked"
REFUSE_DATES: Final = "dates"
REFUSE_CERTIFICATE: Final = "certificate"
REVOKED: Final = "this device, or the member that admitted it, was revoked"
OUT_OF_DATE: Final = "this device's certificate is out of date there"


@dataclass(frozen=True, slots=True, kw_only=True)
class Spoken:
    """Which protocol versions one implementation speaks, and its optional abilities."""

    protocol_min: int = PROTOCOL_MIN
    protocol_max: int = PROTOCOL_MAX
    features: tuple[str, ...] = FEATURES


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """What one side of a link says about itself."""

    protocol_min: int
    protocol_max: int
    features: tuple[str, ...]
    """Optional abilities; unknown ones are ignored."""
    group: GroupId
    device: DeviceId
    instance: int
    """Drawn at random when the process started: tells a restarted peer from a re-dial."""
    kind: str
    """One of LINK_KINDS."""
    build: RuntimeBuild
    clock_s: float
    """Wall clock, seconds since 1970, so that a wrong one can be told."""
    listen_port: int
    refusal: str | None = None
    """Only in the answer: why this link is closed next. None: the link is up."""
    renews: bool = False
    """This connection takes the place of the one of its kind that is up; answered likewise."""

    @property
    def is_question(self) -> bool:
        """Whether the other side only wants to know what is spoken here."""
        return self.protocol_max == QUESTION_PROTOCOL

    def __post_init__(self) -> None:
        if not 0 <= self.protocol_min <= self.protocol_max:
            raise ValueError("the protocol range is empty")
        if len(self.features) > 32 or any(len(feature) > 32 for feature in self.features):
            raise ValueError("too many or too long features")
        if not is_base32(self.group, 16) or not is_base32(self.device, 26):
            raise ValueError("the group or device id is not one")
        if self.kind not in LINK_KINDS or not 0 <= self.listen_port < 65_536:
            raise ValueError("unknown link kind, or the port is not one")


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """What both sides of a link speak."""

    protocol: int
    features: tuple[str, ...]
    clock_ahead_s: float
    """How far the peer's wall clock is ahead of ours."""


def negotiate(ours: Hello, theirs: Hello, *, device: DeviceId) -> Agreement:
    """Find the highest common protocol and the common features.

    Args:
        device: Whom the certificate named.

    Raises:
        RemoteProtocolError: the HELLO contradicts the certificate or there is no common version;
            close the link.
    """
    if theirs.device != device or theirs.group != ours.group:
        raise RemoteProtocolError("a peer's HELLO contradicts its certificate")
    if theirs.kind != ours.kind:
        raise RemoteProtocolError("the two sides of a link disagree on its kind")
    if (gap := version_gap(ours, theirs)) is not None:
        raise RemoteProtocolError(gap)
    protocol = min(ours.protocol_max, theirs.protocol_max)
    features = tuple(sorted(set(ours.features) & set(theirs.features)))
    ahead_s = theirs.clock_s - ours.clock_s
    return Agreement(protocol=protocol, features=features, clock_ahead_s=ahead_s)


def version_gap(ours: Hello, theirs: Hello) -> str | None:
    """The sentence for two peers without a common version; None when there is one."""
    if theirs.protocol_min <= ours.protocol_max and ours.protocol_min <= theirs.protocol_max:
        return None
    older = "this device" if ours.protocol_max < theirs.protocol_min else "the other device"
    spoken = f"it speaks protocol {_range(theirs)}, this device {_range(ours)}"
    return f"{spoken}; update p2ptrain on {older}"


def _range(hello: Hello) -> str:
    if hello.protocol_min == hello.protocol_max:
        return str(hello.protocol_min)
    return f"{hello.protocol_min} to {hello.protocol_max}"


def encode_hello(hello: Hello) -> bytes:
    """The body of a HELLO frame."""
    fields = to_plain(hello)
    if not hello.renews:
        del fields["renews"]  # said by those only who found the feature on both sides
    body: bytes = msgpack.packb(fields, use_bin_type=True)
    if len(body) > limits.HELLO_BODY_BYTES_MAX:
        raise LocalProtocolError("our HELLO is too large")
    return body


def parse_hello(body: bytes | memoryview) -> Hello:
    """Read a HELLO frame's body; RemoteProtocolError when it is not one."""
    return from_plain(Hello, unpack_map(body, bytes_max=limits.HELLO_BODY_BYTES_MAX))
