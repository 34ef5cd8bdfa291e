"""A stolen device: put out with one command, cut off within seconds, refused when it returns."""

from __future__ import annotations

import json
import time
from pathlib import Path

import trio

from p2ptrain.demo.group import GROUP_NAME
from p2ptrain.net.control_socket import call
from p2ptrain.runtime.reports import PeerStatus, TrainResult
from tests.e2e.peers import STEPS, Watched, assert_refused, command, job, peer_group, train

CLOSED_S = 5.0


def sees(status: PeerStatus, name: str) -> str:
    (state,) = (member.state for member in status.members if member.name == name)
    return state


async def test_revoked_member_is_cut_off_within_seconds_and_refused_when_it_returns(
    tmp_path: Path,
) -> None:
    async with peer_group(tmp_path, 3) as (home, other, stolen):
        line = ("group", "revoke", stolen.name, "--reason", "left in a train", "--json")
        ended = await command(home.member, *line)
        began_s = time.monotonic()
        assert ended.returncode == 0, ended.stderr
        assert json.loads(ended.stdout)["told"] == 2
        for peer in (home, other):
            left_s = CLOSED_S - (time.monotonic() - began_s)
            await peer.wait_status(
                lambda status: sees(status, stolen.name).startswith("dead"), left_s
            )
        await stolen.wait_status(lambda status: "revoked" in str(status.alone_because), 30.0)
        listed = await command(other.member, "group", "members", GROUP_NAME, "--json")
        states = {each["name"]: each["state"] for each in json.loads(listed.stdout)["members"]}
        assert states == {home.name: "member", other.name: "member", stolen.name: "revoked"}
        assert_refused(await command(home.member, *line), 2, "revoked already")

        # All of them start again: what is on disk keeps it out.
        for peer in (home, other, stolen):
            await peer.kill()
        address = (await home.start()).address
        async with trio.open_nursery() as nursery:
            nursery.start_soon(other.start, address)
            nursery.start_soon(stolen.start, address)
        await stolen.wait_status(lambda status: "revoked" in str(status.alone_because), 30.0)
        await other.wait_status(lambda status: sees(status, home.name) == "alive", 30.0)
        for peer in (home, other):
            shown = {member.name: member.state for member in (await peer.status()).members}
            assert not shown.get(stolen.name, "dead").startswith(("alive", "suspect"))


async def test_device_revoked_while_the_revokers_peer_is_down_is_out_once_it_starts(
    tmp_path: Path,
) -> None:
    async with peer_group(tmp_path, 3) as (home, other, stolen):
        await home.kill()
        line = ("group", "revoke", stolen.name, "--reason", "sold")
        ended = await command(home.member, *line)
        assert ended.returncode == 0
        assert "nobody else knows yet" in ended.stderr
        address = (await other.status()).address
        await home.start(address)
        await other.wait_status(lambda status: sees(status, stolen.name).startswith("dead"), 20.0)


async def test_run_goes_on_without_a_member_that_is_revoked_in_mid_run(
    tmp_path: Path, text: Path, undisturbed: TrainResult
) -> None:
    async with peer_group(tmp_path, 3) as (home, other, stolen):
        watched = Watched()
        results: list[TrainResult] = []

        async def conduct() -> None:
            result, _ = await train(home, job(text, stages=3), watched)
            results.append(result)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(conduct)
            await watched.wait_step(5)
            wanted = {"device": stolen.name, "reason": "stolen", "keep_none": True}
            await call(other.member.socket(), "revoke", wanted, lambda _name, _data: None)
            reached, began_s = watched.steps[-1].step, time.monotonic()
            assert reached + 3 < STEPS
            await watched.wait_step(reached + 3)
            print(f"three steps more {time.monotonic() - began_s:.2f} s after the revocation")
        (result,) = results
        assert result.losses == undisturbed.losses
        assert result.state_digest == undisturbed.state_digest
        for peer in (home, other):
            status = await peer.status()
            there = {m.name for m in status.members if m.state in ("self", "alive")}
            assert there == {home.name, other.name}
        await stolen.wait_status(lambda status: "revoked" in str(status.alone_because), 30.0)
