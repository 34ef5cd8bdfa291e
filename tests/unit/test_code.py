"""One-time codes: how they look, how they are typed, and the exchange that they protect."""

from __future__ import annotations

import pytest

from p2ptrain.errors import ConfigError, RemoteProtocolError, TrustError
from p2ptrain.ids import GroupId
from p2ptrain.trust import enrolment
from p2ptrain.trust.code import (
    ALPHABET,
    PendingCode,
    code_password,
    make_code,
    read_code,
    read_pending_code,
    write_pending_code,
)
from p2ptrain.trust.code_enrolment import CodeJoiner, CodeSponsor
from p2ptrain.trust.enrolment import EnrolFrame, EnrolmentGrant, EnrolmentRequest, refusal
from p2ptrain.trust.password_exchange import EXCHANGE_MESSAGE_BYTES, begin_exchange

PASSWORD = code_password("K7Q2M-9XZ4T")
GROUP = GroupId("a" * 16)
REQUEST = EnrolmentRequest(name="beta", device_csr=b"device", issuer_csr=b"issuer")
GRANT = EnrolmentGrant(group_name="home", root=b"root", issuers=(b"a",), clock_s=1.5)


def joiner(password: bytes = PASSWORD) -> CodeJoiner:
    return CodeJoiner(password, b"j" * 32)


def sponsor() -> CodeSponsor:
    return CodeSponsor(GROUP, b"s" * 32)


def test_code_has_two_groups_of_five_and_uses_all_fifty_bits() -> None:
    assert make_code(bytes(16)) == "00000-00000"
    assert make_code(b"\xff" * 16) == "ZZZZZ-ZZZZZ"
    assert make_code((1 << 45).to_bytes(16, "big")) == "10000-00000"
    assert make_code((31).to_bytes(16, "big")) == "00000-0000Z"
    assert len(set(ALPHABET)) == 32
    assert not set("ILOU") & set(ALPHABET)


@pytest.mark.parametrize(
    "typed", ["K7Q2M-9XZ4T", "k7q2m9xz4t", " k7q2m 9xz4t ", "K7-Q2-M9-XZ-4T", "K7Q2M-9XZ4T\n"]
)
def test_code_is_read_as_people_type_it(typed: str) -> None:
    assert read_code(typed) == "K7Q2M-9XZ4T"


def test_letters_that_look_like_digits_are_read_as_these() -> None:
    assert read_code("oO0iI-lL1ab") == "00011-111AB"


@pytest.mark.parametrize("typed", ["", "K7Q2M", "K7Q2M-9XZ4T9", "K7Q2M-9XZ4U", "K7Q2M-9XZ4ü"])
def test_what_is_no_code_is_said_before_anybody_is_asked(typed: str) -> None:
    with pytest.raises(ConfigError, match="is not a code"):
        read_code(typed)


def test_pending_code_round_trips_and_damage_is_told() -> None:
    pending = PendingCode(password=PASSWORD.hex(), expires_at_s=9.5, tries_left=2, admits=False)
    assert read_pending_code(write_pending_code(pending)) == pending
    for damaged in (b"", b"[]", b"x" * 20_000, write_pending_code(pending)[:-9], b"[" * 9000):
        with pytest.raises(TrustError, match="damaged"):
            read_pending_code(damaged)
    for left in (0, 4):
        with pytest.raises(ValueError, match="tries"):
            PendingCode(password=PASSWORD.hex(), expires_at_s=1.0, tries_left=left, admits=True)


def test_both_sides_with_the_code_complete_and_agree_on_the_group() -> None:
    ours, theirs = joiner(), sponsor()
    proof = ours.proof(theirs.answer(ours.offer(), PASSWORD))
    confirm, their_keys = theirs.agreed(proof)
    our_keys = ours.agreed(confirm)
    assert ours.group == GROUP
    request = our_keys.ask(REQUEST)
    assert b"beta" not in request.body
    assert their_keys.asked(request) == REQUEST
    assert our_keys.granted(their_keys.grant(GRANT)) == GRANT


