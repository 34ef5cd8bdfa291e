"""Raw TCP, trio.SSLStream and TlsLink on loopback, interleaved; medians with CPU per gigabyte.

    python tools/bench_link.py [--rounds 5] [--mebibytes 256] [--json]

Each design runs in two processes, one connection, one direction. In every round all designs run
one after the other for each size, so that the load of the machine falls on all alike; ratios are
taken within a round.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import trio

from p2ptrain.net.tls_link import TlsLink, client_context, server_context, tune_socket
from p2ptrain.store.groups import first_member, load_group, store_member
from p2ptrain.store.home import open_home
from p2ptrain.trust import certificates as certs
from p2ptrain.trust.credentials import Credentials

DESIGNS = ("raw", "sslstream", "tlslink")
SIZES_BYTES = (104_858, 1 << 20, 8 << 20)
GROUP_NAME = "bench"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One design and tensor size, medians over the rounds."""

    design: str
    size_bytes: int
    megabytes_per_s: float
    ratio_to_raw: float
    ratio_to_sslstream: float
    cpu_s_per_gb: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Measured:
    bytes_per_s: float
    cpu_s_per_byte: float


Send = Callable[[memoryview], Awaitable[None]]
Receive = Callable[[memoryview], Awaitable[None]]


async def raw_send(sock: trio.socket.SocketType, data: memoryview) -> None:
    """Send everything over a plain socket."""
    while data:
        data = data[await sock.send(data) :]


async def raw_receive(sock: trio.socket.SocketType, target: memoryview) -> None:
    """Fill `target` from a plain socket."""
    while target:
        count = await sock.recv_into(target)
        if not count:
            raise SystemExit("the sender went away")
        target = target[count:]


async def stream_receive(stream: trio.abc.ReceiveStream, target: memoryview) -> None:
    """Fill `target` from a stream; it gives bytes, so they are copied."""
    filled = 0
    while filled < len(target):
        chunk = await stream.receive_some(min(len(target) - filled, 256 * 1024))
        target[filled : filled + len(chunk)] = chunk
        filled += len(chunk)


async def open_ends(
    design: str, sock: trio.socket.SocketType, credentials: Credentials, *, server: bool
) -> tuple[Send, Receive]:
    """Make the two directions of a design on a connected socket."""
    tune_socket(sock)
    if design == "raw":
        return (lambda data: raw_send(sock, data)), (lambda target: raw_receive(sock, target))
    context = server_context(credentials) if server else client_context(credentials)
    if design == "tlslink":
        link = TlsLink(sock, context, server_side=server)
        await link.handshake()
        return link.send_all, link.recv_exactly
    stream = trio.SSLStream(trio.SocketStream(sock), context, server_side=server)
    await stream.do_handshake()
    return stream.send_all, (lambda target: stream_receive(stream, target))


async def serve(home: str) -> None:
    """The receiving process: serve designs on one port until the parent closes it."""
    credentials = load_group(open_home(Path(home)), GROUP_NAME).credentials
    listener = trio.socket.socket()
    await listener.bind(("127.0.0.1", 0))
    listener.listen()
    print(listener.getsockname()[1], flush=True)
    while True:
        sock, _ = await listener.accept()
        order = bytearray(32)
        await raw_receive(sock, memoryview(order))
        design, size, count = order.decode().split()
        await receive_all(design, sock, credentials, int(size), int(count))
        sock.close()


async def receive_all(
    design: str, sock: trio.socket.SocketType, credentials: Credentials, size: int, count: int
) -> None:
    """Receive a warm-up tensor and `count` tensors into one buffer; answer with CPU seconds."""
    send, receive = await open_ends(design, sock, credentials, server=True)
    target = memoryview(bytearray(size))
    await receive(target)
    begun_s = time.process_time()
    await send(memoryview(b"go"))
    for _ in range(count):
        await receive(target)
    used_s = time.process_time() - begun_s
    await send(memoryview(f"{used_s:16.9f}".encode()))
    await raw_receive_end(sock)


