"""Peers as a program embeds them: two in one process, over real TLS on loopback."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import trio

from p2ptrain import limits
from p2ptrain.embed import open_peer
from p2ptrain.errors import ConfigError, NotFound, PeerAlreadyRunning, PeerLost, PortInUse
from p2ptrain.runtime.config import PeerConfig
from p2ptrain.runtime.peer import SELF_QUEUE_MAX, Peer
from p2ptrain.runtime.reports import PlanReport
from p2ptrain.store.groups import Group
from tests.bundles import tiny_bundle
from tests.memory_group import request_for, until
from tests.shell.conftest import MintGroup

SECONDS_MAX = 30
BUNDLE = tiny_bundle()


def quiet(**changes: object) -> PeerConfig:
    settings = {"port": 0, "listen_host": "127.0.0.1", "discovery": False, "threads": 1, **changes}
    return PeerConfig(**settings)  # type: ignore[arg-type]  # fields by name


def opened(group: Group, **changes: object) -> contextlib.AbstractAsyncContextManager[Peer]:
    home = group.folder.parents[1]
    return open_peer(group.name, home=home, config=quiet(**changes))


async def until_alive(peer: Peer, count: int) -> None:
    await until(lambda: len(peer.alive()) >= count)


async def test_boundary_costs_the_bytes_that_the_manifest_predicts(
    tmp_path: Path, mint_group: MintGroup
) -> None:
    one, two = mint_group(2)
    steps, microbatches, samples = 3, 2, 64
    async with opened(one) as home, opened(two, peers=home.addresses()):
        await until_alive(home, 2)
        with trio.fail_after(SECONDS_MAX):
            wanted = request_for(
                tmp_path, BUNDLE, stages=2, steps=steps, microbatches=microbatches,
                microbatch_size=samples,
            )  # fmt: skip
            plans: list[PlanReport] = []

            def watch(name: str, report: object) -> None:
                plans.extend([report] if isinstance(report, PlanReport) else [])

            result = await home.train(wanted, watch)
    first, last = (stage.device for stage in plans[0].stages)
    cut = plans[0].stages[0].last_segment
    size = BUNDLE.manifest.boundary_bytes(cut, batch=samples) * steps * microbatches
    sent = {(each.sender, each.receiver, each.kind): each.bytes_sent for each in result.traffic}
    for way in ((first, last, "activation"), (last, first, "cotangent")):
        assert size < sent[way] < 1.02 * size, way


async def test_two_peers_train_over_tls_and_say_what_they_do(
    tmp_path: Path, mint_group: MintGroup
) -> None:
    one, two = mint_group(2)
    seen: list[tuple[object, object, str]] = []
    async with opened(one) as home, opened(two, peers=home.addresses()) as member:
        await until_alive(home, 2)

        def watch(name: str, report: object) -> None:
            if name == "step":
                status = member.status()
                seen.append((home.status().plan, status.plan, status.members[0].activity))

        with trio.fail_after(SECONDS_MAX):
            wanted = request_for(tmp_path, BUNDLE, stages=2, steps=3)
            result = await home.train(wanted, watch)
        assert result.stages == 2
        assert result.bytes_sent > sum(each.bytes_sent for each in result.traffic) > 0
        assert all(ours == theirs is not None for ours, theirs, _ in seen)
        assert {activity[:12] for _, _, activity in seen} == {f"run {result.run[:8]}"}
        await until(lambda: member.status().plan is None)
        assert member.status().members[0].activity == "idle"
        assert member.status().run_state == "idle"
        assert home.status().runs == (f"{result.run}: tiny, step 3 of 3",)


async def test_errors_reach_the_program_as_they_are(tmp_path: Path, mint_group: MintGroup) -> None:
    (group,) = mint_group(1)
    with pytest.raises(NotFound):
        async with open_peer("nobody", home=group.folder.parents[1]):
            pass
    async with opened(group) as peer:
        with pytest.raises(PeerAlreadyRunning):
            async with opened(group):
                pass
        taken = peer.links.address[1]
        (other,) = mint_group(1)
        with pytest.raises(PortInUse):
            async with opened(other, port=taken):
                pass
    with pytest.raises(ConfigError, match="model and data"):
        async with opened(group) as peer:
            await peer.train(request_for(tmp_path, BUNDLE, data=""))
    with pytest.raises(ConfigError):
        async with opened(group, peers=("no address",)):
            pass


async def test_idle_time_is_booked_without_anybody_asking(
    mint_group: MintGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert limits.ENERGY_BOOKED_EVERY_S <= 20
    monkeypatch.setattr(limits, "ENERGY_BOOKED_EVERY_S", 0.01)
    (group,) = mint_group(1)
    async with opened(group) as peer:
        await until(lambda: peer.meter.booking().amounts.whole.wall_ns > 0)


async def test_hints_that_are_no_address_are_ignored(mint_group: MintGroup) -> None:
    (group,) = mint_group(1)
    async with opened(group) as peer:
        for address in ("", "nonsense", "host:port", "h:0", "h:99999999", "[::1"):
            peer._dial_hint(address)
        assert peer.status().members[0].state == "self"


async def test_peer_without_a_link_is_named(mint_group: MintGroup) -> None:
    one, two = mint_group(2)
    async with opened(one) as peer:
        with pytest.raises(PeerLost, match=f"peer {two.device[:8]}"):
            peer.send(two.device, object())
        for _ in range(SELF_QUEUE_MAX + 1):  # one goes straight to its reader
            peer.send(one.device, object())
        with pytest.raises(PeerLost, match="too busy to hear itself"):
            peer.send(one.device, object())
