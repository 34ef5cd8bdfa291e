"""A throwaway group on this machine: one home folder and one process per peer."""

from __future__ import annotations

import os
import secrets
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import trio

from p2ptrain.errors import P2PTrainError, PeerLost, PeerNotRunning
from p2ptrain.net.control_socket import call
from p2ptrain.runtime.reports import PeerStatus
from p2ptrain.store.groups import create_group, create_invite, load_group
from p2ptrain.store.home import control_socket_path, open_home
from p2ptrain.wire.codec import from_plain

GROUP_NAME: Final = "demo"
LOOPBACK: Final = "127.0.0.1"
INVITE_TTL_S: Final = 600.0
POLL_S: Final = 0.2
START_TIMEOUT_S: Final = 60.0
LOG_LINES_SHOWN: Final = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoPeer:
    """One peer of the demonstration: a home, a log and the command that runs it."""

    name: str
    home: Path

    @property
    def log(self) -> Path:
        return self.home / "peer.log"

    @property
    def invite(self) -> Path:
        return self.home / "invite"

    def command(self, addresses: tuple[str, ...]) -> list[str]:
        """The `join` that a person would type."""
        line = [sys.executable, "-m", "p2ptrain", "join", "--group", GROUP_NAME, "--port", "0"]
        line += ["--name", self.name, "--listen", LOOPBACK, "--interface", LOOPBACK]
        line += ["--threads", "1"]
        if self.invite.exists():
            line += ["--invite", str(self.invite)]
        for address in addresses:
            line += ["--peer", address]
        return line

    def socket(self) -> Path:
        """Its control socket; NotFound until the peer has become a member."""
        home = open_home(self.home)
        return control_socket_path(home, load_group(home, GROUP_NAME).id)

    async def status(self) -> PeerStatus | None:
        """What it says about itself, or None while it does not answer yet."""
        try:
            answer = await call(self.socket(), "status", {}, lambda _name, _data: None)
        except (PeerNotRunning, PeerLost):
            return None
        except P2PTrainError as error:
            if error.exit_code == PeerNotRunning.exit_code:  # not yet a member
                return None
            raise
        return from_plain(PeerStatus, answer)


def make_peers(directory: Path, count: int) -> tuple[DemoPeer, ...]:
    """Homes for `count` peers; the first founds the group under a passphrase nobody keeps."""
    peers = tuple(
        DemoPeer(name=f"peer-{index}", home=directory / f"peer-{index}")
        for index in range(1, count + 1)
    )
    for peer in peers:
        peer.home.mkdir(mode=0o700)
    create_group(open_home(peers[0].home), GROUP_NAME, secrets.token_urlsafe(24), peers[0].name)
    return peers


def write_invites(peers: tuple[DemoPeer, ...], address: str) -> None:
    """One invite for each further peer, to be redeemed at the first one's address."""
    founder = load_group(open_home(peers[0].home), GROUP_NAME)
    for peer in peers[1:]:
        peer.invite.write_bytes(create_invite(founder, [address], INVITE_TTL_S))


async def run_peer(
    peer: DemoPeer,
    addresses: tuple[str, ...] = (),
    *,
    task_status: trio.TaskStatus[trio.CancelScope] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Run one peer's process until the scope it hands out is cancelled; then it is ended.

    Raises:
        PeerLost: the process ended by itself; the message ends with what it said last.
    """
    environment = {**os.environ, "P2PTRAIN_HOME": str(peer.home), "PYTHONUNBUFFERED": "1"}
    with trio.CancelScope() as scope, peer.log.open("ab") as log:
        task_status.started(scope)
        ended = await trio.run_process(
            peer.command(addresses),
            env=environment,
            stdin=b"",
            stdout=log,
            stderr=log,
            check=False,
            start_new_session=True,
        )
        raise PeerLost(
            f"{peer.name} ended with exit code {ended.returncode}: {_last_words(peer.log)}",
            hint=f"keep its log with --directory DIR, then read DIR/{peer.name}/{peer.log.name}",
        )


def _last_words(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return " / ".join(line.removeprefix("p2ptrain: ") for line in lines[-LOG_LINES_SHOWN:])


async def wait_started(peer: DemoPeer) -> PeerStatus:
    """Its first status; PeerLost when it does not answer in time."""
    with trio.move_on_after(START_TIMEOUT_S):
        while True:
            status = await peer.status()
            if status is not None:
                return status
            await trio.sleep(POLL_S)
    raise PeerLost(f"{peer.name} did not start within {START_TIMEOUT_S:.0f} s")


async def wait_together(peers: tuple[DemoPeer, ...], timeout_s: float) -> bool:
    """Whether every peer sees every other one alive before the time is over."""
    with trio.move_on_after(timeout_s):
        for peer in peers:
            while not _sees(await peer.status(), len(peers)):  # noqa: ASYNC110 another process
                await trio.sleep(POLL_S)
        return True
    return False


def _sees(status: PeerStatus | None, count: int) -> bool:
    if status is None:
        return False
    return sum(member.state in ("self", "alive") for member in status.members) >= count


def loopback_multicast_works() -> bool:
    """Whether a multicast packet sent on loopback comes back; zeroconf needs that."""
    group, any_port = "224.0.0.251", 0
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender,
    ):
        member = socket.inet_aton(group) + socket.inet_aton(LOOPBACK)
        try:
            receiver.bind(("", any_port))
            receiver.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, member)
            sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(LOOPBACK))
            receiver.settimeout(1.0)
            token = secrets.token_bytes(16)
            sender.sendto(token, (group, receiver.getsockname()[1]))
            return receiver.recv(64) == token
        except OSError:
            return False