def test_wrong_code_is_noticed_by_the_sponsor_who_has_said_nothing_yet() -> None:
    ours, theirs = joiner(code_password("00000-00000")), sponsor()
    answer = theirs.answer(ours.offer(), PASSWORD)
    with pytest.raises(TrustError, match="code is wrong"):
        theirs.agreed(ours.proof(answer))


def test_false_sponsor_is_noticed_by_the_joiner() -> None:
    ours, honest = joiner(), sponsor()
    ours.proof(honest.answer(ours.offer(), PASSWORD))
    with pytest.raises(TrustError, match="does not know the code"):
        ours.agreed(EnrolFrame(kind=enrolment.CODE_CONFIRM, body=bytes(32)))


@pytest.mark.parametrize("position", [3, 20, 60, -1])
def test_answer_that_was_changed_on_its_way_fits_nowhere(position: int) -> None:
    ours, theirs = joiner(), sponsor()
    body = bytearray(theirs.answer(ours.offer(), PASSWORD).body)
    body[position] = ord("b") if position == 3 else body[position] ^ 1
    changed = EnrolFrame(kind=enrolment.CODE_ANSWER, body=bytes(body))
    with pytest.raises((TrustError, RemoteProtocolError)):
        theirs.agreed(ours.proof(changed))


def test_exchange_of_another_run_is_no_proof() -> None:
    ours, theirs, again = joiner(), sponsor(), CodeSponsor(GROUP, b"t" * 32)
    proof = ours.proof(theirs.answer(ours.offer(), PASSWORD))
    again.answer(ours.offer(), PASSWORD)
    with pytest.raises(TrustError, match="code is wrong"):
        again.agreed(proof)


@pytest.mark.parametrize("reason", ["no code", "code", "void", "revoked", "late", "busy"])
def test_refusal_becomes_a_sentence_of_ours(reason: str) -> None:
    with pytest.raises(TrustError) as caught:
        joiner().proof(refusal(reason))
    assert caught.value.message == enrolment.REFUSALS[reason]


def test_messages_out_of_order_or_of_wrong_size_are_refused() -> None:
    with pytest.raises(RemoteProtocolError):
        joiner().proof(joiner().offer())
    with pytest.raises(RemoteProtocolError):
        sponsor().agreed(EnrolFrame(kind=enrolment.CODE_PROOF, body=bytes(65)))
    with pytest.raises(RemoteProtocolError):
        sponsor().agreed(EnrolFrame(kind=enrolment.CODE_PROOF, body=b""))
    with pytest.raises(TrustError):
        joiner().agreed(EnrolFrame(kind=enrolment.CODE_CONFIRM, body=bytes(32)))
    bad_group = b"-" * 16 + bytes(32 + EXCHANGE_MESSAGE_BYTES)
    with pytest.raises(RemoteProtocolError, match="group id"):
        joiner().proof(EnrolFrame(kind=enrolment.CODE_ANSWER, body=bad_group))


def test_exchange_keys_differ_with_code_and_context() -> None:
    def run(joiner_word: bytes, context: bytes) -> tuple[bytes, bytes]:
        ours = begin_exchange(joiner_word, is_sponsor=False, context=context)
        theirs = begin_exchange(b"word", is_sponsor=True, context=b"here")
        assert len(ours.message) == EXCHANGE_MESSAGE_BYTES
        return ours.finish(theirs.message), theirs.finish(ours.message)

    same = run(b"word", b"here")
    assert same[0] == same[1]
    assert len(same[0]) == 32
    for word, context in ((b"other", b"here"), (b"word", b"there")):
        ours, theirs = run(word, context)
        assert ours != theirs


@pytest.mark.parametrize(
    "hostile",
    [b"", b"B", b"A" + bytes(32), b"B" + bytes(32), b"B" + b"\xff" * 32, b"B\x01" + bytes(31)],
    ids=["empty", "short", "same side", "zero", "no point", "identity"],
)
def test_hostile_exchange_messages_are_refused(hostile: bytes) -> None:
    side = begin_exchange(b"word", is_sponsor=False, context=b"")
    with pytest.raises(RemoteProtocolError):
        side.finish(hostile)


def test_reflected_message_is_refused() -> None:
    side = begin_exchange(b"word", is_sponsor=False, context=b"")
    with pytest.raises(RemoteProtocolError):
        side.finish(b"B" + side.message[1:])
