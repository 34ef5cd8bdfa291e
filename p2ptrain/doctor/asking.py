"""Ask the running peer of this device what it knows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import trio

from p2ptrain import limits
from p2ptrain.diagnosis.observations import RunningPeer
from p2ptrain.errors import P2PTrainError, PeerNotRunning
from p2ptrain.net.control_socket import call
from p2ptrain.runtime.reports import LinksReport, MemberReport, PeerStatus
from p2ptrain.wire.codec import from_plain


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came back; both None: no peer runs."""

    peer: RunningPeer | None = None
    error: str | None = None
    devices_alive: frozenset[str] = frozenset()


async def ask_running_peer(path: Path) -> Answer:
    """The peer behind a control socket, asked for its status and its links."""
    try:
        with trio.fail_after(limits.DOCTOR_COMMAND_TIMEOUT_S):
            said = await call(path, "status", {}, lambda _name, _data: None)
            status = from_plain(PeerStatus, said)
            said = await call(path, "links", {}, lambda _name, _data: None)
            links = from_plain(LinksReport, said)
    except PeerNotRunning:
        return Answer()
    except trio.TooSlowError:
        waited = f"{limits.DOCTOR_COMMAND_TIMEOUT_S:.0f} s"
        return Answer(error=f"it does not answer within {waited}")
    except P2PTrainError as error:
        return Answer(error=error.message)
    others = [member for member in status.members if member.state != "self"]
    alive = [member for member in others if member.state == "alive"]
    return Answer(
        peer=RunningPeer(
            listen_host=links.listen_host,
            port=links.port,
            discovery=links.discovery,
            discovery_works=links.discovery_works,
            members_alive=tuple(member.name for member in alive),
            addresses={at: member.name for member in others for at in _first(member)},
            refusals=links.refusals,
            failures=links.failures,
            refused_count=links.refused_count,
            last_refusal=links.last_refusal,
            run_waits_for=None if status.run_status is None else status.run_status.waits_for,
        ),
        devices_alive=frozenset(member.device for member in alive),
    )


def _first(member: MemberReport) -> tuple[str, ...]:
    """The most useful address of a member; it lists those of all its interfaces."""
    return member.addresses[:1]
