"""Enrolment by a short code over loopback TCP: who gets in, and what a guess costs."""

from __future__ import annotations

import secrets
from collections.abc import Callable

import pytest
import trio

from p2ptrain.errors import ConfigError, TrustError
from p2ptrain.net import enrol as enrol_module
from p2ptrain.net.enrol import Enrolled, enrol_with_code
from p2ptrain.net.enrol_stream import receive_frame, send_frame
from p2ptrain.net.listener import connect
from p2ptrain.store.codes import create_code, open_code
from p2ptrain.store.groups import find_issuer, known_groups, load_issuer
from p2ptrain.store.home import Home
from p2ptrain.trust.chains import member_chain
from p2ptrain.trust.code import code_password
from p2ptrain.trust.code_enrolment import CodeJoiner
from p2ptrain.trust.enrolment import EnrolFrame
from tests.shell.conftest import MintGroup
from tests.shell.test_enrol import sponsoring

MakeHome = Callable[[str], Home]
WRONG = "00000-00000"


async def join(code: str, address: str, home: Home, *others: str, name: str = "beta") -> Enrolled:
    sponsors = [[other] for other in others] + [[address]]
    return await enrol_with_code(code, home=home, alias="home", device_name=name, sponsors=sponsors)


async def guess(address: str, code: str) -> None:
    """One wrong guess, as somebody who tries makes it."""
    joiner = CodeJoiner(code_password(code), secrets.token_bytes(32))
    stream = trio.SocketStream(await connect(address))
    async with stream:
        await send_frame(stream, joiner.offer())
        await send_frame(stream, joiner.proof(await receive_frame(stream)))
        joiner.agreed(await receive_frame(stream))


async def test_joiner_with_the_code_becomes_a_member_that_may_admit(
    mint_group: MintGroup, make_home: MakeHome
) -> None:
    (sponsor,) = mint_group(1)
    code = create_code(sponsor)
    async with sponsoring(sponsor) as address:
        enrolled = await join(code.lower(), address, make_home("j"))
        assert open_code(sponsor) is None
    group = enrolled.group
    assert (group.id, group.name, group.device_name) == (sponsor.id, "home", "beta")
    assert len(load_issuer(group).chain) == 2


async def test_member_that_may_not_admit_gets_a_leaf_and_no_issuer(
    mint_group: MintGroup, make_home: MakeHome
) -> None:
    (sponsor,) = mint_group(1)
    code = create_code(sponsor, admits=False)
    async with sponsoring(sponsor) as address:
        group = (await join(code, address, make_home("j"))).group
    assert find_issuer(group) is None
    chain = member_chain(group.chain, gid=group.id, roots=[group.root])
    assert not chain.may_admit
    assert chain.sponsor == sponsor.device
    assert not (group.folder / "issuer.key").exists()
    with pytest.raises(TrustError, match="may not admit"):
        create_code(group)


async def test_wrong_code_three_times_is_void_and_the_right_one_comes_too_late(
    mint_group: MintGroup, make_home: MakeHome
) -> None:
    (sponsor,) = mint_group(1)
    code = create_code(sponsor)
    async with sponsoring(sponsor) as address:
        for said in ("the code is wrong$", "the code is wrong$", "for the third time: it is void"):
            with pytest.raises(TrustError, match=said):
                await join(WRONG, address, make_home("j"))
        with pytest.raises(TrustError, match="no code is open"):
            await join(code, address, make_home("j"))
    assert known_groups(make_home("j")) == ()


async def test_guesses_side_by_side_are_counted_one_by_one(
    mint_group: MintGroup, make_home: MakeHome
) -> None:
    (sponsor,) = mint_group(1)
    code = create_code(sponsor)
    said: list[str] = []

    async def guess_and_note() -> None:
        try:
            await guess(address, WRONG)
        except TrustError as error:
            said.append(error.message)

    async with sponsoring(sponsor) as address:
        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(guess_and_note)
        assert sorted(said)[:1] == ["no code is open there: it was used, is too old, or was wrong "
                                    "three times"]  # fmt: skip
        assert len(said) == 4
        with pytest.raises(TrustError, match="no code is open"):
            await join(code, address, make_home("j"))


async def test_code_works_once(mint_group: MintGroup, make_home: MakeHome) -> None:
    (sponsor,) = mint_group(1)
    code = create_code(sponsor)
    async with sponsoring(sponsor) as address:
        await join(code, address, make_home("first"))
        with pytest.raises(TrustError, match="no code is open"):
            await join(code, address, make_home("second"))
    assert known_groups(make_home("second")) == ()


