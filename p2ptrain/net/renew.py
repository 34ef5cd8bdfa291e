"""Ask an issuer of the group for the time and fresh certificates, outside mutual TLS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from p2ptrain import limits
from p2ptrain.errors import ConfigError, RemoteProtocolError, TrustError
from p2ptrain.ids import GroupId
from p2ptrain.net.enrol_stream import receive_frame, send_frame
from p2ptrain.net.listener import connect
from p2ptrain.trust import certificates as certs
from p2ptrain.trust.chains import MemberChain
from p2ptrain.trust.renewal import RenewalClient, RenewalGranted
from p2ptrain.trust.revocation import RevokedKeys
from p2ptrain.trust.rotation import Roots


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Certificate requests (DER) for keys that the member has already."""

    device_csr: bytes
    issuer_csr: bytes = b""
    """Empty: a leaf is wanted; otherwise an issuer, and the member signs its own leaf."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Who asks, and what it knows."""

    gid: GroupId
    chain: MemberChain
    key: Ed25519PrivateKey
    roots: Roots
    """Rotations that the issuer knows are added."""
    revoked: RevokedKeys


@dataclass(frozen=True, slots=True, kw_only=True)
class Met:
    """What an issuer said."""

    clock_s: float
    """Its time, signed a moment ago."""
    by: str
    """Its name."""
    granted: RenewalGranted | None
    """None when nothing was wanted."""


async def meet_issuer(
    address: str, identity: Identity, wants: Callable[[float, str], Wanted | None]
) -> Met:
    """Hear the time from an issuer at host:port and have certified what is wanted then.

    Args:
        wants: Given its time and its name; what to ask for, or None. Raises TrustError to stop.

    Raises:
        TrustError: nobody there who may vouch, or refused; try another address.
    """
    try:
        sock = await connect(address)
    except (OSError, ConfigError) as error:
        raise TrustError(f"{address} cannot be reached") from error
    stream = trio.SocketStream(sock)
    try:
        with trio.fail_after(limits.ENROL_TIMEOUT_S):
            return await _meet(stream, identity, wants)
    except (trio.TooSlowError, trio.BrokenResourceError, RemoteProtocolError) as error:
        raise TrustError(f"{address} did not complete a renewal") from error
    finally:
        await trio.aclose_forcefully(stream)


async def _meet(
    stream: trio.abc.Stream, identity: Identity, wants: Callable[[float, str], Wanted | None]
) -> Met:
    client = RenewalClient(identity.gid, X25519PrivateKey.generate())
    await send_frame(stream, client.offer())
    answer = await receive_frame(stream)
    shown = client.met(answer, roots=identity.roots, revoked=identity.revoked)
    name = certs.common_name(certs.certificate_from_der(shown.issuers[0])).partition(" issuer ")[0]
    wanted = wants(shown.clock_s, name)
    if wanted is None:
        return Met(clock_s=shown.clock_s, by=name, granted=None)
    asked = client.ask(
        identity.chain,
        identity.key,
        device_csr=wanted.device_csr,
        issuer_csr=wanted.issuer_csr,
    )
    await send_frame(stream, asked)
    granted = client.granted(await receive_frame(stream))
    return Met(clock_s=shown.clock_s, by=name, granted=granted)
