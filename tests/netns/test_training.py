"""Three peers on an emulated Wi-Fi: they find each other and train; the network falls apart in
the middle of the run and heals; the loss curve is that of one undisturbed peer."""

from __future__ import annotations

import dataclasses
import pydoc_data.topics
from pathlib import Path

import trio

from p2ptrain.runtime.reports import RunStatusReport, TrainRequest
from tests.bundles import tiny_bundle, write_bundle
from tests.e2e.peers import POLL_S, PeerProcess, Watched, job, train
from tests.netns.stations import address, running_peers, wait_found
from tools.wifi_emulator.wifi import Wifi

STEPS = 100
CUT_AFTER = 8
HEALED_AFTER = 6
"""Steps that the majority makes by itself before the network heals."""
SLOW, USUAL = "set delay=100", "set delay=5"
"""While it is cut and heals, steps take longer: the run shall not be over before that."""
NOTICED_S = 60.0


async def test_run_survives_a_partition_and_its_healing_bit_by_bit(
    air: Wifi, tmp_path: Path
) -> None:
    async with running_peers(air, tmp_path) as peers:
        await wait_found(peers)
        await assert_found_by_multicast(air, peers)
        watched = Watched()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(disturb, air, peers, watched)
            result, _ = await train(peers[0], hundred_steps(tmp_path, stages=3), watched)
        counts = air.tell("counts")["pairs"]
        alone, _ = await train(peers[0], hundred_steps(tmp_path, stages=1))
    assert len(set(result.losses)) == STEPS
    assert result.losses == alone.losses
    assert result.state_digest == alone.state_digest
    assert sum(counts[pair]["lost_frames"] for pair in counts) > 0
    assert counts["c>a"]["cut_frames"] > 0
    assert counts["a>b"]["cut_frames"] == 0


async def assert_found_by_multicast(air: Wifi, peers: tuple[PeerProcess, ...]) -> None:
    """Nobody was told where the others are; everybody announces, and knows all addresses."""
    for peer, station in zip(peers, air.stations, strict=True):
        announced = f"announcing on {air.addresses[station]}"
        await peer.wait_status(lambda status, said=announced: status.discovery == said, 10)
        status = await peer.status()
        reached = {at for member in status.members for at in member.addresses}
        assert {address(air, each) for each in air.stations} <= reached


async def disturb(air: Wifi, peers: tuple[PeerProcess, ...], watched: Watched) -> None:
    """Cut the third peer off, see both sides, and heal."""
    first, _, third = peers
    await watched.wait_step(CUT_AFTER)
    before = await run_of(first)
    air.tell(SLOW)
    air.tell("partition c a,b")
    await third.wait_status(
        lambda status: (
            status.run_status is not None
            and (status.run_status.waits_for or "").startswith("paused: no quorum (1 of 3")
        ),
        NOTICED_S,
    )
    behind = await run_of(third)
    await watched.wait_step(behind.step + HEALED_AFTER)
    after = await run_of(first)
    assert after.view > before.view == behind.view
    air.tell("heal")
    await third.wait_status(
        lambda status: (
            status.run_status is not None
            and status.run_status.view >= after.view
            and status.run_status.waits_for is None
        ),
        NOTICED_S,
    )
    air.tell(USUAL)


async def run_of(peer: PeerProcess) -> RunStatusReport:
    """Where a peer says that the run stands."""
    while (report := (await peer.status()).run_status) is None:  # noqa: ASYNC110 another process
        await trio.sleep(POLL_S)
    return report


def hundred_steps(directory: Path, *, stages: int) -> TrainRequest:
    """A hundred steps of a tiny model on English, the same wherever this Python is."""
    text = directory / "english.txt"
    topics = pydoc_data.topics.topics
    text.write_text("\n".join(topics[name] for name in sorted(topics)), encoding="utf-8")
    bundle = write_bundle(directory / f"bundle-{stages}", tiny_bundle(blocks=4))
    return dataclasses.replace(job(text, stages=stages), bundle=str(bundle), steps=STEPS)


async def test_way_between_two_members_that_is_cut_is_planned_around(
    air: Wifi, tmp_path: Path
) -> None:
    """Both ends live and the third peer reaches both: one of them stays out of the next view."""
    async with running_peers(air, tmp_path) as peers:
        await wait_found(peers)
        watched = Watched()
        cut_for_s: list[float] = []

        async def cut() -> None:
            await watched.wait_step(CUT_AFTER)
            first = peers[0]
            await first.wait_status(  # the data has its second copy, and replicas are whole
                lambda s: s.run_status is not None and s.run_status.safety.startswith("protected"),
                NOTICED_S,
            )
            air.tell(SLOW)
            began_s, before = trio.current_time(), (await run_of(first)).step
            air.tell("cut b c")
            await watched.wait_step(before + HEALED_AFTER)
            cut_for_s.append(trio.current_time() - began_s)
            air.tell("heal")
            air.tell(USUAL)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(cut)
            result, _ = await train(peers[0], hundred_steps(tmp_path, stages=3), watched)
        alone, _ = await train(peers[0], hundred_steps(tmp_path, stages=1))
    print(f"six steps, with the way cut at the beginning, took {cut_for_s[0]:.1f} s")
    assert result.losses == alone.losses
    assert result.state_digest == alone.state_digest
