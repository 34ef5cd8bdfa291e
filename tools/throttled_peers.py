"""Start real peers that are slower than this machine, on Linux, as root; Ctrl-C ends them.

    python tools/throttled_peers.py --cores 0.6 --cores 0.3 --rate 100
    python tools/throttled_peers.py --cores 0.4 --cores 0.4 --cores 0.4 --wifi --rate 50 --loss 1

Each peer (`p2ptrain join`) has a home, a network namespace and a control group with a CPU quota
and, where asked, a memory limit. Prints what to type to use the first one. Whatever a killed tool
has left behind is removed by the next one, or by --check, which also says whether this machine
permits it all. Exit codes: 0; 1 failed; 2 makes no sense; 3 not permitted here, with the reason.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import trio

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from p2ptrain.demo.group import GROUP_NAME
from p2ptrain.errors import ConfigError, P2PTrainError
from p2ptrain.units import parse_bytes
from tools.throttle.cgroups import Limits
from tools.throttle.group import (
    Cable,
    Network,
    Place,
    ThrottledGroup,
    checked,
    require_permitted,
    throttled_group,
)
from tools.wifi_emulator.medium import Air
from tools.wifi_emulator.namespaces import Unavailable

FAILED, WRONG, UNAVAILABLE = 1, 2, 3


def main(arguments: list[str] | None = None) -> int:
    """Do what the command line says; the exit code."""
    options = parser().parse_args(arguments)
    try:
        if options.check:
            require_permitted()
            print("throttled_peers: peers can be throttled here")
            return 0
        chosen = places(options.cores, options.memory)
        checked(chosen)
        trio.run(serve, chosen, network(options), options.json)
    except Unavailable as error:
        print(f"throttled_peers: not possible here: {error}", file=sys.stderr)
        return UNAVAILABLE
    except (ConfigError, ValueError) as error:
        print(f"throttled_peers: {error}", file=sys.stderr)
        return WRONG
    except (P2PTrainError, OSError) as error:
        print(f"throttled_peers: {error}", file=sys.stderr)
        return FAILED
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="throttled_peers", description="slow peers for studies")
    made.add_argument("--cores", type=float, action="append", default=[], metavar="SHARE",
                      help="CPU quota of one more peer, in cores")  # fmt: skip
    made.add_argument("--memory", action="append", default=[], metavar="SIZE",
                      help="memory limit of a peer, as 400MiB, in order [no limit]")  # fmt: skip
    made.add_argument("--rate", type=float, default=1000.0, help="Mbit/s of the network [1000]")
    made.add_argument("--wifi", action="store_true", help="one shared medium, by the emulator")
    made.add_argument("--delay", type=float, default=2.0, help="ms one way, with --wifi [2]")
    made.add_argument("--loss", type=float, default=0.0, help="per cent of frames, with --wifi")
    made.add_argument("--check", action="store_true", help="does this machine permit it?")
    made.add_argument("--json", action="store_true", help="print what is up as one JSON object")
    return made


def places(cores: Sequence[float], memory: Sequence[str]) -> tuple[Place, ...]:
    """One per quota; ValueError where the options make no sense."""
    if not cores:
        raise ValueError("give each peer a quota: --cores 0.5 --cores 0.3")
    if len(memory) > len(cores):
        raise ValueError(f"{len(memory)} memory limits for {len(cores)} peers")
    sizes = [parse_bytes(text) for text in memory] + [None] * (len(cores) - len(memory))
    return tuple(
        Place(limits=Limits(cores=share, memory_bytes=size))
        for share, size in zip(cores, sizes, strict=True)
    )


def network(options: argparse.Namespace) -> Network:
    """What the peers are connected by."""
    if not options.wifi:
        return Cable(rate_mbit=options.rate)
    return Air(rate_mbit=options.rate, delay_ms=options.delay, loss_percent=options.loss)


async def serve(chosen: tuple[Place, ...], connected: Network, as_json: bool) -> None:
    """Keep the peers until a signal ends it."""
    with (
        trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals,
        tempfile.TemporaryDirectory(prefix="p2ptrain-") as folder,
        contextlib.suppress(trio.Cancelled),
    ):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_keep, Path(folder), chosen, connected, as_json)
            async for _ in signals:
                nursery.cancel_scope.cancel()
                break


async def _keep(folder: Path, chosen: tuple[Place, ...], connected: Network, as_json: bool) -> None:
    async with throttled_group(folder, chosen, connected) as group:
        print(told(group, as_json), flush=True)
        await trio.sleep_forever()


def told(group: ThrottledGroup, as_json: bool) -> str:
    """What is up, and how to use it."""
    homes = {peer.name: str(peer.member.home) for peer in group.peers}
    if as_json:
        pids = {peer.name: peer.pid for peer in group.peers}
        return json.dumps({"event": "up", "group": GROUP_NAME, "homes": homes, "pids": pids})
    first = next(iter(homes.values()))
    lines = [f"{name}: {home}" for name, home in homes.items()]
    lines.append(f"use them: P2PTRAIN_HOME={first} p2ptrain status --group {GROUP_NAME}")
    return os.linesep.join(lines)


if __name__ == "__main__":
    sys.exit(main())
