"""Enrolment over the listening port, the joiner's side: with an invite, or with a short code."""

from __future__ import annotations

import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import trio
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from p2ptrain import limits
from p2ptrain.errors import ConfigError, RemoteProtocolError, TrustError
from p2ptrain.ids import GroupId
from p2ptrain.net.enrol_stream import receive_frame, send_frame
from p2ptrain.net.listener import connect
from p2ptrain.store.groups import Group, NewMember, store_member
from p2ptrain.store.home import Home
from p2ptrain.trust import certificates as certs
from p2ptrain.trust.chains import check_in_date, key_fingerprint, member_chain, root_of
from p2ptrain.trust.code import code_password, read_code
from p2ptrain.trust.code_enrolment import NONCE_BYTES, CodeJoiner
from p2ptrain.trust.enrolment import REFUSALS, EnrolmentGrant, EnrolmentRequest, Joiner, Sealed
from p2ptrain.trust.invite import Invite, same_root
from p2ptrain.trust.revocation import RevokedKeys, check_revocation
from p2ptrain.trust.rotation import Roots

CLOCK_SKEW_MAX_S: Final = 240.0
"""Below the back-dating of certificates, so that a fresh one is valid here at once."""
_SAYS_LITTLE: Final = (REFUSALS["unknown"], REFUSALS["no code"])
_INVITE_HINT: Final = (
    "is the peer that made the invite running? give its address with --peer host:port"
)
_CODE_HINT: Final = (
    "is the peer that showed the code running? give its address with --peer host:port"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Enrolled:
    """A new membership."""

    group: Group
    clock_ahead_s: float
    """How far the sponsor's clock is ahead of ours; where that is more than CLOCK_SKEW_MAX_S our
    clock is taken for the wrong one, because the sponsor has just proved who it is."""

    @property
    def clock_is_wrong(self) -> bool:
        """Whether this device's clock cannot be used."""
        return abs(self.clock_ahead_s) > CLOCK_SKEW_MAX_S


async def enrol(
    invite: Invite, *, home: Home, device_name: str, addresses: Sequence[str] = ()
) -> Enrolled:
    """Join the invite's group: make keys, have them certified, store the membership.

    Args:
        addresses: Tried before those in the invite.

    Raises:
        TrustError: refused, expired, not the promised group, or nobody reachable; nothing stored.
        ConfigError: the device name cannot be used, or this device already is a member.
    """

    async def agree(stream: trio.abc.Stream) -> Sealed:
        joiner = Joiner(invite, X25519PrivateKey.generate())
        await send_frame(stream, joiner.offer())
        return joiner.agreed(await receive_frame(stream))

    def expected(grant: EnrolmentGrant) -> bool:
        return same_root(invite, grant.root)

    candidate = _Candidate(device_name)
    refused: TrustError | None = None
    for address in dict.fromkeys((*addresses, *invite.addresses)):
        try:
            sock = await _first_reachable([address], _INVITE_HINT)
            grant = await _enrol_over(sock, agree, candidate)
        except TrustError as error:
            refused = _more_telling(refused, error)
            continue
        return candidate.store(grant, home=home, alias=grant.group_name, expected=expected)
    raise refused or TrustError("the invite holds no address", hint=_INVITE_HINT)


async def enrol_with_code(
    code: str,
    *,
    home: Home,
    alias: str,
    device_name: str,
    sponsors: Sequence[Sequence[str]],
) -> Enrolled:
    """Join the group of whoever shows this code.

    Args:
        alias: What this device calls the group.
        sponsors: Who may show the code, each with its addresses (host:port); one after the other
            gets one guess at it, until one knows it.

    Raises:
        TrustError: refused, or nobody reachable; nothing stored.
        ConfigError: not a code, the device name cannot be used, or a member already.
    """
    password = code_password(read_code(code))
    candidate = _Candidate(device_name)
    refused: TrustError | None = None
    for addresses in sponsors:
        joiner = CodeJoiner(password, secrets.token_bytes(NONCE_BYTES))
        try:
            sock = await _first_reachable(addresses, _CODE_HINT)
            grant = await _enrol_over(sock, partial(_prove, joiner), candidate)
        except TrustError as error:
            refused = _more_telling(refused, error)
            continue
        expected = partial(_is_of, joiner.group)
        return candidate.store(grant, home=home, alias=alias, expected=expected)
    raise refused or TrustError("no member that shows a code was found", hint=_CODE_HINT)


def _more_telling(one: TrustError | None, other: TrustError) -> TrustError:
    """Of two attempts that failed, the one to tell: who knows us says more than who does not."""
    if one is None or one.message in _SAYS_LITTLE or "cannot be reached" in one.message:
        return other
    return one


async def _prove(joiner: CodeJoiner, stream: trio.abc.Stream) -> Sealed:
    await send_frame(stream, joiner.offer())
    answer = await receive_frame(stream)
    await send_frame(stream, await trio.to_thread.run_sync(joiner.proof, answer))
    return joiner.agreed(await receive_frame(stream))


def _is_of(gid: GroupId | None, grant: EnrolmentGrant) -> bool:
    return certs.group_id(certs.certificate_from_der(grant.root)) == gid


async def _first_reachable(addresses: Sequence[str], hint: str) -> trio.socket.SocketType:
    unreachable: list[str] = []
    for address in dict.fromkeys(addresses):
        try:
            return await connect(address)
        except OSError as error:
            unreachable.append(f"{address} ({error.strerror or 'cannot be reached'})")
    raise TrustError(
        f"the sponsor cannot be reached at {', '.join(unreachable) or 'no address'}", hint=hint
    )


async def _enrol_over(
    sock: trio.socket.SocketType,
    agree: Callable[[trio.abc.Stream], Awaitable[Sealed]],
    candidate: _Candidate,
) -> EnrolmentGrant:
    stream = trio.SocketStream(sock)
    try:
        with trio.fail_after(limits.ENROL_TIMEOUT_S):
            keys = await agree(stream)
            await send_frame(stream, keys.ask(candidate.request()))
            return keys.granted(await receive_frame(stream))
    except (trio.TooSlowError, trio.BrokenResourceError, RemoteProtocolError) as error:
        raise TrustError("the sponsor did not complete the enrolment") from error
    finally:
        await trio.aclose_forcefully(stream)


class _Candidate:
    """Fresh keys of a device that wants to become a member; they never leave it."""

    def __init__(self, name: str) -> None:
        """Raises ConfigError when the name cannot be used."""
        try:
            self._name = certs.check_name(name)
        except ValueError as error:
            raise ConfigError(f"{name!r} cannot be the name of a device: {error}") from error
        self._device_key = Ed25519PrivateKey.generate()
        self._issuer_key = Ed25519PrivateKey.generate()

    def request(self) -> EnrolmentRequest:
        """Both keys, proved."""
        return EnrolmentRequest(
            name=self._name,
            device_csr=_csr(self._device_key, self._name),
            issuer_csr=_csr(self._issuer_key, self._name),
        )

    def store(
        self,
        grant: EnrolmentGrant,
        *,
        home: Home,
        alias: str,
        expected: Callable[[EnrolmentGrant], bool],
    ) -> Enrolled:
        """Check a grant and keep the membership; TrustError when it is not what was promised."""
        ahead_s = grant.clock_s - time.time()
        if not expected(grant):
            raise TrustError("the sponsor belongs to another group than was promised")
        is_wrong = abs(ahead_s) > CLOCK_SKEW_MAX_S
        now = grant.clock_s if is_wrong else time.time()
        group = store_member(home, alias, self._checked(grant, now))
        return Enrolled(group=group, clock_ahead_s=ahead_s)

    def _checked(self, grant: EnrolmentGrant, now: float) -> NewMember:
        """Believe a grant only as far as its root and our own keys reach."""
        root = certs.certificate_from_der(grant.root)
        gid = certs.check_root(root, now=now)
        roots = Roots(root, grant.rotations, gid=gid)
        chain = tuple(certs.certificate_from_der(der) for der in grant.issuers)
        root_of(chain, roots.ever)
        check_in_date(chain, now=now)
        _check_revocations(grant, chain, roots, gid)
        if grant.leaf:
            return self._plain(grant, root, chain, roots, now)
        if self._issuer_key.public_key() != certs.as_ed25519(chain[0]):
            raise TrustError("the sponsor certified another key than ours")
        return NewMember(
            root=root,
            device_key=self._device_key,
            device_name=self._name,
            issuer=certs.Issuer(key=self._issuer_key, certificate=chain[0], above=chain[1:]),
            rotations=grant.rotations,
            revocations=grant.revocations,
            now_s=now,
        )

    def _plain(
        self,
        grant: EnrolmentGrant,
        root: x509.Certificate,
        issuers: tuple[x509.Certificate, ...],
        roots: Roots,
        now: float,
    ) -> NewMember:
        leaf = certs.certificate_from_der(grant.leaf)
        gid = certs.group_id(root)
        chain = member_chain((leaf, *issuers), gid=gid, roots=roots.ever)
        check_in_date(chain.certificates, now=now)
        if self._device_key.public_key() != certs.as_ed25519(leaf):
            raise TrustError("the sponsor certified another key than ours")
        return NewMember(
            root=root,
            device_key=self._device_key,
            device_name=self._name,
            chain=chain.certificates,
            rotations=grant.rotations,
            revocations=grant.revocations,
        )


def _check_revocations(
    grant: EnrolmentGrant, chain: Sequence[x509.Certificate], roots: Roots, gid: GroupId
) -> None:
    for statement in grant.revocations:
        check_revocation(statement, gid=gid, roots=roots.ever)
    revoked = RevokedKeys(grant.revocations)
    if revoked.against([key_fingerprint(certificate) for certificate in chain]) is not None:
        raise TrustError("the sponsor was revoked, by its own account")


def _csr(key: Ed25519PrivateKey, name: str) -> bytes:
    return certs.request_to_der(certs.request_certificate(key, name=name))
