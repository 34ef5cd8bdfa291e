"""Enrolment over the listening port: a joiner with an invite file, a sponsor that made it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Final

import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from p2ptrain import limits
from p2ptrain.errors import ConfigError, P2PTrainError, RemoteProtocolError, TrustError
from p2ptrain.net.listener import connect
from p2ptrain.store.groups import (
    Group,
    NewMember,
    claim_invite,
    find_invite,
    load_issuer,
    store_member,
)
from p2ptrain.store.home import Home
from p2ptrain.trust import certificates as certs
from p2ptrain.trust.chains import check_issuers
from p2ptrain.trust.enrolment import (
    PREFIX,
    EnrolFrame,
    EnrolmentGrant,
    EnrolmentRequest,
    Joiner,
    Sponsor,
    parse_enrol_prefix,
    refusal,
)
from p2ptrain.trust.invite import Invite, same_root

CLOCK_SKEW_MAX_S: Final = 240.0
"""Below the back-dating of certificates, so that a fresh one is valid here at once."""


async def enrol(
    invite: Invite, *, home: Home, device_name: str, addresses: Sequence[str] = ()
) -> Group:
    """Join the invite's group: make keys, have them certified, store the membership.

    Args:
        addresses: Tried before those in the invite.

    Raises:
        TrustError: refused, expired, not the promised group, or nobody reachable; nothing stored.
        ConfigError: the device name cannot be used, or this device already is a member.
    """
    if time.time() > invite.expires_at_s:
        raise TrustError("the invite has expired by this device's clock")
    try:
        certs.check_name(device_name)
    except ValueError as error:
        raise ConfigError(f"{device_name!r} cannot be the name of a device: {error}") from error
    unreachable: list[str] = []
    for address in dict.fromkeys((*addresses, *invite.addresses)):
        try:
            sock = await connect(address)
        except OSError as error:
            unreachable.append(f"{address} ({error.strerror or 'cannot be reached'})")
            continue
        return await _enrol_over(sock, invite, home, device_name)
    raise TrustError(
        f"the sponsor cannot be reached at {', '.join(unreachable) or 'no address'}",
        hint="is the peer that made the invite running? give its address with --peer host:port",
    )


class EnrolmentServer:
    """The sponsor's side, for Links' `enrolment`; at most ENROLMENTS_MAX at a time."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._running = 0

    async def __call__(self, sock: trio.socket.SocketType) -> None:
        """Serve one joiner; never raises for what it does."""
        if self._running >= limits.ENROLMENTS_MAX:
            sock.close()
            return
        self._running += 1
        try:
            await serve_enrolment(trio.SocketStream(sock), self._group)
        except (P2PTrainError, trio.BrokenResourceError, trio.ClosedResourceError, OSError):
            return  # the joiner was told why where that was possible
        finally:
            self._running -= 1
            sock.close()


async def serve_enrolment(stream: trio.abc.Stream, group: Group) -> None:
    """Admit whoever holds a pending invite of this device, in at most ENROL_TIMEOUT_S.

    The invite is used up once the joiner has proved that it knows the secret; cancelling after
    that means a new invite is needed.

    Raises:
        TrustError: the joiner was refused, and told so.
        RemoteProtocolError: it broke the protocol or was too slow.
    """
    try:
        with trio.fail_after(limits.ENROL_TIMEOUT_S):
            await _admit(stream, group)
            await _wait_end(stream)
    except trio.TooSlowError as error:
        raise RemoteProtocolError("a joiner was too slow") from error
    finally:
        await trio.aclose_forcefully(stream)


async def _admit(stream: trio.abc.Stream, group: Group) -> None:
    offer = await _receive(stream)
    invite_id = Sponsor.invite_id(offer)
    pending = find_invite(group, invite_id)
    if pending is None:
        await _refuse(stream, "unknown")
        return
    if pending.expires_at_s < time.time():
        claim_invite(group, invite_id)
        await _refuse(stream, "expired")
        return
    sponsor = Sponsor(X25519PrivateKey.generate(), root_hash=certs.root_hash(group.root))
    await stream.send_all(sponsor.answer(offer, bytes.fromhex(pending.shared_key)).encoded())
    try:
        request = sponsor.request(await _receive(stream))
    except (TrustError, RemoteProtocolError) as error:
        await _refuse(stream, "confirmation" if isinstance(error, TrustError) else "request")
        return
    if not claim_invite(group, invite_id):
        await _refuse(stream, "unknown")
        return
    try:
        grant = _grant(group, request)
    except TrustError:
        await _refuse(stream, "chain")
        raise
    await stream.send_all(sponsor.grant(grant).encoded())