async def test_recorded_exchange_is_worth_nothing_later(mint_group: MintGroup) -> None:
    (sponsor,) = mint_group(1)
    code = create_code(sponsor)
    joiner = CodeJoiner(code_password(code), b"n" * 32)
    async with sponsoring(sponsor) as address:
        recorded: list[EnrolFrame] = []
        stream = trio.SocketStream(await connect(address))
        async with stream:
            await send_frame(stream, joiner.offer())
            recorded.append(joiner.proof(await receive_frame(stream)))
            # The joiner vanishes before it sends its proof, which an attacker has seen.
        again = trio.SocketStream(await connect(address))
        async with again:
            await send_frame(again, joiner.offer())
            await receive_frame(again)
            await send_frame(again, recorded[0])
            answer = await receive_frame(again)
    assert answer.body == b"code"
    pending = open_code(sponsor)
    assert pending is not None
    assert pending.tries_left == 2


async def test_without_an_open_code_nobody_gets_in(
    mint_group: MintGroup, make_home: MakeHome
) -> None:
    (sponsor,) = mint_group(1)
    async with sponsoring(sponsor) as address:
        with pytest.raises(TrustError, match="no code is open"):
            await join(WRONG, address, make_home("j"))
    with pytest.raises(TrustError, match=r"127\.0\.0\.1:1 "):
        await join(WRONG, "127.0.0.1:1", make_home("j"))
    with pytest.raises(TrustError, match="no member that shows a code"):
        await enrol_with_code(
            WRONG, home=make_home("j"), alias="home", device_name="x", sponsors=()
        )


async def test_code_of_another_sponsor_is_found_among_several(
    mint_group: MintGroup, make_home: MakeHome
) -> None:
    (wrong,), (right,) = mint_group(1), mint_group(1)
    create_code(wrong)
    code = create_code(right)
    async with sponsoring(wrong) as elsewhere, sponsoring(right) as address:
        enrolled = await join(code, address, make_home("j"), "127.0.0.1:1", elsewhere)
    assert enrolled.group.id == right.id


async def test_bad_code_and_bad_name_are_said_before_anybody_is_asked(
    make_home: MakeHome,
) -> None:
    with pytest.raises(ConfigError, match="is not a code"):
        await join("hello", "127.0.0.1:1", make_home("j"))
    with pytest.raises(ConfigError, match="name of a device"):
        await join(WRONG, "127.0.0.1:1", make_home("j"), name="\x1b")


async def test_sponsor_that_was_revoked_admits_nobody(
    mint_group: MintGroup, make_home: MakeHome
) -> None:
    from p2ptrain.runtime.credentials.revoking import RevokeRequest, sign_revocation
    from p2ptrain.runtime.credentials.trust_reports import read_known
    from p2ptrain.store.trust_log import append_statements

    (sponsor,) = mint_group(1)
    code = create_code(sponsor)
    signed = sign_revocation(
        read_known(sponsor), RevokeRequest(device=sponsor.device, reason="lost")
    )
    append_statements(sponsor.folder, [signed.statement])
    async with sponsoring(sponsor) as address:
        with pytest.raises(TrustError, match="may not admit"):
            await join(code, address, make_home("j"))


@pytest.mark.parametrize("ahead_s", [-86_400.0 * 40, 86_400.0 * 400])
async def test_device_with_a_wrong_clock_joins_by_its_sponsors_time_and_is_told(
    mint_group: MintGroup,
    make_home: MakeHome,
    monkeypatch: pytest.MonkeyPatch,
    ahead_s: float,
) -> None:
    (sponsor,) = mint_group(1)
    code = create_code(sponsor)
    right = enrol_module.time.time
    async with sponsoring(sponsor) as address:

        class Wrong:
            @staticmethod
            def time() -> float:
                return right() + ahead_s

        monkeypatch.setattr(enrol_module, "time", Wrong)
        enrolled = await join(code, address, make_home("j"))
    assert enrolled.clock_is_wrong
    assert enrolled.clock_ahead_s == pytest.approx(-ahead_s, abs=60)
    begins_s = enrolled.group.chain[0].not_valid_before_utc.timestamp()
    assert begins_s == pytest.approx(right() - 300, abs=60)
