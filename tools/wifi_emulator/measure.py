"""Does the emulated air do what it was asked to? Round trips, loss, rate and fairness, measured."""

from __future__ import annotations

import contextlib
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from tools.wifi_emulator.medium import FRAME_OVERHEAD_BYTES, Air
from tools.wifi_emulator.namespaces import in_namespace
from tools.wifi_emulator.wifi import Wifi, wifi

PORT: Final = 9
PINGS: Final = 200
PING_TIMEOUT_S: Final = 0.5
LOSS_PROBES: Final = 20_000
LOSS_PROBE_BYTES: Final = 64
LOSS_PROBES_PER_S: Final = 4000
DATAGRAM_BYTES: Final = 1400
HEADERS_BYTES: Final = 14 + 20 + 8
FLOOD_S: Final = 3.0
SETTLE_S: Final = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What was asked for and what was found."""

    rate_mbit: float
    flood_mbit: float
    """On the wire, frame overheads included: UDP as fast as possible, one sender."""
    tcp_mbit: float
    """Payload of one TCP stream, with this machine's congestion control."""
    congestion_control: str
    delay_ms: float
    round_trip_ms: float
    """Median; twice the delay, plus airtime and the emulator's own time."""
    round_trip_p95_ms: float
    loss_percent: float
    lost_percent: float
    """Of LOSS_PROBES small frames, one way."""
    lost_error_percent: float
    """Two standard deviations of that count."""
    two_senders_mbit: tuple[float, float]
    """On the wire: two stations flood a third at the same time."""


def measure(air: Air, *, seed: int) -> Measured:
    """Bring up three stations and measure; takes about 20 s on an idle machine."""
    with wifi(["a", "b", "c"], air, seed=seed) as running:
        trips = sorted(_round_trips_ms(running))
        lost = _lost_percent(running)
        alone = _flood(running, ["a"])[0]
        both = _flood(running, ["a", "b"])
        tcp_mbit, control = _tcp_mbit(running)
    chance = air.loss_percent / 100
    return Measured(
        rate_mbit=air.rate_mbit,
        flood_mbit=round(alone, 1),
        tcp_mbit=round(tcp_mbit, 1),
        congestion_control=control,
        delay_ms=air.delay_ms,
        round_trip_ms=round(statistics.median(trips), 2),
        round_trip_p95_ms=round(trips[len(trips) * 95 // 100], 2),
        loss_percent=air.loss_percent,
        lost_percent=round(lost, 2),
        lost_error_percent=round(200 * (chance * (1 - chance) / LOSS_PROBES) ** 0.5, 2),
        two_senders_mbit=(round(both[0], 1), round(both[1], 1)),
    )


def udp_socket(running: Wifi, station: str, port: int = 0) -> socket.socket:
    """A bound UDP socket at a station."""

    def make() -> socket.socket:
        made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        made.bind((running.addresses[station], port))
        return made

    return in_namespace(running.namespace(station), make)


def _round_trips_ms(running: Wifi) -> list[float]:
    """Round trips of small datagrams; lost ones are not counted."""
    found = []
    with udp_socket(running, "c", PORT) as echo, udp_socket(running, "a") as asking, _echoing(echo):
        asking.settimeout(PING_TIMEOUT_S)
        asking.connect((running.addresses["c"], PORT))
        for number in range(PINGS):
            said = number.to_bytes(4, "big")
            began_s = time.perf_counter()
            asking.send(said)
            with contextlib.suppress(TimeoutError):
                while asking.recv(64) != said:
                    continue
                found.append((time.perf_counter() - began_s) * 1e3)
    return found[1:]  # the first one waits for the address to be resolved


@contextlib.contextmanager
def _echoing(sock: socket.socket) -> Iterator[None]:
    stopped = threading.Event()
    sock.settimeout(0.1)

    def serve() -> None:
        while not stopped.is_set():
            with contextlib.suppress(TimeoutError):
                said, address = sock.recvfrom(64)
                sock.sendto(said, address)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()


def _lost_percent(running: Wifi) -> float:
    """Loss of paced small frames from a to c, counted by the emulator: no other queue drops."""
    before = running.tell("counts")["pairs"]["a>c"]
    with udp_socket(running, "c", PORT), udp_socket(running, "a") as sending:
        sending.connect((running.addresses["c"], PORT))
        began_s = time.perf_counter()
        for number in range(LOSS_PROBES):
            ahead_s = number / LOSS_PROBES_PER_S - (time.perf_counter() - began_s)
            if ahead_s > 0.005:
                time.sleep(ahead_s)
            sending.send(bytes(LOSS_PROBE_BYTES))
        time.sleep(SETTLE_S)
        after = running.tell("counts")["pairs"]["a>c"]
    lost = int(after["lost_frames"]) - int(before["lost_frames"])
    arrived = int(after["delivered_frames"]) - int(before["delivered_frames"])
    return 100 * lost / (lost + arrived)


def _flood(running: Wifi, senders: list[str]) -> list[float]:
    """Megabit per second on the wire that each sender gets through, lost frames included."""
    with udp_socket(running, "c", PORT):
        counts = [running.tell("counts")["pairs"]]
        threads = [threading.Thread(target=_send_all, args=(running, each)) for each in senders]
        began_s = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        counts.append(running.tell("counts")["pairs"])
        seconds = time.perf_counter() - began_s
    frame_bits = (DATAGRAM_BYTES + HEADERS_BYTES + FRAME_OVERHEAD_BYTES) * 8
    return [frame_bits * _sent(counts, f"{each}>c") / seconds / 1e6 for each in senders]


def _sent(counts: list[dict[str, dict[str, int]]], pair: str) -> int:
    before, after = (each[pair]["delivered_frames"] + each[pair]["lost_frames"] for each in counts)
    return after - before


def _send_all(running: Wifi, station: str) -> None:
    with udp_socket(running, station) as sending:
        sending.connect((running.addresses["c"], PORT))
        ends_s = time.perf_counter() + FLOOD_S
        while time.perf_counter() < ends_s:
            sending.send(bytes(DATAGRAM_BYTES))


def _tcp_mbit(running: Wifi) -> tuple[float, str]:
    """One TCP stream from a to c: payload rate, and the congestion control it used."""

    def listen() -> socket.socket:
        return socket.create_server((running.addresses["c"], PORT))

    def dial() -> socket.socket:
        return socket.create_connection((running.addresses["c"], PORT), timeout=10)

    with (
        in_namespace(running.namespace("c"), listen) as listener,
        in_namespace(running.namespace("a"), dial) as sending,
    ):
        receiving, _ = listener.accept()
        control = sending.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)
        thread = threading.Thread(target=_stream, args=(sending,))
        thread.start()
        with receiving:
            received, began_s = 0, time.perf_counter()
            while chunk := receiving.recv(262_144):
                received += len(chunk)
            seconds = time.perf_counter() - began_s
        thread.join()
    return received * 8 / seconds / 1e6, control.rstrip(b"\0").decode()


def _stream(sending: socket.socket) -> None:
    ends_s = time.perf_counter() + FLOOD_S
    while time.perf_counter() < ends_s:
        sending.sendall(bytes(65_536))
    sending.shutdown(socket.SHUT_WR)
