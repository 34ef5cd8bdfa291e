"""Commands that this device's other programs send to its peer."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import trio

from p2ptrain.errors import ConfigError, RemoteProtocolError
from p2ptrain.net.control_socket import serve_control
from p2ptrain.runtime.credentials.revoking import RevokeRequest
from p2ptrain.runtime.peer import Peer
from p2ptrain.runtime.reports import TrainRequest
from p2ptrain.runtime.status import links_report
from p2ptrain.store.home import control_socket_path
from p2ptrain.trust.rotation import Rotation
from p2ptrain.wire.codec import from_plain, to_plain

Fields = dict[str, Any]  # Any: JSON values, checked by from_plain
Emit = Callable[[str, Fields], None]
INVITE_TTL_S = 24 * 3600.0


async def serve_control_socket(
    peer: Peer, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """Answer commands until cancelled; the socket is gone afterwards."""
    path = control_socket_path(peer.home, peer.group.id)

    async def handle(command: str, arguments: Fields, emit: Emit) -> Fields:
        return await answer(peer, command, arguments, emit)

    await serve_control(path, handle, task_status=task_status)


async def answer(peer: Peer, command: str, arguments: Fields, emit: Emit) -> Fields:
    """One command's result; a P2PTrainError goes to the one who asked."""
    handler = _HANDLERS.get(command)
    if handler is None:
        raise ConfigError(
            f"the running peer does not know the command {command!r}",
            hint="restart it with this version: p2ptrain join",
        )
    return await handler(peer, arguments, emit)


async def _status(peer: Peer, arguments: Fields, emit: Emit) -> Fields:
    await trio.lowlevel.checkpoint()
    return plain(peer.status())


async def _links(peer: Peer, arguments: Fields, emit: Emit) -> Fields:
    await trio.lowlevel.checkpoint()
    return plain(links_report(peer))


async def _energy(peer: Peer, arguments: Fields, emit: Emit) -> Fields:
    await trio.lowlevel.checkpoint()
    return plain(peer.energy())


async def _invite(peer: Peer, arguments: Fields, emit: Emit) -> Fields:
    await trio.lowlevel.checkpoint()
    addresses = [str(address) for address in arguments.get("addresses", ())]
    ttl_s = float(arguments.get("ttl_s", INVITE_TTL_S))
    return {"invite": peer.invite(ttl_s=ttl_s, addresses=addresses).decode()}


async def _leave_group(peer: Peer, arguments: Fields, emit: Emit) -> Fields:
    return {"not_handed_over": await peer.leave_group()}


async def _rotate(peer: Peer, arguments: Fields, emit: Emit) -> Fields:
    try:
        rotation = from_plain(Rotation, arguments)
    except RemoteProtocolError as error:
        raise ConfigError(f"cannot rotate: {error.message}") from error
    return {"told": await peer.trust.rotate(rotation)}


async def _invite_code(peer: Peer, arguments: Fields, emit: Emit) -> Fields:
    await trio.lowlevel.checkpoint()
    return {"code": peer.invite_by_code(admits=bool(arguments.get("admits", True)))}


async def _revoke(peer: Peer, arguments: Fields, emit: Emit) -> Fields:
    try:
        request = from_plain(RevokeRequest, arguments)
    except RemoteProtocolError as error:
        raise ConfigError(f"cannot revoke: {error.message}") from error
    return plain(await peer.trust.revoke(request))


async def _train(peer: Peer, arguments: Fields, emit: Emit) -> Fields:
    try:
        request = from_plain(TrainRequest, arguments)
    except RemoteProtocolError as error:
        raise ConfigError(f"cannot train: {error.message}") from error
    result = await peer.train(request, lambda name, report: emit(name, plain(report)))
    return plain(result)


async def _stop(peer: Peer, arguments: Fields, emit: Emit) -> Fields:
    await trio.lowlevel.checkpoint()
    peer.stop_training()
    return {}


async def _leave(peer: Peer, arguments: Fields, emit: Emit) -> Fields:
    return {"not_handed_over": await peer.leave()}


def plain(report: object) -> Fields:
    """A report as JSON values."""
    fields: Fields = to_plain(report)
    return fields


_HANDLERS: dict[str, Callable[[Peer, Fields, Emit], Awaitable[Fields]]] = {
    "status": _status,
    "energy": _energy,
    "links": _links,
    "invite": _invite,
    "invite_code": _invite_code,
    "leave_group": _leave_group,
    "revoke": _revoke,
    "rotate": _rotate,
    "train": _train,
    "stop": _stop,
    "leave": _leave,
}
