"""Peers that were given no address find each other by zeroconf."""

from __future__ import annotations

from pathlib import Path

import pytest

from p2ptrain.demo.group import loopback_multicast_works
from tests.e2e.peers import peer_group, wait_all_together


async def test_three_peers_find_each_other_on_loopback(tmp_path: Path) -> None:
    if not loopback_multicast_works():
        pytest.skip("multicast does not work on loopback here")
    async with peer_group(tmp_path, 3) as peers:
        # Started again they have other ports: what they remember and their invites lead nowhere.
        for peer in peers:
            await peer.kill()
        for peer in peers:
            await peer.start()
        await wait_all_together(peers)
        for peer in peers:
            await peer.wait_status(
                lambda status: status.discovery == "announcing on 127.0.0.1", 30.0
            )
            status = await peer.status()
            assert status.alone_because is None
            assert {member.name for member in status.members} == {each.name for each in peers}
            addresses = {address for member in status.members for address in member.addresses}
            assert all(address.startswith("127.0.0.1:") for address in addresses)
