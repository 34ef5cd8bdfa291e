"""Trust among running peers in one process: revocation takes effect at once, and stays."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import trio

from p2ptrain.errors import ConfigError, NotFound, TrustError
from p2ptrain.membership.states import State
from p2ptrain.net.enrol import enrol_with_code
from p2ptrain.runtime.credentials.revoking import RevokeRequest, sign_revocation
from p2ptrain.runtime.credentials.trust_reports import read_known, trust_report
from p2ptrain.runtime.peer import Peer
from p2ptrain.runtime.reports import StepReport
from p2ptrain.store.groups import Group, first_member, load_group, store_member
from p2ptrain.store.home import Home, open_home
from p2ptrain.store.recovering import recover, sign_rotation
from p2ptrain.store.trust_log import REVOKED_FILE, append_statements
from p2ptrain.trust import certificates as certs
from p2ptrain.trust.recovery import seal_recovery
from p2ptrain.trust.rotation import OldRoot, Rotation, rotate
from tests.memory_group import request_for, until
from tests.shell.conftest import MintGroup
from tests.shell.test_peer import BUNDLE, SECONDS_MAX, opened, until_alive

CLOSED_S = 5.0
MakeHome = Callable[[str], Home]


@contextlib.asynccontextmanager
async def together(*groups: Group) -> AsyncIterator[list[Peer]]:
    """Peers of these groups that all see each other."""
    async with contextlib.AsyncExitStack() as stack:
        peers: list[Peer] = []
        for group in groups:
            addresses = peers[0].addresses() if peers else ()
            peers.append(await stack.enter_async_context(opened(group, peers=addresses)))
        for peer in peers:
            await until_alive(peer, len(groups))
            await until(lambda peer=peer: len(known(peer)) >= len(groups))  # type: ignore[misc]  # bound now
        yield peers


def known(peer: Peer) -> tuple[object, ...]:
    return peer.trust._machine.machine.roster.chains


def request(group: Group, **changes: object) -> RevokeRequest:
    return RevokeRequest(device=group.device, reason="stolen", **changes)  # type: ignore[arg-type]  # fields by name


def again(group: Group) -> Group:
    return load_group(open_home(group.folder.parents[1]), group.id)


async def test_revoked_member_is_cut_off_everywhere_at_once_and_not_let_in_again(
    mint_group: MintGroup,
) -> None:
    one, two, three = mint_group(3)
    async with together(one, two, three) as (first, second, third):
        with trio.fail_after(CLOSED_S):
            report = await first.trust.revoke(request(three))
            await until(lambda: three.device not in first.links.devices())
            await until(lambda: three.device not in second.links.devices())
        assert (report.told, report.kept, report.void) == (2, (), ())
        states = {view.device: view for view in second.membership.machine.members(0.0)}
        assert states[three.device].state is State.DEAD
        await until(lambda: "was revoked" in str(third.links.refusals()))
        await until(lambda: "stolen" in str(second.links.statistics().last_refusal))
        assert first.links.devices() == (two.device,)
        assert third.links.devices() == ()
    # It comes back later, and so do the others, from what is on disk.
    async with opened(again(one)) as first, opened(again(three), peers=first.addresses()) as third:
        await until(lambda: "was revoked" in str(third.links.refusals()))
        assert first.links.devices() == third.links.devices() == ()
        assert "was revoked" in str(third.status().alone_because)
    states = {member.device: member.state for member in trust_report(again(two)).members}
    assert states == {one.device: "member", two.device: "member", three.device: "revoked"}


@pytest.mark.parametrize("admits", [True, False])
async def test_joiner_knows_who_is_out_before_its_first_link(
    mint_group: MintGroup, make_home: MakeHome, admits: bool
) -> None:
    one, two = mint_group(2)
    async with together(one, two) as (first, _):
        await first.trust.revoke(request(two))
        enrolled = await enrol_with_code(
            first.invite_by_code(admits=admits), home=make_home("new"), alias="home",
            device_name="new", sponsors=[first.addresses()],
        )  # fmt: skip
    # The sponsor is away: the joiner meets only the device that was revoked.
    async with opened(two) as out, opened(enrolled.group, peers=out.addresses()) as joiner:
        await until(lambda: "was revoked" in str(joiner.links.refusals()))
        assert out.links.devices() == joiner.links.devices() == ()


async def test_member_that_was_away_hears_of_it_from_others(mint_group: MintGroup) -> None:
    one, two, three = mint_group(3)
    async with together(one, two, three):
        pass
    async with together(one, three) as (first, _):
        await first.trust.revoke(request(three))
    async with together(one, two) as (_, second):
        await until(lambda: len(second.trust._effective) == 1)
    async with opened(again(two)) as second, opened(again(three), peers=second.addresses()) as out:
        await until(lambda: "was revoked" in str(out.links.refusals()))
        assert second.links.devices() == ()


async def test_run_of_a_revoked_member_hears_that_it_is_gone(
    mint_group: MintGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = mint_group(2)
    async with together(one, two) as (first, _):
        gone: list[tuple[str, str]] = []
        monkeypatch.setattr(first.runs, "peer_down", lambda *args, **how: gone.append(args))
        await first.trust.revoke(request(two))
        await until(lambda: any("stolen" in why for device, why in gone if device == two.device))


async def test_revocations_that_make_no_sense_are_refused(mint_group: MintGroup) -> None:
    one, two = mint_group(2)
    async with together(one, two) as (first, second):
        with pytest.raises(NotFound, match="no member is called"):
            await first.trust.revoke(RevokeRequest(device="nobody", reason="x"))
        with pytest.raises(TrustError, match="one line"):
            await first.trust.revoke(RevokeRequest(device=two.device, reason="\n"))
        (two.folder / "issuer.key").rename(two.folder / "hidden")
        with pytest.raises(TrustError, match="may not admit"):
            await second.trust.revoke(request(one))
        await first.trust.revoke(request(two))
        with pytest.raises(ConfigError, match="revoked already"):
            await first.trust.revoke(request(two))


async def test_statement_is_on_disk_before_it_takes_effect(
    mint_group: MintGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = mint_group(2)
    async with together(one, two) as (first, _):
        seen: list[bool] = []
        expel = first._expel

        def look(device: str, reason: str) -> None:
            log = one.folder / REVOKED_FILE
            seen.append(log.exists() and two.device in log.read_text())
            expel(two.device, reason)

        hooks = dataclasses.replace(first.trust._hooks, expel=look)
        monkeypatch.setattr(first.trust, "_hooks", hooks)
        await first.trust.revoke(request(two))
        assert seen == [True]


async def test_peer_with_a_damaged_log_of_revocations_does_not_start(
    mint_group: MintGroup,
) -> None:
    (group,) = mint_group(1)
    log = group.folder / REVOKED_FILE
    log.write_bytes(b'{"version": 1}\n')
    log.chmod(0o600)
    with pytest.raises(TrustError, match="damaged"):
        again(group)
    log.write_bytes(b'{"cut sho')  # by a crash: never took effect
    assert again(group).device == group.device
    log.chmod(0o644)
    with pytest.raises(TrustError, match="too open"):
        again(group)


PASSPHRASE = "correct horse"


def rotation_of(group: Group, root_key: certs.Ed25519PrivateKey) -> Rotation:
    """The group's root names a successor, by the hand of this device."""
    content = seal_recovery(root_key, PASSPHRASE, first=group.root)
    return sign_rotation(group, content, PASSPHRASE, PASSPHRASE).rotation