async def raw_receive_end(sock: trio.socket.SocketType) -> None:
    """Wait until the other side has read everything and closed."""
    while await sock.recv(4096):
        pass


async def measure(
    design: str, port: int, credentials: Credentials, size: int, count: int
) -> _Measured:
    """Send `count` tensors and measure wall time and the CPU time of both processes."""
    sock = trio.socket.socket()
    await sock.connect(("127.0.0.1", port))
    await raw_send(sock, memoryview(f"{design:<10} {size:<10} {count:<10}".encode()))
    send, receive = await open_ends(design, sock, credentials, server=False)
    data = memoryview(bytearray(os.urandom(size)))
    await send(data)
    await receive(memoryview(bytearray(2)))
    begun_s, cpu_begun_s = time.perf_counter(), time.process_time()
    for _ in range(count):
        await send(data)
    answer = bytearray(16)
    await receive(memoryview(answer))
    wall_s = time.perf_counter() - begun_s
    cpu_s = time.process_time() - cpu_begun_s + float(answer)
    sock.close()
    return _Measured(bytes_per_s=size * count / wall_s, cpu_s_per_byte=cpu_s / (size * count))


async def run_rounds(port: int, credentials: Credentials, rounds: int, total: int) -> list[Row]:
    """All designs and sizes, interleaved."""
    measured: dict[tuple[str, int], list[_Measured]] = {}
    for _ in range(rounds):
        for size in SIZES_BYTES:
            for design in DESIGNS:
                one = await measure(design, port, credentials, size, max(4, total // size))
                measured.setdefault((design, size), []).append(one)
    return [_row(design, size, measured) for size in SIZES_BYTES for design in DESIGNS]


def _row(design: str, size: int, measured: dict[tuple[str, int], list[_Measured]]) -> Row:
    ours = measured[design, size]

    def ratio_to(other: str) -> float:
        pairs = zip(ours, measured[other, size], strict=True)
        return statistics.median(a.bytes_per_s / b.bytes_per_s for a, b in pairs)

    return Row(
        design=design,
        size_bytes=size,
        megabytes_per_s=statistics.median(m.bytes_per_s for m in ours) / 1e6,
        ratio_to_raw=ratio_to("raw"),
        ratio_to_sslstream=ratio_to("sslstream"),
        cpu_s_per_gb=statistics.median(m.cpu_s_per_byte for m in ours) * 1e9,
    )


def mint(home: str) -> Credentials:
    """A throwaway group with one member, for both processes."""
    now = time.time()
    fresh = certs.create_group(GROUP_NAME, now=now)
    member = first_member(fresh, "bench", now=now)
    return store_member(open_home(Path(home)), GROUP_NAME, member).credentials


def main() -> None:
    """Run the benchmark and print the table, or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mebibytes", type=int, default=256, help="per design, size and round")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        trio.run(serve, options.serve)
        return
    with tempfile.TemporaryDirectory() as home:
        credentials = mint(f"{home}/home")
        command = [sys.executable, __file__, "--serve", f"{home}/home"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            try:
                port = int(server.stdout.readline()) if server.stdout else 0
                total = options.mebibytes << 20
                rows = trio.run(run_rounds, port, credentials, options.rounds, total)
            finally:
                server.kill()
    if options.json:
        print(json.dumps({"version": 1, "rows": [asdict(row) for row in rows]}))
        return
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print(
        f"{'design':<10} {'MiB':>6} {'MB/s':>7} {'of raw':>7} {'x SSLStream':>12} {'CPU s/GB':>9}"
    )
    for row in rows:
        print(
            f"{row.design:<10} {row.size_bytes / (1 << 20):>6.1f} {row.megabytes_per_s:>7.0f} "
            f"{row.ratio_to_raw:>7.2f} {row.ratio_to_sslstream:>12.2f} {row.cpu_s_per_gb:>9.2f}"
        )


if __name__ == "__main__":
    main()
