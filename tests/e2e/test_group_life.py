"""A group's later life with real processes: a new root, a member that leaves, one that returns."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from p2ptrain.demo.group import GROUP_NAME
from p2ptrain.runtime.reports import MemberReport
from p2ptrain.store.groups import load_group
from p2ptrain.store.home import open_home
from tests.e2e.peers import PeerProcess, command, peer_group, wait_all_together

PASSPHRASE = "correct horse battery staple"


async def test_member_leaves_for_good_and_comes_back_with_an_invite(tmp_path: Path) -> None:
    async with peer_group(tmp_path, 3) as (home, other, leaver):
        ended = await command(leaver.member, "group", "leave", GROUP_NAME, "--yes", "--json")
        assert ended.returncode == 0, ended.stderr
        assert json.loads(ended.stdout)["told"]
        assert leaver.process is not None
        assert await leaver.process.wait() == 0
        assert list((leaver.member.home / "groups").iterdir()) == []
        for peer in (home, other):
            await peer.wait_status(lambda status: alive(status.members) == 2, 10.0)
        shown = await command(other.member, "group", "members", GROUP_NAME, "--json")
        states = {each["name"]: each for each in json.loads(shown.stdout)["members"]}
        assert states[leaver.name]["state"] == "revoked"
        assert states[leaver.name]["reason"] == "left the group"
        # Not for ever: with a new invite it gets new keys.
        leaver.member.invite.unlink()
        line = ("group", "invite", GROUP_NAME, "--out", str(leaver.member.invite))
        assert (await command(other.member, *line)).returncode == 0
        await leaver.start((await home.status()).address)
        await wait_all_together((home, other, leaver))


def alive(members: Sequence[MemberReport]) -> int:
    return sum(member.state in ("self", "alive") for member in members)


async def test_running_group_moves_to_a_new_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("p2ptrain.demo.group.secrets.token_urlsafe", lambda _: PASSPHRASE)
    (tmp_path / "old").write_text(PASSPHRASE)
    (tmp_path / "new").write_text(PASSPHRASE + " again")
    async with peer_group(tmp_path, 3) as peers:
        home, other, away = peers
        (recovery,) = home.member.home.glob("groups/*/recovery.pem")
        await away.kill()
        line = [
            "group", "rotate", GROUP_NAME, "--json", "--recovery-file", str(recovery),
            "--passphrase-file", str(tmp_path / "old"), "--new-recovery-file",
            str(tmp_path / "new.pem"), "--new-passphrase-file", str(tmp_path / "new"),
        ]  # fmt: skip
        ended = await command(home.member, *line)
        assert ended.returncode == 0, ended.stderr
        assert json.loads(ended.stdout)["told"] == 1
        await away.start((await home.status()).address)
        await wait_all_together(peers)
        for peer in peers:
            await trusts_one_root(peer)
        for peer in peers:
            await peer.kill()
        address = (await home.start()).address
        await other.start(address)
        await away.start(address)
        await wait_all_together(peers)


async def trusts_one_root(peer: PeerProcess) -> None:
    """Once every member has shown that it moved."""

    def moved(_: object) -> bool:
        group = load_group(open_home(peer.member.home), GROUP_NAME)
        return len(group.trusted) == 1 and group.trusted[0] != group.root

    await peer.wait_status(moved, 30.0)
