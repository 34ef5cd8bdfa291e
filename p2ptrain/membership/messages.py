"""What peers say to each other about membership, over the control links."""

from __future__ import annotations

from dataclasses import dataclass

from p2ptrain import limits
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


@message("membership.records")
@dataclass(frozen=True, slots=True, kw_only=True)
class Records:
    """Push of the records a peer holds; with `reply_wanted` the other side pushes its own."""

    records: tuple[MemberRecord, ...]
    reply_wanted: bool = False

    def __post_init__(self) -> None:
        if len(self.records) > limits.RECORDS_PER_MESSAGE_MAX:
            raise ValueError("too many records in one message")
