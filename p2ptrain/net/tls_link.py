"""TLS 1.3 over a trio socket through MemoryBIO, decrypting straight into the caller's memory.

Over twice the throughput of trio.SSLStream at 0.6 of its CPU: `recv_into` reads up to 1 MiB of
ciphertext at once, `SSLObject.read` decrypts into the caller's array, and 512 KiB of plaintext
are encrypted per call (`tools/BENCHMARKS.md`).
"""

from __future__ import annotations

import contextlib
import math
import socket
import ssl
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import trio

from p2ptrain import limits
from p2ptrain.errors import InvariantBroken, TrustError
from p2ptrain.ids import DeviceId
from p2ptrain.net.delivery_rate import delivery
from p2ptrain.trust.certificates import peer_identity
from p2ptrain.trust.credentials import Credentials
from p2ptrain.wire.throughput import DELIVERED_BYTES_MIN, Throughput

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

PLAINTEXT_CHUNK_BYTES: Final = 512 * 1024
CIPHERTEXT_BUFFER_BYTES: Final = 1024 * 1024
FIRST_BUFFER_BYTES: Final = 64 * 1024
"""Enough for a link that carries messages; the first time that it is filled a larger one comes."""
_PRIORITIZE_CHACHA: Final = 1 << 21
"""SSL_OP_PRIORITIZE_CHACHA: a client without AES instructions puts ChaCha20 first and gets it."""
_NO_CHECK_TIME: Final = ssl.VerifyFlags(0x200000)
"""OpenSSL's X509_V_FLAG_NO_CHECK_TIME, which Python passes on."""
CLOCKS_DIFFER: Final = "check the clocks of both devices"
"""How a refusal because of dates ends."""
OTHER_ROOT: Final = "the peer belongs to another group, or to none"
"""What is said of a chain to a root that we do not trust; it may be a successor of ours."""
_OUR_ROOT_REFUSED: Final = "unknown ca"
"""How the reason ends when they do not trust the root that our chain leads to."""
_ENCODING_DER: Final = 2
"""OpenSSL's X509_FILETYPE_ASN1, as `_ssl.Certificate.public_bytes` takes it."""
_CUT_SHORT: Final = "the peer closed the link in the middle of a frame"
_TOLD_BY_PEER: Final = ("CERTIFICATE", "UNKNOWN_CA", "ACCESS_DENIED")


