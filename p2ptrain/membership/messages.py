"""What peers say to each other about membership, over the control links."""

from __future__ import annotations

from dataclasses import dataclass

from p2ptrain import limits
from p2ptrain.ids import DeviceId
from p2ptrain.membership.accusation import Accusation
from p2ptrain.membership.record import MemberRecord
from p2ptrain.wire.codec import message


@message("membership.ping")
@dataclass(frozen=True, slots=True, kw_only=True)
class Ping:
    """Are you there? Names the newest record of the addressee that the sender holds."""

    sequence: int
    incarnation: int = -1
    version: int = -1


@message("membership.ack")
@dataclass(frozen=True, slots=True, kw_only=True)
class Ack:
    """Answers a ping; carries the answering peer's own record when the asker's is not it."""

    sequence: int
    record: MemberRecord | None = None


@message("membership.ask_for")
@dataclass(frozen=True, slots=True, kw_only=True)
class AskFor:
    """Ask `target` for me: I get no answer from it, or have no link with it."""

    sequence: int
    target: DeviceId


@message("membership.vouch")
@dataclass(frozen=True, slots=True, kw_only=True)
class Vouch:
    """Answers an AskFor: the target has just answered."""

    sequence: int
    target: DeviceId


@message("membership.news")
@dataclass(frozen=True, slots=True, kw_only=True)
class News:
    """Records, each written by its own device, and what is said against members.

    A record without an accusation beside it stands for a member that the sender holds alive.
    """

    records: tuple[MemberRecord, ...] = ()
    accusations: tuple[Accusation, ...] = ()

    def __post_init__(self) -> None:
        if len(self.records) > limits.RECORDS_PER_MESSAGE_MAX:
            raise ValueError("too many records in one message")
        if len(self.accusations) > limits.ACCUSATIONS_PER_MESSAGE_MAX:
            raise ValueError("too many accusations in one message")


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """Which record of one member the sender of holdings holds."""

    device: DeviceId
    incarnation: int
    version: int
    content: int
    """CRC-32 of the record, for two lives of a device that began in the same second."""
    dead: int | None = None
    """The refutations in spite of which the sender holds this incarnation dead; None: alive."""

    def __post_init__(self) -> None:
        if not 0 <= self.incarnation <= limits.INCARNATION_MAX or self.version < 0:
            raise ValueError("the incarnation or version in holdings is out of range")
        if self.dead is not None and not 0 <= self.dead < limits.INCARNATION_MAX:
            raise ValueError("the refutations in holdings are out of range")


@message("membership.holdings")
@dataclass(frozen=True, slots=True, kw_only=True)
class Holdings:
    """Everything the sender holds, by rank: the other side sends what is newer there.

    With `reply_wanted` it also answers with its own holdings when it lacks something.
    """

    held: tuple[Held, ...]
    reply_wanted: bool = False

    def __post_init__(self) -> None:
        if len(self.held) > limits.MEMBERS_KNOWN_MAX + 1:
            raise ValueError("too many members in holdings")


@message("membership.linked")
@dataclass(frozen=True, slots=True, kw_only=True)
class Linked:
    """Whom the sender has links with: it can ask these for others."""

    devices: tuple[DeviceId, ...]

    def __post_init__(self) -> None:
        if len(self.devices) > limits.LINK_PEERS_MAX:
            raise ValueError("too many links")


MembershipMessage = Ping | Ack | AskFor | Vouch | News | Holdings | Linked
"""What the membership machine takes; usable with isinstance."""