def read_roster_size(group: Group) -> int:
    """Members on disk: what a rotation can move."""
    return len(read_known(again(group)).roster.chains)


@pytest.fixture
def rooted(make_home: MakeHome) -> tuple[certs.NewGroup, list[Group]]:
    """Three members and the root that signed their issuers, its key still at hand."""
    made = certs.create_group("rooted", now=time.time())
    groups = [
        store_member(make_home(name), "rooted", first_member(made, name, now=time.time()))
        for name in ("a", "b", "c")
    ]
    return made, sorted(groups, key=lambda group: group.device)


async def test_rotation_in_mid_run_costs_the_run_nothing(
    tmp_path: Path, rooted: tuple[certs.NewGroup, list[Group]]
) -> None:
    """How it spreads is in test_rotation_spreads.py, without the threads of a run."""
    made, (one, two, _) = rooted
    async with together(one, two) as (first, second), trio.open_nursery() as nursery:
        await until(lambda: read_roster_size(one) > 1)
        rotation = rotation_of(again(one), made.root_key)
        views: list[int] = []

        def watch(name: str, report: object) -> None:
            if isinstance(report, StepReport) and (plan := first.status().plan) is not None:
                views.append(plan.view)
                if len(views) == 2:
                    nursery.start_soon(first.trust.rotate, rotation)

        with trio.fail_after(SECONDS_MAX):
            wanted = request_for(tmp_path, BUNDLE, stages=2, steps=6)
            result = await first.train(wanted, watch)
        assert (len(result.losses), views) == (6, [1] * 6)
        for peer in (first, second):
            await until(
                lambda peer=peer: peer.trust.group.trusted == (rotation.new_root,)  # type: ignore[misc]  # bound now
            )
            assert len(peer.links.devices()) == 1
            assert peer.links.statistics().refused_count == 0


