"""A peer that dies or falls silent ends the run everywhere, and no more than the run."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import pytest
import trio

from p2ptrain.errors import PeerLost
from p2ptrain.runtime.reports import PeerStatus, TrainResult
from tests.e2e.peers import (
    STEPS,
    PeerProcess,
    RunningCommand,
    assert_refused,
    job,
    peer_group,
    resumed,
    running_command,
    train,
    typed,
    wait_all_together,
    wait_saved,
)

NOTICED_WITHIN_S: Final = 10.0
TIMEOUT_S: Final = 60.0
IDLE_WINDOW_S: Final = 4.0
IDLE_SHARE_MAX: Final = 0.05


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "silent"])
async def test_lost_stage_peer_ends_the_run_and_the_rest_goes_on_to_the_same_bits(
    how: signal.Signals, tmp_path: Path, text: Path, undisturbed: TrainResult
) -> None:
    async with peer_group(tmp_path, 3) as peers:
        home, other, lost = peers
        line = typed(job(text, stages=3))
        async with running_command(home.member, *line, timeout_s=TIMEOUT_S) as command:
            run = await wait_saved(home, command)
            lost.send(how)
            await assert_all_notice([home, other], lost, how, command)
        assert_refused(await command.wait_ended(), PeerLost.exit_code, f"peer {lost.name} (")
        await assert_idle([home, other])
        saved = run.checkpoint_steps()[-1]
        result, _ = await train(home, resumed(run.path.name, stages=2))
        assert_goes_on(result, saved, undisturbed)
        if how is signal.SIGSTOP:
            lost.send(signal.SIGCONT)
            await lost.wait_status(lambda status: status.run is None, TIMEOUT_S)
            await wait_all_together(peers)


async def test_lost_home_peer_ends_the_run_and_the_others_stay(tmp_path: Path, text: Path) -> None:
    async with peer_group(tmp_path, 3) as (home, *others):
        line = typed(job(text, stages=3))
        async with running_command(home.member, *line, timeout_s=TIMEOUT_S) as command:
            await wait_saved(home, command)
            home.send(signal.SIGKILL)
            await assert_all_notice(others, home, signal.SIGKILL, command)
        assert_refused(await command.wait_ended(), PeerLost.exit_code, "went away")
        await assert_idle(others)


async def assert_all_notice(
    remaining: Sequence[PeerProcess],
    lost: PeerProcess,
    how: signal.Signals,
    command: RunningCommand,
) -> None:
    """Every remaining peer, and whoever watches, learns of the loss in time."""
    lost_at_s = time.monotonic()
    noticed_s: dict[str, float] = {}

    async def notice(peer: PeerProcess) -> None:
        noticed_s[peer.name] = await peer.wait_status(lambda s: _names(s, lost), TIMEOUT_S)

    async with trio.open_nursery() as nursery:
        for peer in remaining:
            nursery.start_soon(notice, peer)
        await command.wait_ended()
    assert command.ended_at_s is not None
    noticed_s["train"] = command.ended_at_s - lost_at_s
    print(f"{how.name} of {lost.name} noticed after s:", noticed_s)
    assert max(noticed_s.values()) < NOTICED_WITHIN_S


def _names(status: PeerStatus, lost: PeerProcess) -> bool:
    """Whether a peer has left the run and says because of whom."""
    return status.run is None and f"peer {lost.name} (" in status.run_state


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


def assert_goes_on(result: TrainResult, saved: int, undisturbed: TrainResult) -> None:
    """A resumed run has the bits of the undisturbed one."""
    assert saved >= 5
    assert (result.first_step, len(result.losses)) == (saved, STEPS - saved)
    assert result.losses == undisturbed.losses[saved:]
    assert result.state_digest == undisturbed.state_digest
