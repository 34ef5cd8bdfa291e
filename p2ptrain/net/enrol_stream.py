"""Enrolment messages over a stream: bounded, and told apart from a link by their first byte."""

from __future__ import annotations

import trio

from p2ptrain.errors import RemoteProtocolError
from p2ptrain.trust.enrolment import PREFIX, EnrolFrame, parse_enrol_prefix


async def send_frame(stream: trio.abc.Stream, frame: EnrolFrame) -> None:
    """Send one message; trio's errors of a broken stream pass through."""
    await stream.send_all(frame.encoded())


async def receive_frame(stream: trio.abc.Stream) -> EnrolFrame:
    """Read one message; RemoteProtocolError when it breaks a limit or the other side hangs up."""
    kind, length = parse_enrol_prefix(await receive_exactly(stream, PREFIX.size))
    return EnrolFrame(kind=kind, body=await receive_exactly(stream, length))


async def receive_exactly(stream: trio.abc.Stream, length: int) -> bytes:
    """Exactly so many bytes; RemoteProtocolError when the stream ends before."""
    received = bytearray()
    while len(received) < length:
        chunk = await stream.receive_some(length - len(received))
        if not chunk:
            raise RemoteProtocolError("the other side hung up during enrolment")
        received += chunk
    return bytes(received)


async def wait_end(stream: trio.abc.Stream) -> None:
    """Let the other side read the answer: closing on unread data would throw it away."""
    if isinstance(stream, trio.SocketStream):
        await stream.send_eof()
    while await stream.receive_some(1024):
        pass
