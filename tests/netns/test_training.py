"""Three peers on an emulated Wi-Fi: they find each other and train to the bits of one peer."""

from __future__ import annotations

import dataclasses
import pydoc_data.topics
from pathlib import Path

from p2ptrain.runtime.reports import TrainRequest
from tests.e2e.peers import job, train
from tests.netns.stations import address, running_peers, wait_found
from tools.wifi_emulator.wifi import Wifi

STEPS = 5


def english(directory: Path) -> Path:
    """English to train on, the same wherever this Python is."""
    text = directory / "english.txt"
    topics = pydoc_data.topics.topics
    text.write_text("\n".join(topics[name] for name in sorted(topics)), encoding="utf-8")
    return text


def short_job(directory: Path, *, stages: int) -> TrainRequest:
    return dataclasses.replace(job(english(directory), stages=stages), steps=STEPS)


async def test_peers_find_each_other_by_multicast_and_train(air: Wifi, tmp_path: Path) -> None:
    async with running_peers(air, tmp_path) as peers:
        await wait_found(peers)
        for peer, station in zip(peers, air.stations, strict=True):
            announced = f"announcing on {air.addresses[station]}"
            await peer.wait_status(lambda status, said=announced: status.discovery == said, 10)
            status = await peer.status()
            reached = {at for member in status.members for at in member.addresses}
            assert {address(air, each) for each in air.stations} <= reached
        alone, _ = await train(peers[0], short_job(tmp_path, stages=1))
        before = air.tell("counts")["pairs"]
        together, watched = await train(peers[0], short_job(tmp_path, stages=3))
        after = air.tell("counts")["pairs"]
    (plan,) = watched.named("plan")
    assert len({stage["device"] for stage in plan["stages"]}) == 3
    assert together.losses == alone.losses
    assert together.state_digest == alone.state_digest
    assert len(set(together.losses)) == STEPS
    sent = sum(after[pair]["delivered_bytes"] - before[pair]["delivered_bytes"] for pair in after)
    assert sent > together.bytes_sent * 0.95  # frames repeated after a loss come on top
    assert sum(after[pair]["lost_frames"] for pair in after) > 0