async def test_rotation_that_the_root_did_not_sign_is_refused(mint_group: MintGroup) -> None:
    one, two = mint_group(2)
    (stranger,) = mint_group(1)
    async with together(one, two) as (first, _):
        key = certs.Ed25519PrivateKey.generate()
        forged = sign_rotation_with(one, key)
        with pytest.raises(TrustError, match="not signed by the root"):
            await first.trust.rotate(forged)
    assert again(one).trusted == (one.root,)
    assert stranger.id != one.id


def sign_rotation_with(group: Group, key: certs.Ed25519PrivateKey) -> Rotation:
    new = certs.create_group("new", now=time.time())
    old = OldRoot(key=key, certificate=group.root)
    return rotate(old, new, gid=group.id, number=1, issuers=(), now=time.time())


async def test_members_that_revoked_each_other_come_back_by_the_recovery_key(
    rooted: tuple[certs.NewGroup, list[Group]],
) -> None:
    made, (one, two, three) = rooted
    async with together(one, two, three):
        pass
    for mine, theirs in ((one, two), (two, one)):
        signed = sign_revocation(read_known(again(mine)), request(theirs))
        append_statements(three.folder, [signed.statement])
    async with opened(again(three)) as third:
        for group in (one, two):
            async with opened(again(group), peers=third.addresses()) as out:
                await until(lambda: "was revoked" in str(out.links.refusals()))
                assert third.links.devices() == ()
    content = seal_recovery(made.root_key, PASSPHRASE, first=made.root)
    home = open_home(one.folder.parents[1])
    back = recover(home, "rooted", content, PASSPHRASE, "again")
    assert back.device not in (one.device, two.device)
    async with together(back, again(three)):
        pass


async def test_member_that_leaves_voids_its_keys_and_those_it_admitted_stay(
    rooted: tuple[certs.NewGroup, list[Group]], make_home: MakeHome
) -> None:
    _, (one, two, _) = rooted
    async with opened(one) as first:
        code = first.invite_by_code()
        enrolled = await enrol_with_code(
            code, home=make_home("d"), alias="rooted", device_name="d",
            sponsors=[first.addresses()],
        )  # fmt: skip
    child = enrolled.group
    async with together(one, two, child) as (first, second, third):
        served = trio.Event()

        async def serve() -> None:
            await first.serve()
            served.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            with trio.fail_after(CLOSED_S + 5):
                assert await first.leave_group() is None
                await served.wait()
        await until(lambda: second.links.devices() == (child.device,))
        assert third.trust.revoked_by is None
    states = {member.name: member.state for member in trust_report(again(two)).members}
    assert states[one.device_name] == "revoked"
    assert states["d"] == "member"


async def test_member_without_the_right_to_admit_leaves_without_a_word(
    mint_group: MintGroup,
) -> None:
    one, two = mint_group(2)
    async with together(one, two) as (first, second):
        (two.folder / "issuer.key").rename(two.folder / "hidden")
        await second.trust.leave()
        assert len(first.trust._effective) == len(second.trust._effective) == 0
