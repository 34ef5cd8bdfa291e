"""Open a peer inside a program of your own."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import trio

from p2ptrain.errors import unwrap
from p2ptrain.runtime.config import PeerConfig
from p2ptrain.runtime.control import serve_control_socket
from p2ptrain.runtime.peer import Peer
from p2ptrain.store.groups import load_group
from p2ptrain.store.home import lock_group, open_home


@contextlib.asynccontextmanager
async def open_peer(
    group: str, *, home: str | Path | None = None, config: PeerConfig | None = None
) -> AsyncIterator[Peer]:
    """Run this device's peer of a group for the length of the block.

    Args:
        group: Name or id of a group that this device has joined.
        home: The state directory; None: P2PTRAIN_HOME, or ~/.p2ptrain.
        config: What the owner decides; None: the defaults.

    The peer ends with the block: a run that it conducts is abandoned at its last checkpoint.
    Of several errors that end the block together, the one that explains most is raised.

    Raises:
        NotFound: this device has no such group.
        PeerAlreadyRunning: another process runs the peer of this group.
        PortInUse, TrustError, ConfigError: the sentence says what to do.
    """
    opened = open_home(None if home is None else Path(home))
    known = load_group(opened, group)
    with lock_group(opened, known.id):
        peer = Peer(home=opened, group=known, config=config or PeerConfig())
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(peer.run)
                await nursery.start(serve_control_socket, peer)
                yield peer
                nursery.cancel_scope.cancel()
        except ExceptionGroup as group:
            raise unwrap(group) from group
