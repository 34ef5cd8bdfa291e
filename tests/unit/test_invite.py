"""Invites: what the file holds, what the sponsor keeps, what is refused."""

from __future__ import annotations

import dataclasses
import json

import pytest

from p2ptrain import limits
from p2ptrain.errors import TrustError
from p2ptrain.trust.invite import (
    Invite,
    PendingInvite,
    invite_url,
    read_invite,
    read_invite_url,
    read_pending,
    same_root,
    write_invite,
)

INVITE = Invite(
    group_name="home",
    addresses=("10.0.0.1:7000", "[fe80::1]:7000"),
    root_hash="ab" * 32,
    secret="01" * 16,
    expires_at_s=1_800_000_000.0,
)


def test_invite_round_trips() -> None:
    assert read_invite(write_invite(INVITE)) == INVITE


def test_what_the_sponsor_keeps_does_not_give_the_secret_away() -> None:
    pending = PendingInvite(shared_key=INVITE.shared_key.hex(), expires_at_s=1.0)
    content = write_invite(pending)
    assert read_pending(content) == pending
    assert INVITE.secret.encode() not in content
    assert INVITE.id not in content.decode()


def test_id_and_key_follow_from_the_secret_alone() -> None:
    again = read_invite(write_invite(INVITE).replace(b"home", b"else"))
    other = read_invite(write_invite(INVITE).replace(b"0101", b"0102"))
    assert (again.id, again.shared_key) == (INVITE.id, INVITE.shared_key)
    assert other.id != INVITE.id


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("version", 2),
        ("group_name", "a/b"),
        ("root_hash", "ab"),
        ("secret", "01"),
        ("secret", "zz" * 16),
        ("addresses", ["x"] * 17),
        ("addresses", ["x" * 261]),
        ("expires_at_s", "soon"),
    ],
)
def test_damaged_invite_is_refused(field: str, value: object) -> None:
    document = json.loads(write_invite(INVITE))
    document[field] = value
    with pytest.raises(TrustError, match="not a usable invite"):
        read_invite(json.dumps(document).encode())


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{", b"\xff", b"[" * 8000, b" " * (limits.INVITE_BYTES_MAX + 1)],
    ids=["empty", "list", "cut", "binary", "nested", "huge"],
)
def test_file_that_is_no_invite_is_refused(content: bytes) -> None:
    with pytest.raises(TrustError, match="not a usable invite"):
        read_invite(content)
    with pytest.raises(TrustError, match="damaged"):
        read_pending(content)


def test_root_is_compared_by_hash() -> None:
    assert not same_root(INVITE, b"another")


def test_invite_travels_as_a_url() -> None:
    url = invite_url(INVITE)
    assert url.startswith("p2ptrain://join/1?g=home&")
    assert read_invite_url(url) == INVITE
    assert len(url) < 300  # a QR code that a phone reads from a terminal
    odd = dataclasses.replace(INVITE, group_name="Müller & Söhne", addresses=())
    assert read_invite_url(invite_url(odd)) == odd


@pytest.mark.parametrize(
    "url",
    [
        "",
        "https://example.org/",
        "p2ptrain://join/2?g=home",
        "p2ptrain://join/1?",
        "p2ptrain://join/1?g=home",
        invite_url(INVITE).replace("&s=01", "&s=0"),
        invite_url(INVITE) + "&g=other",
        invite_url(INVITE) + "&a=x" * 40,
        invite_url(INVITE) + "a" * 20_000,
    ],
)
def test_what_is_no_invite_url_is_refused(url: str) -> None:
    with pytest.raises(TrustError, match="not a usable invite"):
        read_invite_url(url)
