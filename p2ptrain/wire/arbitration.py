"""Two peers that dial each other at once keep exactly one connection of each kind.

The device with the lower id decides, and only it: the first connection that it commits to
stays. It commits to one it dialled just before it sends HELLO, and to one it accepted when it
answers HELLO. So both sides agree without a message more, and a link that is up is never
replaced by a late twin. PROTOCOL.md section 3.2.
"""

from __future__ import annotations

from enum import Enum

from p2ptrain.ids import DeviceId


class Standing(Enum):
    """What we already have with a peer, for the kind of the new connection."""

    NONE = "none"
    SAME_INSTANCE = "same instance"
    """A connection to the same process, or one that has not said yet which process it is."""
    OTHER_INSTANCE = "other instance"
    """A connection to a process of that peer which is gone: it was restarted."""


def may_offer(standing: Standing) -> bool:
    """Whether a connection that we dialled may send HELLO; otherwise we drop it unused."""
    return standing is Standing.NONE


def may_accept(ours: DeviceId, theirs: DeviceId, standing: Standing) -> bool:
    """Whether we answer the HELLO of a connection they dialled; it then replaces `standing`.

    Otherwise we answer with the refusal `duplicate`.
    """
    if standing is Standing.SAME_INSTANCE:
        return theirs < ours  # the lower device decided; what we have is stale
    return True
