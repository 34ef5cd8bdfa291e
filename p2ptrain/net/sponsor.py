"""Enrolment over the listening port, the sponsor's side: invites, codes and renewals."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import trio
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from p2ptrain import limits
from p2ptrain.errors import P2PTrainError, RemoteProtocolError, TrustError
from p2ptrain.net.enrol_stream import receive_frame, send_frame, wait_end
from p2ptrain.store.codes import claim_code, open_code, spend_try
from p2ptrain.store.granting import grant_membership, live_issuer
from p2ptrain.store.groups import Group, claim_invite, find_invite
from p2ptrain.store.trust_log import read_revoked, read_roots
from p2ptrain.trust import certificates as certs
from p2ptrain.trust.chains import check_in_date
from p2ptrain.trust.code import PendingCode
from p2ptrain.trust.code_enrolment import NONCE_BYTES, CodeSponsor
from p2ptrain.trust.enrolment import (
    CODE_OFFER,
    RENEW_OFFER,
    EnrolFrame,
    EnrolmentRequest,
    Sealed,
    Sponsor,
    refusal,
)
from p2ptrain.trust.renewal import RenewalServer, renew


def ignore_change() -> None:
    """For a sponsor whose codes nobody announces."""


class EnrolmentServer:
    """The sponsor's side, for Links' `enrolment`; at most ENROLMENTS_MAX at a time."""

    def __init__(
        self,
        group: Group,
        *,
        on_code_changed: Callable[[], None] = ignore_change,
        now: Callable[[], float] = time.time,
    ) -> None:
        """Takes what tells the time to put into certificates, seconds since 1970."""
        self._group = group
        self._now = now
        self._on_code_changed = on_code_changed
        self._running = 0
        self._one_guess = trio.Lock()

    async def __call__(self, sock: trio.socket.SocketType) -> None:
        """Serve one joiner; never raises for what it does."""
        if self._running >= limits.ENROLMENTS_MAX:
            sock.close()
            return
        self._running += 1
        try:
            stream = trio.SocketStream(sock)
            await serve_enrolment(stream, self._group, self._one_guess, now=self._now)
        except (P2PTrainError, trio.BrokenResourceError, trio.ClosedResourceError, OSError):
            return  # the joiner was told why where that was possible
        finally:
            self._running -= 1
            sock.close()
            self._on_code_changed()


async def serve_enrolment(
    stream: trio.abc.Stream,
    group: Group,
    one_guess: trio.Lock,
    *,
    now: Callable[[], float] = time.time,
) -> None:
    """Admit whoever holds an invite or the code of this device, or renew a member's certificates.

    At most ENROL_TIMEOUT_S.

    An invite or code is used up once the joiner has proved that it knows the secret; cancelling
    after that means a new one is needed.

    Args:
        one_guess: Shared by all enrolments of this device: guesses at its code are judged one
            after the other, so that three wrong ones are not four at once.

    Raises:
        TrustError: the joiner was refused, and told so.
        RemoteProtocolError: it broke the protocol or was too slow.
    """
    try:
        with trio.fail_after(limits.ENROL_TIMEOUT_S):
            await _serve(stream, group, one_guess, now)
            await wait_end(stream)
    except trio.TooSlowError as error:
        raise RemoteProtocolError("a joiner was too slow") from error
    finally:
        await trio.aclose_forcefully(stream)


async def _serve(
    stream: trio.abc.Stream, group: Group, one_guess: trio.Lock, now: Callable[[], float]
) -> None:
    offer = await receive_frame(stream)
    if offer.kind == RENEW_OFFER:
        await _renew(stream, group, offer, now())
        return
    if offer.kind == CODE_OFFER:
        invited = await _invited_by_code(stream, group, offer, one_guess)
    else:
        invited = await _invited_by_secret(stream, group, offer)
    if invited is not None:
        await _grant(stream, group, invited, now())


@dataclass(frozen=True, slots=True, kw_only=True)
class _Invited:
    """Somebody who has proved that it was invited, and what it asks."""

    keys: Sealed
    request: EnrolmentRequest
    admits: bool


async def _invited_by_secret(
    stream: trio.abc.Stream, group: Group, offer: EnrolFrame
) -> _Invited | None:
    invite_id = Sponsor.invite_id(offer)
    pending = find_invite(group, invite_id)
    if pending is None:
        await _refuse(stream, "unknown")
        return None
    if pending.expires_at_s < time.time():
        claim_invite(group, invite_id)
        await _refuse(stream, "expired")
        return None
    sponsor = Sponsor(X25519PrivateKey.generate(), root_hash=certs.root_hash(group.root))
    answer, keys = sponsor.answer(offer, bytes.fromhex(pending.shared_key))
    await send_frame(stream, answer)
    request = await _asked(stream, keys)
    if request is None:
        return None
    if not claim_invite(group, invite_id):
        await _refuse(stream, "unknown")
        return None
    return _Invited(keys=keys, request=request, admits=pending.admits)


async def _invited_by_code(
    stream: trio.abc.Stream, group: Group, offer: EnrolFrame, one_guess: trio.Lock
) -> _Invited | None:
    pending = open_code(group)
    if pending is None:
        await _refuse(stream, "no code")
        return None
    sponsor = CodeSponsor(group.id, secrets.token_bytes(NONCE_BYTES))
    password = bytes.fromhex(pending.password)
    # Pure Python arithmetic of some milliseconds: not in the thread that serves the links.
    answer = await trio.to_thread.run_sync(partial(sponsor.answer, offer, password))
    await send_frame(stream, answer)
    proof = await receive_frame(stream)
    async with one_guess:
        judged = await _judge_guess(group, pending, sponsor, proof)
    if isinstance(judged, str):
        await _refuse(stream, judged)
        return None
    confirm, keys = judged
    await send_frame(stream, confirm)
    request = await _asked(stream, keys)
    if request is None:
        return None
    return _Invited(keys=keys, request=request, admits=pending.admits)


async def _judge_guess(
    group: Group, pending: PendingCode, sponsor: CodeSponsor, proof: EnrolFrame
) -> str | tuple[EnrolFrame, Sealed]:
    """What to send on and the keys, with the code used up; or why the guess is refused."""
    current = open_code(group)
    if current is None or current.password != pending.password:
        return "no code"
    try:
        agreed = await trio.to_thread.run_sync(sponsor.agreed, proof)
    except (TrustError, RemoteProtocolError):
        # Durable before the one who guessed learns that it was wrong.
        return "code" if spend_try(group, pending) else "void"
    return agreed if claim_code(group, pending) else "no code"


async def _asked(stream: trio.abc.Stream, keys: Sealed) -> EnrolmentRequest | None:
    try:
        return keys.asked(await receive_frame(stream))
    except (TrustError, RemoteProtocolError) as error:
        await _refuse(stream, "confirmation" if isinstance(error, TrustError) else "request")
        return None


async def _grant(stream: trio.abc.Stream, group: Group, invited: _Invited, now: float) -> None:
    try:
        granted = grant_membership(group, invited.request, admits=invited.admits, now=now)
    except TrustError:
        await _refuse(stream, "chain")
        raise
    await send_frame(stream, invited.keys.grant(granted))


async def _renew(stream: trio.abc.Stream, group: Group, offer: EnrolFrame, now: float) -> None:
    """Vouch for the time, and certify the keys of a member again."""
    try:
        issuer = live_issuer(group)
        check_in_date(issuer.chain, now=now)
    except TrustError:
        await _refuse(stream, "chain")
        raise
    roots = read_roots(group.folder, group.root, group.id)
    server = RenewalServer(group.id, issuer, X25519PrivateKey.generate())
    await send_frame(stream, server.answer(offer, rotations=roots.rotations, now=now))
    frame = await receive_frame(stream)  # or it hangs up: the time was all that it wanted
    revoked = read_revoked(group.folder, roots, group.id)
    try:
        chain, asked = server.asked(frame, roots=roots, revoked=revoked, now=now)
    except TrustError as error:
        await _refuse(stream, error.message)
        raise
    try:
        granted = renew(
            issuer,
            chain,
            gid=group.id,
            device_csr=asked.device_csr,
            issuer_csr=asked.issuer_csr,
            now=now,
        )
    except TrustError:
        await _refuse(stream, "request")
        raise
    await send_frame(stream, server.grant(granted))


async def _refuse(stream: trio.abc.Stream, reason: str) -> None:
    await send_frame(stream, refusal(reason))