class LinkBroken(Exception):
    """A link ended; whoever used it drops it. Never reaches a person as it is."""

    def __init__(self, reason: str, *, closed_by_peer: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.closed_by_peer = closed_by_peer


class LinkRefused(LinkBroken):
    """One side did not accept the other's certificate: dialling again will not help."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkStatistics:
    """Bytes of one link since it was made."""

    plaintext_bytes_sent: int
    plaintext_bytes_received: int
    socket_bytes_sent: int
    """Ciphertext with all of TLS's own messages."""
    socket_bytes_received: int
    unsent_bytes: int
    """Ciphertext that the kernel has not taken, now; at most LINK_UNSENT_BYTES_MAX."""


def concerns_root(reason: str) -> bool:
    """Whether a refusal is about a root, here or over there: a rotation may explain it."""
    return reason == OTHER_ROOT or reason.endswith(_OUR_ROOT_REFUSED)


def server_context(credentials: Credentials) -> ssl.SSLContext:
    """TLS 1.3 with the client's certificate required and no resumption.

    Raises:
        TrustError: our own key or certificates do not fit together.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.options |= _PRIORITIZE_CHACHA
    context.num_tickets = 0  # every connection verifies certificates again
    return _configured(context, credentials)


def client_context(credentials: Credentials) -> ssl.SSLContext:
    """TLS 1.3; identity is the certificate's key, so no host name is checked."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    return _configured(context, credentials)


def tune_socket(sock: trio.socket.SocketType) -> None:
    """No delay, BBR where allowed (8 times the goodput on lossy Wi-Fi), keep-alive."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    with contextlib.suppress(OSError, AttributeError):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"bbr")
    with contextlib.suppress(OSError, AttributeError):
        for option, value in (
            (socket.TCP_KEEPIDLE, 15),
            (socket.TCP_KEEPINTVL, 5),
            (socket.TCP_KEEPCNT, 3),
        ):
            sock.setsockopt(socket.IPPROTO_TCP, option, value)


class TlsLink:
    """One authenticated connection. One task reads; any number send, one frame at a time."""

    def __init__(
        self, sock: trio.socket.SocketType, context: ssl.SSLContext, *, server_side: bool
    ) -> None:
        self._sock = sock
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=server_side)
        self._buffer = memoryview(bytearray(FIRST_BUFFER_BYTES))
        self._send_lock = trio.Lock()
        self._broken: LinkBroken | None = None
        self._plaintext_sent = 0
        self._plaintext_received = 0
        self._socket_sent = 0
        self._socket_received = 0
        self._unsent_bytes = 0
        self.made_at_s = trio.current_time()
        self.throughput = Throughput()
        """Of what is sent here."""

    async def handshake(self) -> None:
        """Authenticate both sides; on an error or a cancellation the link is closed.

        Raises:
            LinkRefused: a certificate was not accepted, here or over there.
            LinkBroken: no TLS 1.3 on the other side, it went away, or it took too long.
        """
        try:
            with trio.fail_after(limits.HANDSHAKE_TIMEOUT_S):
                await self._handshake()
        except trio.TooSlowError as error:
            raise self._break("the handshake took too long") from error
        except BaseException:
            self.close()
            raise

    def peer_device(self, credentials: Credentials) -> DeviceId:
        """Who is at the other end; LinkRefused when the certificate does not say."""
        der = self._tls.getpeercert(binary_form=True)
        try:
            return peer_identity(der or b"", gid=credentials.group)
        except TrustError as error:
            self.close()
            raise LinkRefused(error.message) from error

    def peer_chain(self) -> tuple[bytes, ...]:
        """The chain that OpenSSL verified, as DER: the peer's leaf, its issuers, our root.

        Raises:
            LinkRefused: there is none, or this Python cannot tell it; nobody is let in unjudged.
        """
        chain = _verified_chain(self._tls)
        if len(chain) < 2:
            self.close()
            raise LinkRefused("the chain of the peer's certificates cannot be told")
        return chain

    async def send_all(self, *buffers: ReadableBuffer) -> None:
        """Send buffers as one uninterrupted piece.

        Cancelling leaves half a frame on the wire, so the link is broken then.

        Raises:
            LinkBroken: the connection ended or made no progress for LINK_STALL_TIMEOUT_S.
        """
        async with self._send_lock:
            if self._broken is not None:
                raise self._broken
            try:
                await self._send_buffers(buffers)
            except LinkBroken:
                raise
            except BaseException:
                self._break("a send was cut short")
                raise

    async def recv_exactly(self, target: memoryview) -> None:
        """Fill `target` (writable bytes); cancelling loses the place in the stream.

        Raises:
            LinkBroken: the connection ended or stalled before it was full.
        """
        if len(target) and await self._recv_into(target, idle_s=limits.LINK_STALL_TIMEOUT_S):
            return
        if len(target):
            raise self._break(_CUT_SHORT, by_peer=True)

    async def recv_frame_start(self, target: memoryview) -> bool:
        """Fill `target` at a frame's boundary, however long that takes; False when it ended there.

        Raises:
            LinkBroken: the connection ended or stalled after the first byte.
        """
        return await self._recv_into(target, idle_s=math.inf)

    async def aclose(self) -> None:
        """Say goodbye if that needs no waiting to speak of, then close."""
        with trio.move_on_after(limits.LINK_CLOSE_TIMEOUT_S) as scope:
            scope.shield = True
            if self._broken is None and not self._send_lock.locked():
                async with self._send_lock:
                    with contextlib.suppress(ssl.SSLError, LinkBroken):
                        self._tls.unwrap()
                    with contextlib.suppress(LinkBroken):
                        await self._flush()
        self.close()

    def close(self) -> None:
        """Close the socket at once; every task in the link gets LinkBroken."""
        self._break("the link was closed here")

    @property
    def local_host(self) -> str:
        """Our own address on this link; empty where the socket cannot say."""
        with contextlib.suppress(OSError):
            return _host(self._sock.getsockname())
        return ""

    @property
    def encrypted_bytes(self) -> int:
        """Ciphertext made so far, handshake included, sent or about to be sent."""
        return self._socket_sent + self._outgoing.pending + self._unsent_bytes

    def statistics(self) -> LinkStatistics:
        """Bytes so far."""
        return LinkStatistics(
            plaintext_bytes_sent=self._plaintext_sent,
            plaintext_bytes_received=self._plaintext_received,
            socket_bytes_sent=self._socket_sent,
            socket_bytes_received=self._socket_received,
            unsent_bytes=self._outgoing.pending + self._unsent_bytes,
        )

    async def _handshake(self) -> None:
        while True:
            try:
                self._tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                await self._flush()
                if not await self._fill():
                    raise self._break("the peer hung up", by_peer=True) from None
            except ssl.SSLError as error:
                await self._hand_over_alert()
                raise self._translated(error) from error
        await self._flush()

    async def _send_buffers(self, buffers: tuple[ReadableBuffer, ...]) -> None:
        # One scope for the whole, moved on with every progress: a scope per call costs 15 %.
        with trio.CancelScope(deadline=_stall_deadline()) as scope:
            for buffer in buffers:
                view = memoryview(buffer).cast("B")
                for offset in range(0, len(view), PLAINTEXT_CHUNK_BYTES):
                    self._encrypt(view[offset : offset + PLAINTEXT_CHUNK_BYTES])
                    # Small pieces (a prefix and its header) leave with what follows.
                    if self._outgoing.pending >= PLAINTEXT_CHUNK_BYTES:
                        await self._flush(scope)
            await self._flush(scope)
        if scope.cancelled_caught:
            raise self._break("the peer takes no data")
        if sum(memoryview(buffer).nbytes for buffer in buffers) >= DELIVERED_BYTES_MIN:
            self._look_at_delivery()

    def _look_at_delivery(self) -> None:
        """Between addresses of one host the kernel times how busy the cores are, not a link."""
        if self._remote_host not in ("", self.local_host) and (told := delivery(self._sock)):
            self.throughput.delivered(*told, now=trio.current_time())

    @property
    def _remote_host(self) -> str:
        with contextlib.suppress(OSError):
            return _host(self._sock.getpeername())
        return ""

    def _encrypt(self, chunk: memoryview) -> None:
        try:
            self._plaintext_sent += self._tls.write(chunk)  # into memory: always whole
        except ssl.SSLError as error:
            raise self._translated(error) from error

    async def _flush(self, scope: trio.CancelScope | None = None) -> None:
        """Send pending ciphertext; `scope` is the caller's, whose deadline progress moves."""
        while self._outgoing.pending:
            left = memoryview(self._outgoing.read())
            self._unsent_bytes = len(left)
            while left:
                began_s = trio.current_time()
                try:
                    sent = await self._sock.send(left)
                except (OSError, trio.ClosedResourceError) as error:
                    raise self._socket_ended(error) from error
                ended_s = trio.current_time()
                self.throughput.handed(sent, len(left), began_s=began_s, ended_s=ended_s)
                self._socket_sent += sent
                left = left[sent:]
                self._unsent_bytes = len(left)
                if scope is not None:
                    scope.deadline = _stall_deadline()

    async def _recv_into(self, target: memoryview, *, idle_s: float) -> bool:
        """Fill `target`; False when the stream ended before its first byte.

        At most `idle_s` may pass before the first byte, LINK_STALL_TIMEOUT_S between later ones.
        """
        filled = 0
        with trio.CancelScope(deadline=trio.current_time() + idle_s) as scope:
            while filled < len(target):
                count = self._decrypt(target[filled:])
                if count == 0:
                    break
                if count is not None:
                    filled += count
                    self._plaintext_received += count
                    continue
                await self._answer_tls()
                if filled:
                    scope.deadline = _stall_deadline()
                await self._fill()
        if scope.cancelled_caught:
            raise self._break("the peer stopped in the middle of a frame")
        if 0 < filled < len(target):
            raise self._break(_CUT_SHORT, by_peer=True)
        return filled == len(target)

    def _decrypt(self, target: memoryview) -> int | None:
        """Decrypt into `target`: its count, 0 at the end of the stream, None: more is needed."""
        try:
            count: object = self._tls.read(len(target), target)
        except ssl.SSLWantReadError:
            return None
        except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
            return 0
        except ssl.SSLError as error:
            raise self._translated(error) from error
        if not isinstance(count, int):  # typeshed knows only the form that returns bytes
            raise InvariantBroken("SSLObject.read into a buffer gives a count")
        return count

    async def _answer_tls(self) -> None:
        """Send what TLS itself has to say: answers to key updates, alerts."""
        if self._outgoing.pending and not self._send_lock.locked():
            async with self._send_lock:
                await self._flush()

    async def _fill(self) -> bool:
        """Read ciphertext once; False at the end of the stream."""
        if self._broken is not None:
            raise self._broken
        try:
            count = await self._sock.recv_into(self._buffer)
        except (OSError, trio.ClosedResourceError) as error:
            raise self._socket_ended(error) from error
        self._socket_received += count
        if count:
            self._incoming.write(self._buffer[:count])
            if count == FIRST_BUFFER_BYTES == len(self._buffer):
                self._buffer = memoryview(bytearray(CIPHERTEXT_BUFFER_BYTES))
        else:
            self._incoming.write_eof()
        return count > 0

    async def _hand_over_alert(self) -> None:
        """Let the peer read why we refuse: closing on unread data would throw it away."""
        with (
            contextlib.suppress(LinkBroken, OSError),
            trio.move_on_after(limits.LINK_CLOSE_TIMEOUT_S),
        ):
            await self._flush()
            self._sock.shutdown(socket.SHUT_WR)
            while await self._fill():
                self._incoming.read()

    def _socket_ended(self, error: OSError | trio.ClosedResourceError) -> LinkBroken:
        if isinstance(error, trio.ClosedResourceError):
            return self._break("the link was closed here")
        reset = isinstance(error, ConnectionResetError | BrokenPipeError)
        return self._break(f"the connection failed: {error.strerror or error}", by_peer=reset)

    def _translated(self, error: ssl.SSLError) -> LinkBroken:
        reason = error.reason or ""
        if isinstance(error, ssl.SSLCertVerificationError):
            return self._break(_verification(error.verify_message), refused=True)
        if any(word in reason for word in ("UNSUPPORTED_PROTOCOL", "PROTOCOL_VERSION")):
            return self._break("the other side does not speak TLS 1.3", refused=True)
        if any(word in reason for word in _TOLD_BY_PEER):
            return self._break(f"certificates do not fit: {_sentence(reason)}", refused=True)
        return self._break(f"TLS failed: {_sentence(reason) or type(error).__name__}")

    def _break(self, reason: str, *, by_peer: bool = False, refused: bool = False) -> LinkBroken:
        """Close the socket; the first reason stays."""
        if self._broken is None:
            kind = LinkRefused if refused else LinkBroken
            self._broken = kind(reason, closed_by_peer=by_peer)
        self._sock.close()
        return self._broken


def _host(address: object) -> str:
    """Of an address as sockets tell it; empty for those of no network."""
    return str(address[0]) if isinstance(address, tuple) else ""


def _stall_deadline() -> float:
    return trio.current_time() + limits.LINK_STALL_TIMEOUT_S


def _configured(context: ssl.SSLContext, credentials: Credentials) -> ssl.SSLContext:
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VerifyFlags.VERIFY_X509_STRICT
    if not credentials.dates_checked:
        context.verify_flags |= _NO_CHECK_TIME
    try:
        context.load_verify_locations(cadata=credentials.root_pem)
        context.load_cert_chain(credentials.chain_file, credentials.key_file)
    except (ssl.SSLError, OSError) as error:
        raise TrustError(f"our own key or certificate cannot be used: {error}") from error
    return context


def _verified_chain(tls: ssl.SSLObject) -> tuple[bytes, ...]:
    """DER of the verified chain: public since Python 3.13, behind a private object before."""
    public = getattr(tls, "get_verified_chain", None)
    if public is not None:
        return tuple(bytes(der) for der in public())
    private = getattr(getattr(tls, "_sslobj", None), "get_verified_chain", None)
    if private is None:
        return ()
    return tuple(certificate.public_bytes(_ENCODING_DER) for certificate in private() or ())


def _verification(message: str) -> str:
    if "expired" in message or "not yet valid" in message:
        return f"the peer's {message}; {CLOCKS_DIFFER}"
    if "issuer" in message or "self-signed" in message or "self signed" in message:
        return OTHER_ROOT
    return f"the peer's certificate is refused: {message}"


def _sentence(reason: str) -> str:
    return reason.lower().replace("_", " ")
