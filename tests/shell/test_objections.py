"""A verified chain may still be objected to, and credentials change while links run."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from cryptography import x509

from p2ptrain.errors import TrustError
from p2ptrain.net.connection import Connection
from p2ptrain.net.links import Links, LinkUp
from p2ptrain.net.listener import connect, join_address
from p2ptrain.net.tls_link import TlsLink, client_context
from p2ptrain.store.groups import Group, load_issuer
from p2ptrain.trust import certificates as certs
from p2ptrain.trust.credentials import FindObjection, Objection, no_objection
from p2ptrain.wire import hello as wire_hello
from tests.linked_peers import hello_of
from tests.shell.conftest import MintGroup
from tests.shell.test_enrol import BUILD, no_bulk, no_tensor

REVOKED = Objection(refusal=wire_hello.REFUSE_REVOKED, reason="it was revoked")


def links_of(group: Group, objection: FindObjection = no_objection) -> Links:
    return Links(
        credentials=group.credentials,
        build=BUILD,
        listen_host="127.0.0.1",
        listen_port=0,
        on_tensor=no_tensor,
        on_bulk=no_bulk,
        objection=objection,
    )


@asynccontextmanager
async def running(*links: Links) -> AsyncIterator[None]:
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            for each in links:
                await nursery.start(each.run)
            yield
            nursery.cancel_scope.cancel()


async def until_refused(links: Links, said: str) -> None:
    while not any(said in reason for reason in links.refusals().values()):  # noqa: ASYNC110
        await trio.sleep(0.01)


async def test_dialled_peer_with_an_objection_gets_no_link(mint_group: MintGroup) -> None:
    first, second = mint_group(2)
    judged: list[tuple[bytes, ...]] = []

    def objection(chain: tuple[bytes, ...]) -> Objection | None:
        judged.append(chain)
        return REVOKED

    ours, theirs = links_of(first, objection), links_of(second)
    async with running(ours, theirs):
        ours.dial(join_address(*theirs.address))
        await until_refused(ours, "it was revoked")
        assert ours.devices() == theirs.devices() == ()
    expected = (*second.chain, second.root)
    assert tuple(map(x509.load_der_x509_certificate, judged[0])) == expected


async def test_dialling_peer_with_an_objection_is_told_in_hello(mint_group: MintGroup) -> None:
    first, second = mint_group(2)
    ours, theirs = links_of(first, lambda chain: REVOKED), links_of(second)
    async with running(ours, theirs):
        theirs.dial(join_address(*ours.address))
        await until_refused(theirs, "was revoked")
        statistics = ours.statistics()
    assert statistics.refused_count >= 1
    assert statistics.last_refusal == "it was revoked"


async def test_new_credentials_are_shown_from_the_next_handshake_on(mint_group: MintGroup) -> None:
    first, second = mint_group(2)
    ours, theirs = links_of(first), links_of(second)
    async with running(ours, theirs):
        ours.dial(join_address(*theirs.address))
        assert isinstance(await theirs.events.receive(), LinkUp)
        issuer, key = load_issuer(first), certs.key_from_pem(_read(first, "device.key"))
        request = certs.request_certificate(key, name="renewed")
        leaf = certs.issue_leaf(issuer, request, gid=first.id, name="renewed", now=time.time())
        (first.folder / "chain.pem").write_bytes(certs.to_pem(leaf, *issuer.chain))
        ours.use(first.credentials)
        assert ours.devices() == (second.device,)
        link = await dialled(ours, second)
    assert link.peer_chain()[0] == certs.to_der(leaf)


async def test_credentials_that_do_not_fit_leave_the_former_ones(mint_group: MintGroup) -> None:
    first, second = mint_group(2)
    ours = links_of(first)
    async with running(ours):
        wrong = dataclasses.replace(first.credentials, key_file=second.credentials.key_file)
        with pytest.raises(TrustError, match="our own"):
            ours.use(wrong)
        link = await dialled(ours, second)
    assert link.peer_device(second.credentials) == first.device


async def dialled(links: Links, member: Group) -> TlsLink:
    """A link that a member dialled and said HELLO on; closed again."""
    sock = await connect(join_address(*links.address))
    link = TlsLink(sock, client_context(member.credentials), server_side=False)
    await link.handshake()
    connection = Connection(link, device=links_device(link, member), kind="data", dialled_here=True)
    await connection.send_hello(hello_of(member, "data"))
    assert connection.hello is None
    await connection.receive_hello()
    link.close()
    return link


def links_device(link: TlsLink, member: Group) -> certs.DeviceId:
    return link.peer_device(member.credentials)


def _read(group: Group, name: str) -> bytes:
    return (group.folder / name).read_bytes()
