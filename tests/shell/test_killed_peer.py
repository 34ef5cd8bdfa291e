"""A peer killed with SIGKILL: its links are down within a second, and known to be dead."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable

import trio

from p2ptrain.net.connection import BodyReader
from p2ptrain.net.links import LinkDown, Links, LinkUp
from p2ptrain.net.listener import join_address
from p2ptrain.store.groups import Group
from p2ptrain.training.contract import RuntimeBuild
from p2ptrain.wire.frames import BulkHeader, TensorHeader

BUILD = RuntimeBuild(runtime="o", version="1", numpy="2", machine="m", isa="i")

_PEER = """
import sys, trio
from p2ptrain.net.links import Links
from p2ptrain.store.groups import load_group
from p2ptrain.store.home import open_home
from p2ptrain.training.contract import RuntimeBuild
from pathlib import Path

async def nothing(*_): raise SystemExit(3)

async def main():
    home, name, address = sys.argv[1:]
    links = Links(
        credentials=load_group(open_home(Path(home)), name).credentials,
        build=RuntimeBuild(runtime="o", version="1", numpy="2", machine="m", isa="i"),
        listen_host="127.0.0.1", listen_port=0, on_tensor=nothing, on_bulk=nothing,
    )
    links.dial(address)
    await links.run()

trio.run(main)
"""


async def no_tensor(device: str, header: TensorHeader, length: int, reader: BodyReader) -> None:
    raise AssertionError("no tensor is sent here")


async def no_bulk(device: str, header: BulkHeader, chunk: bytes) -> None:
    raise AssertionError("no chunk is sent here")


async def test_killed_process_is_down_and_refused_within_a_second(
    mint_group: Callable[..., list[Group]],
) -> None:
    first, second = mint_group(2)
    links = Links(
        credentials=first.credentials,
        build=BUILD,
        listen_host="127.0.0.1",
        listen_port=0,
        on_tensor=no_tensor,
        on_bulk=no_bulk,
    )
    home = second.folder.parent.parent
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            await nursery.start(links.run)
            address = join_address(*links.address)
            command = [sys.executable, "-c", _PEER, str(home), second.name, address]
            process = await trio.lowlevel.open_process(command, stderr=subprocess.DEVNULL)
            try:
                up = await links.events.receive()
                assert isinstance(up, LinkUp)
                process.send_signal(signal.SIGKILL)
                begun = trio.current_time()
                down = await links.events.receive()
                assert isinstance(down, LinkDown)
                assert (down.device, down.closed_by_peer, down.refused) == (
                    second.device,
                    True,
                    True,
                )
                assert trio.current_time() - begun < 1.0
            finally:
                process.kill()
                await process.wait()
            nursery.cancel_scope.cancel()
