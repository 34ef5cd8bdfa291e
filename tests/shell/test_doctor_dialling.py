"""The doctor dials real links on loopback: every way that a dial can end."""

from __future__ import annotations

import dataclasses
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace

import pytest
import trio

from p2ptrain.diagnosis.observations import Dial, DialEnd
from p2ptrain.doctor.dialling import dial_all
from p2ptrain.net.links import Links
from p2ptrain.net.listener import join_address
from p2ptrain.store import groups
from p2ptrain.store.groups import Group
from p2ptrain.training.contract import RuntimeBuild
from p2ptrain.trust.credentials import Chain, FindObjection, Objection, no_objection
from p2ptrain.wire import hello as wire_hello
from p2ptrain.wire.hello import Spoken

MintGroup = Callable[..., list[Group]]
BUILD = RuntimeBuild(runtime="onnxruntime", version="1", numpy="2", machine="x86_64", isa="avx2")
YEAR_S = 365 * 86_400


async def nothing_comes(*_: object) -> None:
    raise AssertionError("a dial of the doctor carries no frames")


@asynccontextmanager
async def linking(
    group: Group, spoken: Spoken | None = None, objection: FindObjection = no_objection
) -> AsyncIterator[Links]:
    """The links of a member, at a free port of loopback."""
    links = Links(
        credentials=group.credentials,
        build=BUILD,
        listen_host="127.0.0.1",
        listen_port=0,
        on_tensor=nothing_comes,
        on_bulk=nothing_comes,
        objection=objection,
        spoken=spoken,
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(links.run)
        yield links
        nursery.cancel_scope.cancel()


async def dialled(links: Links, group: Group) -> Dial:
    address = join_address(*links.address)
    (dial,) = await dial_all({address: "given"}, group.credentials)
    assert (dial.address, dial.known_from) == (address, "given")
    return dial


async def test_member_answers_and_is_not_linked(mint_group: MintGroup) -> None:
    ours, theirs = mint_group(2)
    async with linking(theirs) as links:
        dial = await dialled(links, ours)
        assert (dial.end, dial.device) == (DialEnd.ANSWERED, theirs.device)
        assert dial.protocol == (wire_hello.PROTOCOL_MIN, wire_hello.PROTOCOL_MAX)
        assert dial.clock_ahead_s is not None
        assert abs(dial.clock_ahead_s) < 5
        assert dial.connect_s is not None
        assert links.devices() == ()
        assert links.failures() == {}
        assert links.statistics().refused_count == 0


async def test_question_leaves_a_running_link_alone(mint_group: MintGroup) -> None:
    ours, theirs = mint_group(2)
    async with linking(theirs) as there, linking(ours) as here:
        here.dial(join_address(*there.address))
        with trio.fail_after(10):
            await here.events.receive()
            await there.events.receive()
        assert (await dialled(there, ours)).end is DialEnd.ANSWERED
        assert there.devices() == (ours.device,)
        assert here.devices() == (theirs.device,)


async def test_other_group_is_told_by_its_certificate(mint_group: MintGroup) -> None:
    (ours,), (theirs,) = mint_group(1), mint_group(1)
    async with linking(theirs) as links:
        dial = await dialled(links, ours)
    assert dial.end is DialEnd.CERTIFICATES
    assert dial.detail == "the peer belongs to another group, or to none"


async def test_expired_and_future_certificates_are_told(
    mint_group: MintGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    for now_s, said in ((time.time() - 2 * YEAR_S, "expired"), (time.time() + YEAR_S, "not yet")):
        with monkeypatch.context() as patch:
            patch.setattr(groups, "time", SimpleNamespace(time=lambda at=now_s: at))
            (theirs,) = mint_group(1, now=now_s)
        (ours,) = mint_group(1)
        ours = dataclasses.replace(ours, id=theirs.id, trusted=theirs.trusted)
        async with linking(theirs) as links:
            dial = await dialled(links, ours)
        assert dial.end is DialEnd.CERTIFICATES
        assert said in dial.detail


async def test_protocol_of_another_version_is_told(mint_group: MintGroup) -> None:
    ours, theirs = mint_group(2)
    async with linking(theirs, Spoken(protocol_min=7, protocol_max=9)) as links:
        dial = await dialled(links, ours)
    assert (dial.end, dial.protocol) == (DialEnd.ANSWERED, (7, 9))


async def test_wrong_clock_is_told(mint_group: MintGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = mint_group(2)
    async with linking(theirs) as links:
        hello = links._hello

        def an_hour_ahead(kind: str, *, refusal: str | None = None) -> wire_hello.Hello:
            made = hello(kind, refusal=refusal)
            return dataclasses.replace(made, clock_s=made.clock_s + 3600)

        monkeypatch.setattr(links, "_hello", an_hour_ahead)
        dial = await dialled(links, ours)
    assert dial.clock_ahead_s is not None
    assert abs(dial.clock_ahead_s - 3600) < 5


async def test_refusal_of_a_revoked_device_is_told(mint_group: MintGroup) -> None:
    ours, theirs = mint_group(2)

    def revoked(chain: Chain) -> Objection:
        return Objection(refusal=wire_hello.REFUSE_REVOKED, reason="stolen")

    async with linking(theirs, objection=revoked) as links:
        dial = await dialled(links, ours)
    assert (dial.end, dial.detail) == (DialEnd.REFUSED, "revoked")


async def test_own_address_is_known(mint_group: MintGroup) -> None:
    (ours,) = mint_group(1)
    async with linking(ours) as links:
        assert (await dialled(links, ours)).end is DialEnd.IS_SELF


async def test_nothing_and_no_peer_are_told_apart(mint_group: MintGroup) -> None:
    (ours,) = mint_group(1)
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        free = f"127.0.0.1:{nobody.getsockname()[1]}"
    async with trio.open_nursery() as nursery:
        web: list[trio.SocketListener] = await nursery.start(trio.serve_tcp, _answer_like_http, 0)
        address = f"127.0.0.1:{web[0].socket.getsockname()[1]}"
        dials = await dial_all(
            {free: "given", address: "given", "no.such.host.invalid:1": "given"}, ours.credentials
        )
        nursery.cancel_scope.cancel()
    ends = [dial.end for dial in dials]
    assert ends == [DialEnd.NOTHING_LISTENS, DialEnd.NOT_A_PEER, DialEnd.NO_ANSWER]


async def _answer_like_http(stream: trio.SocketStream) -> None:
    await stream.receive_some(64)
    await stream.send_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")
