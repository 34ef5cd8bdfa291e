"""Who gets into a group, and what everybody else is told."""

from __future__ import annotations

import dataclasses
import json
import socket
import struct
import time
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from p2ptrain.demo.group import GROUP_NAME
from p2ptrain.store.groups import create_invite, load_group
from p2ptrain.store.home import open_home
from p2ptrain.trust.enrolment import Joiner
from p2ptrain.trust.invite import read_invite
from tests.e2e.peers import (
    Member,
    PeerProcess,
    assert_refused,
    command,
    ended_afterwards,
    peer_group,
)

JOIN = ("join", "--group", GROUP_NAME, "--port", "0", "--listen", "127.0.0.1", "--no-discovery")
RESET_ON_CLOSE = struct.pack("ii", 1, 0)
"""SO_LINGER: on, for no time."""


@pytest.fixture
def newcomer(tmp_path: Path) -> Member:
    """A device that is in no group."""
    home = tmp_path / "newcomer"
    home.mkdir(mode=0o700)
    return Member(name="newcomer", home=home)


def invite_of(sponsor: PeerProcess, address: str, *, ttl_s: float = 600.0) -> dict[str, Any]:
    """An invite as its file holds it."""
    group = load_group(open_home(sponsor.member.home), GROUP_NAME)
    document: dict[str, Any] = json.loads(create_invite(group, [address], ttl_s))
    return document


def write_document(member: Member, document: dict[str, Any]) -> str:
    member.invite.write_text(json.dumps(document))
    return str(member.invite)


async def test_device_with_an_unusable_invite_is_refused_and_stays_outside(
    tmp_path: Path, newcomer: Member
) -> None:
    async with peer_group(tmp_path, 1) as (sponsor,):
        address = (await sponsor.status()).address
        tomorrow = time.time() + 86_400

        async def refused(document: dict[str, Any], said: str) -> None:
            invite = write_document(newcomer, document)
            assert_refused(await command(newcomer, *JOIN, "--invite", invite), 3, said)
            assert list((newcomer.home / "groups").iterdir()) == []

        assert_refused(await command(newcomer, *JOIN), 2, "is in no group", "for a code")
        expired = invite_of(sponsor, address, ttl_s=-1.0)
        await refused(expired | {"expires_at_s": tomorrow}, "the invite has expired")
        await refused(expired, "does not know this invite")
        fresh = invite_of(sponsor, address)
        await refused(fresh | {"secret": "00" * 16}, "does not know this invite")
        await refused(fresh | {"root_hash": "0" * 64}, "does not know the invite's secret")
        await refused(fresh | {"version": 9}, "invite version 9 is unknown")
        newcomer.invite.write_bytes(b"\x00garbage")
        line = (*JOIN, "--invite", str(newcomer.invite))
        assert_refused(await command(newcomer, *line), 3, "not a usable invite")
        assert [member.name for member in (await sponsor.status()).members] == ["peer-1"]


async def test_strangers_that_hang_up_do_not_end_a_peer(tmp_path: Path) -> None:
    async with peer_group(tmp_path, 1) as (peer,):
        host, _, port = (await peer.status()).address.rpartition(":")
        unknown = read_invite(json.dumps(invite_of(peer, f"{host}:{port}")).encode())
        unknown = dataclasses.replace(unknown, secret="00" * 16)
        offer = Joiner(unknown, X25519PrivateKey.generate()).offer().encoded()
        for said in (b"", b"P", offer[:9], offer, b"\x16\x03", b"GET / HTTP/1.0\r\n\r\n"):
            with socket.create_connection((host, int(port))) as stranger:
                stranger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
                stranger.sendall(said)
        assert (await peer.status()).run_state == "idle"
        assert peer.process is not None
        assert peer.process.poll() is None


