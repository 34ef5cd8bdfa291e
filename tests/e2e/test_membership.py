"""Real peers see who is killed, who is stopped and comes back, and who only took leave."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Final

import trio

from p2ptrain.runtime.reports import MemberReport, PeerStatus
from tests.e2e.peers import PeerProcess, peer_group

KILLED_WITHIN_S: Final = 2.0
"""A refused connection tells at once; the rest is a busy machine and the polling."""
STOPPED_WITHIN_S: Final = 9.0
STOPPED_NOT_BEFORE_S: Final = 3.5
BACK_WITHIN_S: Final = 5.0


def line_of(status: PeerStatus, name: str) -> MemberReport:
    return next(member for member in status.members if member.name == name)


async def seconds_until(peers: list[PeerProcess], name: str, state: str, limit_s: float) -> float:
    """Until every one of these peers shows `name` in that state."""
    began_s = time.monotonic()

    async def wait(peer: PeerProcess) -> None:
        await peer.wait_status(lambda s: line_of(s, name).state.startswith(state), limit_s)

    async with trio.open_nursery() as nursery:
        for peer in peers:
            nursery.start_soon(wait, peer)
    return time.monotonic() - began_s


async def test_killed_and_stopped_peers_are_noticed_by_all(tmp_path: Path) -> None:
    async with peer_group(tmp_path, 4) as peers:
        first, second, stopped, killed = peers
        stopped.send(signal.SIGSTOP)
        rest = [first, second, killed]
        took_s = await seconds_until(rest, stopped.name, "dead", STOPPED_WITHIN_S)
        assert took_s > STOPPED_NOT_BEFORE_S
        stopped.send(signal.SIGCONT)
        await seconds_until(rest, stopped.name, "alive", BACK_WITHIN_S)
        back = line_of(await first.status(), stopped.name)
        assert back.last_down.startswith(("silent for", first.name, second.name, killed.name))
        assert back.linked
        assert back.round_trip_s is not None
        mine = await stopped.status()
        assert [m.state for m in mine.members if m.state != "self"] == ["alive"] * 3
        assert [m.last_down for m in mine.members] == [""] * 4  # it blames nobody

        killed.send(signal.SIGKILL)
        await seconds_until([first, second, stopped], killed.name, "dead", KILLED_WITHIN_S)
        gone = line_of(await first.status(), killed.name)
        assert gone.state_s is not None
        assert gone.state_s < KILLED_WITHIN_S
