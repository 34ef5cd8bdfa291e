"""An older and a newer peer: what they agree on, and what both say when they cannot."""

from __future__ import annotations

import trio
import trio.testing

from p2ptrain.wire.hello import Agreement, Spoken
from tests.linked_peers import MintGroup, Note, Peer, running

OLDER = Spoken(protocol_min=2, protocol_max=3, features=("moved", "slow"))
NEWER = Spoken(protocol_min=3, protocol_max=7, features=("fast", "moved"))
FUTURE = Spoken(protocol_min=8, protocol_max=9)


async def test_older_and_newer_peer_use_the_highest_common_version(mint_group: MintGroup) -> None:
    low, high = mint_group(2)
    async with running(Peer(low, spoken=OLDER), Peer(high, spoken=NEWER)) as (older, newer):
        older.links.dial(newer.address)
        for peer in (older, newer):
            agreed = (await peer.up()).agreement
            assert (agreed.protocol, agreed.features) == (3, ("moved",))
            assert isinstance(agreed, Agreement)
        older.links.send_control(newer.device, Note(number=1))
        assert await newer.links.inbox.receive() == (older.device, Note(number=1))


async def test_peers_without_a_common_version_both_say_so(mint_group: MintGroup) -> None:
    low, high = mint_group(2)
    async with running(Peer(low, spoken=OLDER), Peer(high, spoken=FUTURE)) as (older, future):
        older.links.dial(future.address)
        while not older.links.refusals():
            await trio.testing.wait_all_tasks_blocked(0.01)
        assert older.links.refusals()[future.address] == (
            "it speaks protocol 8 to 9, this device 2 to 3; update p2ptrain on this device"
        )
        assert future.links.statistics().last_refusal == (
            f"{older.device[:8]}: it speaks protocol 2 to 3, this device 8 to 9; "
            "update p2ptrain on the other device"
        )
        assert older.links.devices() == future.links.devices() == ()
