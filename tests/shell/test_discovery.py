"""Discovery on loopback: real zeroconf, two real processes, and a clear word where it fails."""

from __future__ import annotations

import secrets
import subprocess
import sys
from functools import partial

import pytest
import trio

from p2ptrain import limits
from p2ptrain.ids import DeviceId, GroupId
from p2ptrain.net.discovery import SERVICE, Announcement, DiscoveryState, discover, hints_of
from tests.sim.plans import device

GROUP, OTHER_GROUP = GroupId("abcdefgh" * 2), GroupId("zbcdefgh" * 2)
OWN = Announcement(group=GROUP, device=device(0), port=4000, inviting=False)
BOUND_S = 20.0
# A documentation address (RFC 5737) that no interface of this machine has.
NOWHERE = ("203.0.113.7",)

PEER = """
import sys
from functools import partial
import trio
from p2ptrain.net.discovery import DiscoveryState, discover

async def main(group, device, port):
    send, hints = trio.open_memory_channel(16)
    state = DiscoveryState()
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(
            discover, group=group, device=device, port=int(port), interfaces=("127.0.0.1",),
            found=send, state=state))
        print("state", state.text, flush=True)
        async for hint in hints:
            print("hint", hint, flush=True)

trio.run(main, *sys.argv[1:])
"""


def txt(**changes: str | None) -> dict[bytes, bytes | None]:
    fields: dict[str, str | None] = {"v": "1", "g": GROUP[:8], "id": device(1), "inv": "0"}
    fields.update(changes)
    return {k.encode(): None if v is None else v.encode() for k, v in fields.items()}


def test_member_of_the_group_is_a_hint() -> None:
    hints = hints_of(OWN, txt(), ["192.0.2.7", "fe80::1"], 4001)
    assert hints == ("192.0.2.7:4001", "[fe80::1]:4001")


@pytest.mark.parametrize(
    ("properties", "port"),
    [
        (txt(g=OTHER_GROUP[:8]), 4001),
        (txt(v="2"), 4001),
        (txt(id=device(0)), 4001),
        (txt(id=None), 4001),
        ({}, 4001),
        (txt(), None),
        (txt(), 0),
        (txt(), 70000),
    ],
)
def test_others_are_no_hint(properties: dict[bytes, bytes | None], port: int | None) -> None:
    assert hints_of(OWN, properties, ["192.0.2.7"], port) == ()


def test_hostile_number_of_addresses_is_cut() -> None:
    assert len(hints_of(OWN, txt(), [f"192.0.2.{i}" for i in range(200)], 4001)) == 8


def test_announcement_fits_its_limits() -> None:
    assert OWN.instance.endswith("." + SERVICE)
    assert len(OWN.instance.removesuffix("." + SERVICE)) <= 63  # a DNS label
    assert sum(len(k) + len(v) + 2 for k, v in OWN.properties.items()) < 400


async def test_missing_multicast_is_told_and_not_fatal(nursery: trio.Nursery) -> None:
    send, _ = trio.open_memory_channel[str](1)
    state = DiscoveryState()
    with trio.fail_after(BOUND_S):
        await nursery.start(
            partial(
                discover, group=GROUP, device=device(0), port=4000, interfaces=NOWHERE,
                found=send, state=state,
            )
        )  # fmt: skip
    assert state.text.startswith("multicast is not available: ")
    assert state.text.endswith("; use --peer host:port")
    assert not state.working


async def test_missing_multicast_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "DISCOVERY_RETRY_S", 0.0)
    attempts = 0

    class Counting(DiscoveryState):
        def failed(self, error: BaseException) -> None:
            nonlocal attempts
            attempts += 1
            if attempts == 3:
                scope.cancel()

    send, _ = trio.open_memory_channel[str](1)
    with trio.fail_after(BOUND_S), trio.CancelScope() as scope:
        await discover(
            group=GROUP, device=device(0), port=4000, interfaces=NOWHERE, found=send,
            state=Counting(),
        )  # fmt: skip
    assert attempts == 3


async def start_peer(nursery: trio.Nursery, group: str, who: DeviceId, port: int) -> trio.Process:
    command = [sys.executable, "-W", "error", "-c", PEER, group, who, str(port)]
    return await nursery.start(
        partial(trio.run_process, command, stdout=subprocess.PIPE, check=False)
    )


async def wait_line(process: trio.Process, kind: str) -> str:
    """The rest of the next line of that kind."""
    assert process.stdout is not None
    while True:
        line = b""
        while not line.endswith(b"\n"):
            got = await process.stdout.receive_some(1)
            assert got, "the process ended"
            line += got
        word, _, rest = line.decode().strip().partition(" ")
        if word == kind:
            return rest


async def test_two_processes_find_each_other_on_loopback(nursery: trio.Nursery) -> None:
    group, other = ("".join(secrets.choice("abcdefgh") for _ in range(16)) for _ in range(2))
    with trio.fail_after(BOUND_S):
        stranger = await start_peer(nursery, other, device(2), 4003)
        text = await wait_line(stranger, "state")
        if text.startswith("multicast is not available"):
            nursery.cancel_scope.cancel()
            pytest.skip(f"zeroconf on loopback: {text}")
        assert text == "announcing on 127.0.0.1"
        first = await start_peer(nursery, group, device(0), 4001)
        second = await start_peer(nursery, group, device(1), 4002)
        assert await wait_line(first, "hint") == "127.0.0.1:4002"
        assert await wait_line(second, "hint") == "127.0.0.1:4001"
    nursery.cancel_scope.cancel()


async def test_withdrawal_on_cancellation_is_quick() -> None:
    send, _ = trio.open_memory_channel[str](1)
    state = DiscoveryState()
    run = partial(
        discover, group=GROUP, device=device(0), port=4000, interfaces=("127.0.0.1",),
        found=send, state=state,
    )  # fmt: skip
    with trio.fail_after(BOUND_S):
        async with trio.open_nursery() as inner:
            await inner.start(run)
            if not state.working:
                pytest.skip(f"zeroconf on loopback: {state.text}")
            began = trio.current_time()
            inner.cancel_scope.cancel()
    assert trio.current_time() - began < limits.DISCOVERY_CLOSE_TIMEOUT_S
    assert state.text == "stopped"


def test_zeroconf_is_not_imported_before_it_is_needed() -> None:
    code = "import sys, p2ptrain.net.discovery; sys.exit('zeroconf' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