async def test_invite_admits_one_device_only(tmp_path: Path, newcomer: Member) -> None:
    async with peer_group(tmp_path, 1) as (sponsor,):
        address = (await sponsor.status()).address
        fresh = invite_of(sponsor, address)
        write_document(newcomer, fresh)
        admitted = PeerProcess(newcomer)
        async with ended_afterwards((admitted,)):
            await admitted.start(address)
            await sponsor.wait_status(lambda status: len(status.members) == 2, 30.0)
        late = Member(name="late", home=tmp_path / "late")
        late.home.mkdir(mode=0o700)
        line = (*JOIN, "--invite", write_document(late, fresh))
        assert_refused(await command(late, *line), 3, "does not know this invite")


async def test_certificate_of_another_group_is_refused_and_status_says_so(tmp_path: Path) -> None:
    for name in ("ours", "theirs"):
        (tmp_path / name).mkdir()
    async with (
        peer_group(tmp_path / "ours", 1) as (ours,),
        peer_group(tmp_path / "theirs", 1) as (theirs,),
    ):
        address = (await ours.status()).address
        await theirs.kill()
        await theirs.start(address)
        await theirs.wait_status(lambda status: address in (status.alone_because or ""), 30.0)
        why = (await theirs.status()).alone_because or ""
        assert "another group" in why
        for peer in (ours, theirs):
            assert len((await peer.status()).members) == 1
        said = await command(theirs.member, "status", "--group", GROUP_NAME)
        assert f"alone, because {why}" in said.stdout


async def test_peer_refuses_to_start_with_an_open_key_or_a_taken_port(tmp_path: Path) -> None:
    async with peer_group(tmp_path, 1) as (peer,):
        running = await command(peer.member, *JOIN)
        assert_refused(running, 2, "already runs on this device")
        port = (await peer.status()).address.rpartition(":")[2]
        await peer.kill()
        with socket.create_server(("127.0.0.1", int(port))):
            line = (*JOIN, "--port", port)
            assert_refused(await command(peer.member, *line), 2, port, "choose another with --port")
        (key,) = peer.member.home.glob("groups/*/device.key")
        key.chmod(0o644)
        assert_refused(await command(peer.member, *JOIN), 3, "too open", f"chmod 600 {key}")


async def shown_code(sponsor: PeerProcess, *options: str) -> str:
    """What `group invite` prints on a device whose peer runs."""
    ended = await command(sponsor.member, "group", "invite", GROUP_NAME, "--json", *options)
    document = json.loads(ended.stdout)
    assert document["peer_running"]
    code: str = document["code"]
    return code


async def test_device_joins_by_typing_a_code_that_works_once(
    tmp_path: Path, newcomer: Member
) -> None:
    async with peer_group(tmp_path, 1) as (sponsor,):
        address = (await sponsor.status()).address
        code = await shown_code(sponsor)
        line = (*JOIN, "--peer", address, "--code")
        assert_refused(await command(newcomer, *line, "00000-00000"), 3, "the code is wrong")
        typed = dataclasses.replace(newcomer, options=("--code", code.lower()))
        admitted = PeerProcess(typed)
        async with ended_afterwards((admitted,)):
            await admitted.start(address)
            await sponsor.wait_status(lambda status: len(status.members) == 2, 30.0)
            assert "became a member of demo as newcomer" in admitted.log
            late = Member(name="late", home=tmp_path / "late")
            late.home.mkdir(mode=0o700)
            assert_refused(await command(late, *line, code), 3, "no code is open there")


async def test_code_that_was_wrong_three_times_is_void_even_after_a_restart(
    tmp_path: Path, newcomer: Member
) -> None:
    async with peer_group(tmp_path, 1) as (sponsor,):
        code = await shown_code(sponsor)
        for attempt in range(3):
            address = (await sponsor.status()).address
            line = (*JOIN, "--peer", address, "--code")
            said = "it is void" if attempt == 2 else "the code is wrong"
            assert_refused(await command(newcomer, *line, "00000-00000"), 3, said)
            await sponsor.kill()
            await sponsor.start()
        line = (*JOIN, "--peer", (await sponsor.status()).address, "--code", code)
        assert_refused(await command(newcomer, *line), 3, "no code is open there")
        assert list((newcomer.home / "groups").iterdir()) == []
