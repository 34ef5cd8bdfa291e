"""A run goes on without a peer that dies or falls silent, to the bits of an undisturbed one."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import pytest
import trio

from p2ptrain.runtime.reports import TrainResult
from tests.e2e.peers import PeerProcess, Watched, job, peer_group, train, wait_all_together

NEXT_STEP_WITHIN_S: Final = {signal.SIGKILL: 10.0, signal.SIGSTOP: 20.0}
TIMEOUT_S: Final = 60.0
IDLE_WINDOW_S: Final = 4.0
IDLE_SHARE_MAX: Final = 0.05


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "silent"])
async def test_run_goes_on_without_a_stage_peer_to_the_same_bits(
    how: signal.Signals, tmp_path: Path, text: Path, undisturbed: TrainResult
) -> None:
    async with peer_group(tmp_path, 3) as peers:
        home, other, lost = peers
        results: list[TrainResult] = []
        watched = Watched()

        async def conduct() -> None:
            result, _ = await train(home, job(text, stages=3), watched)
            results.append(result)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(conduct)
            await watched.wait_step(7)
            lost.send(how)
            lost_at_s, reached = time.monotonic(), watched.steps[-1].step
            await watched.wait_step(reached + 2)
            waited_s = time.monotonic() - lost_at_s
            print(f"{how.name}: a new step after {waited_s:.2f} s")
        (result,) = results
        assert result.losses == undisturbed.losses
        assert result.state_digest == undisturbed.state_digest
        assert waited_s < NEXT_STEP_WITHIN_S[how]
        await assert_idle([home, other])
        if how is signal.SIGSTOP:
            lost.send(signal.SIGCONT)
            await lost.wait_status(lambda status: status.run is None, TIMEOUT_S)
            await wait_all_together(peers)


async def assert_idle(peers: Sequence[PeerProcess]) -> None:
    """They see each other, and nobody else, and hardly compute."""
    for peer in peers:
        status = await peer.status()
        there = {member.name for member in status.members if member.state in ("self", "alive")}
        assert there == {each.name for each in peers}
    began_s = {peer.name: peer.cpu_seconds() for peer in peers}
    await trio.sleep(IDLE_WINDOW_S)  # the window of a measurement, not a wait
    shares = {p.name: (p.cpu_seconds() - began_s[p.name]) / IDLE_WINDOW_S for p in peers}
    print("share of a core while idle:", shares)
    assert max(shares.values()) < IDLE_SHARE_MAX
