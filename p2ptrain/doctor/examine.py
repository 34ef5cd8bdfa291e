"""Look at everything that `diagnosis` judges."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import trio

from p2ptrain import limits
from p2ptrain.diagnosis.network import usable
from p2ptrain.diagnosis.observations import Dial, DialEnd, Multicast, Observations
from p2ptrain.doctor.asking import Answer, ask_running_peer
from p2ptrain.doctor.dialling import dial_all
from p2ptrain.doctor.firewall import firewall, is_hidden
from p2ptrain.doctor.interfaces import interfaces
from p2ptrain.doctor.machine import machine
from p2ptrain.doctor.membership import Standing, standing
from p2ptrain.doctor.port import port_use
from p2ptrain.doctor.runtime import runtime
from p2ptrain.errors import TrustError
from p2ptrain.net.listening import hear_peers
from p2ptrain.store.groups import Group, load_addresses
from p2ptrain.store.home import Home, control_socket_path
from p2ptrain.wire.hello import PROTOCOL_MAX, PROTOCOL_MIN

T = TypeVar("T")

GIVEN, ANNOUNCED, REMEMBERED = "given", "announced", "remembered"


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What the doctor was asked to look at."""

    group_name: str | None = None
    """None: the only group of this device."""
    port: int = limits.PEER_PORT_DEFAULT
    """Where a peer would listen that does not run yet."""
    listen_s: float = limits.DOCTOR_LISTEN_S
    """How long to listen for announcements."""
    peers: tuple[str, ...] = ()
    """host:port of other peers, to be dialled beside those that are known."""


async def examine(home: Home, question: Question) -> Observations:
    """Look at this device and dial the addresses that it knows; takes some seconds.

    Nothing is changed, except that a certificate that is due is renewed as by every command.
    Cancelling leaves threads behind that end by themselves within their timeouts.

    Raises:
        ConfigError: several groups and no name, or no such group.
    """
    ours = standing(home, question.group_name)
    answer = await _running_peer(home, ours)
    seen = Observations(
        now_s=time.time(),
        protocol=(PROTOCOL_MIN, PROTOCOL_MAX),
        interfaces=await _in_thread(interfaces),
        membership=ours.membership,
        machine=await _in_thread(machine),
        firewall=await _in_thread(firewall),
        firewall_hidden=is_hidden(),
        peer=answer.peer,
        peer_error=answer.error,
        port=None if answer.peer else await _in_thread(partial(port_use, question.port)),
    )
    seen = await _listened(seen, ours.group, question.listen_s)
    if ours.group is None:
        return seen
    addresses = _addresses(question, seen.multicast, ours.group, answer)
    return replace(seen, dials=await _dials(addresses, ours.group))


async def _running_peer(home: Home, ours: Standing) -> Answer:
    if ours.group is None:
        return Answer()
    return await ask_running_peer(control_socket_path(home, ours.group.id))


async def _listened(seen: Observations, group: Group | None, seconds: float) -> Observations:
    """What was heard meanwhile, and whether onnxruntime is intact: both take seconds."""
    good = [each for each in usable(seen) if each.multicast_error is None]
    hosts = [network.partition("/")[0] for each in good for network in each.networks]
    own = None if group is None else group.device
    heard: list[Multicast] = []

    async def listen() -> None:
        heard.append(await _in_thread(partial(hear_peers, hosts, seconds=seconds, own=own)))

    async with trio.open_nursery() as nursery:
        if hosts:
            nursery.start_soon(listen)
        found = await _in_thread(runtime)
    return replace(seen, runtime=found, multicast=heard[0] if heard else None)


def _addresses(
    question: Question, heard: Multicast | None, group: Group, answer: Answer
) -> dict[str, str]:
    """host:port -> how it is known; what is linked already is dialled once, for its clock."""
    found = dict.fromkeys(question.peers, GIVEN)
    if heard is not None:
        found |= {each.address: ANNOUNCED for each in heard.heard}
    if answer.peer is not None:
        found |= answer.peer.addresses
    remembered = load_addresses(group)
    for address, device in remembered.items():
        if device not in answer.devices_alive:
            found.setdefault(address, REMEMBERED)
    return dict(list(found.items())[: limits.DOCTOR_DIALS_MAX])


async def _dials(addresses: dict[str, str], group: Group) -> tuple[Dial, ...]:
    """The dials, without vain ones to other addresses of a device that answered."""
    try:
        dials = await dial_all(addresses, group.credentials)
    except TrustError:
        return ()  # our own files do not fit together, which `standing` says
    remembered = load_addresses(group)
    answered = {dial.device for dial in dials if dial.end is DialEnd.ANSWERED}
    return tuple(
        dial
        for dial in dials
        if dial.device is not None or remembered.get(dial.address) not in answered
    )


async def _in_thread(look: Callable[[], T]) -> T:
    return await trio.to_thread.run_sync(look, abandon_on_cancel=True)