def _grant(group: Group, request: EnrolmentRequest) -> EnrolmentGrant:
    device_key = certs.requested_key(certs.request_from_der(request.device_csr))
    issuer = load_issuer(group)
    now = time.time()
    admitted = certs.issue_issuer(
        issuer,
        certs.request_from_der(request.issuer_csr),
        device=certs.device_id(device_key),
        gid=group.id,
        name=request.name,
        now=now,
    )
    chain = (admitted, *issuer.chain)
    return EnrolmentGrant(
        group_name=group.name,
        root=certs.to_der(group.root),
        issuers=tuple(certs.to_der(certificate) for certificate in chain),
        clock_s=now,
    )


async def _enrol_over(
    sock: trio.socket.SocketType, invite: Invite, home: Home, device_name: str
) -> Group:
    device_key, issuer_key = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    request = EnrolmentRequest(
        name=device_name,
        device_csr=_csr(device_key, device_name),
        issuer_csr=_csr(issuer_key, device_name),
    )
    stream = trio.SocketStream(sock)
    try:
        with trio.fail_after(limits.ENROL_TIMEOUT_S):
            grant = await _ask(stream, invite, request)
    except (trio.TooSlowError, trio.BrokenResourceError, RemoteProtocolError) as error:
        raise TrustError("the sponsor did not complete the enrolment") from error
    finally:
        await trio.aclose_forcefully(stream)
    member = _checked_member(grant, invite, device_key, issuer_key, device_name)
    return store_member(home, grant.group_name, member)


async def _ask(
    stream: trio.abc.Stream, invite: Invite, request: EnrolmentRequest
) -> EnrolmentGrant:
    joiner = Joiner(invite, X25519PrivateKey.generate())
    await stream.send_all(joiner.offer().encoded())
    asked = joiner.request(await _receive(stream), request)
    await stream.send_all(asked.encoded())
    return joiner.grant(await _receive(stream))


def _checked_member(
    grant: EnrolmentGrant,
    invite: Invite,
    device_key: Ed25519PrivateKey,
    issuer_key: Ed25519PrivateKey,
    device_name: str,
) -> NewMember:
    """Believe a grant only as far as the invite's root hash and our own keys reach."""
    if not same_root(invite, grant.root):
        raise TrustError("the sponsor belongs to another group than the invite")
    now = time.time()
    ahead_s = grant.clock_s - now
    if abs(ahead_s) > CLOCK_SKEW_MAX_S:
        raise TrustError(
            f"this device's clock differs from the sponsor's by {abs(ahead_s):.0f} s",
            hint="set the clock of this device, then ask for a new invite",
        )
    root = certs.certificate_from_der(grant.root)
    chain = tuple(certs.certificate_from_der(der) for der in grant.issuers)
    certs.check_root(root, now=now)
    check_issuers(root, chain, now=now)
    if certs.device_id(issuer_key.public_key()) != certs.certificate_device(chain[0]):
        raise TrustError("the sponsor certified another key than ours")
    issuer = certs.Issuer(key=issuer_key, certificate=chain[0], above=chain[1:])
    return NewMember(root=root, issuer=issuer, device_key=device_key, device_name=device_name)


def _csr(key: Ed25519PrivateKey, name: str) -> bytes:
    return certs.request_to_der(certs.request_certificate(key, name=name))


async def _refuse(stream: trio.abc.Stream, reason: str) -> None:
    await stream.send_all(refusal(reason).encoded())


async def _receive(stream: trio.abc.Stream) -> EnrolFrame:
    kind, length = parse_enrol_prefix(await _receive_exactly(stream, PREFIX.size))
    return EnrolFrame(kind=kind, body=await _receive_exactly(stream, length))


async def _receive_exactly(stream: trio.abc.Stream, length: int) -> bytes:
    received = bytearray()
    while len(received) < length:
        chunk = await stream.receive_some(length - len(received))
        if not chunk:
            raise RemoteProtocolError("the other side hung up during enrolment")
        received += chunk
    return bytes(received)


async def _wait_end(stream: trio.abc.Stream) -> None:
    """Let the joiner read the answer: closing on unread data would throw it away."""
    if isinstance(stream, trio.SocketStream):
        await stream.send_eof()
    while await stream.receive_some(1024):
        pass
