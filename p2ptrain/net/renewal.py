"""Put another connection in the place of one that is worn, without losing a frame."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable

import trio

from p2ptrain import limits
from p2ptrain.errors import RemoteProtocolError
from p2ptrain.net.connection import Connection
from p2ptrain.net.tls_link import LinkBroken, TlsLink
from p2ptrain.wire.renewal import Wear, next_change_s

Renew = Callable[[], Awaitable[TlsLink]]
"""Dials the successor of a link and agrees on HELLO; OSError, LinkBroken or RemoteProtocolError
when that fails."""


async def keep_fresh(connection: Connection, renew: Renew | None) -> None:
    """Renew a connection in time, or follow the peer that does; ends when it is cancelled.

    Args:
        connection: Ours to watch; its frames go on all the time.
        renew: Where we dialled and both sides can; None: the peer does, or nobody.

    Raises:
        LinkBroken: the link may not be used any longer.
    """
    retry_at_s = -math.inf
    while True:
        now = trio.current_time()
        worn = connection.wear(now)
        if worn is Wear.WORN_OUT:
            raise LinkBroken("the link is too old or has carried too much, and was not renewed")
        if connection.must_follow:
            await connection.move()
        elif renew is not None and worn is Wear.WORN and connection.settled and now >= retry_at_s:
            if not await _renewed(connection, renew):
                retry_at_s = trio.current_time() + limits.LINK_RENEW_RETRY_S
        else:
            retry_s = retry_at_s - now if retry_at_s > now else math.inf
            age_s = connection.age_s(now)
            await connection.wait_stirred(min(retry_s, next_change_s(age_s=age_s)))


async def _renewed(connection: Connection, renew: Renew) -> bool:
    try:
        successor = await renew()
    except (OSError, LinkBroken, RemoteProtocolError):
        return False  # the link goes on; it is tried again before its end
    connection.offer_successor(successor)
    await connection.move()
    return True
