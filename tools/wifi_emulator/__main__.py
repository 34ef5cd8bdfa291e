"""Emulate a Wi-Fi network between network namespaces of this machine, on Linux, as root.

    python tools/wifi_emulator check      does this machine permit it?
    python tools/wifi_emulator run --station a --station b --rate 100 --delay 5 --loss 1
    python tools/wifi_emulator measure    bring one up and measure whether it does what it says

`run` makes a namespace per station, each with an interface wlan0 in one subnet, says `up`, and
serves until `stop`, Ctrl-C or --duration, or else until its standard input ends; then everything is
gone. It takes commands on standard input and at --control, and from a --script (see commands.py):

    partition a b,c | cut a b | cut a>b | heal | set loss=5 multicast=off | counts | stop

Exit codes: 0; 1 failed; 2 the command line makes no sense; 3 not permitted here, with the reason.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.wifi_emulator.access_point import AccessPoint, Event
from tools.wifi_emulator.commands import CommandError, parse_script
from tools.wifi_emulator.hub import Hub
from tools.wifi_emulator.measure import measure
from tools.wifi_emulator.medium import Air
from tools.wifi_emulator.namespaces import (
    Unavailable,
    address_of,
    namespace_name,
    require_permitted,
    stations_up,
    sweep,
)

FAILED, WRONG, UNAVAILABLE = 1, 2, 3


def main(arguments: list[str] | None = None) -> int:
    """Do what the command line says; the exit code."""
    options = parser().parse_args(arguments)
    action: Callable[[argparse.Namespace], int] = options.action
    try:
        return action(options)
    except Unavailable as error:
        print(f"wifi_emulator: not possible here: {error}", file=sys.stderr)
        return UNAVAILABLE
    except (CommandError, ValueError) as error:
        print(f"wifi_emulator: {error}", file=sys.stderr)
        return WRONG
    except (OSError, RuntimeError) as error:
        print(f"wifi_emulator: {error}", file=sys.stderr)
        return FAILED
    except subprocess.CalledProcessError as error:
        print(f"wifi_emulator: {' '.join(error.cmd)}: {error.stderr}", file=sys.stderr)
        return FAILED


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="wifi_emulator", description="a Wi-Fi network for tests")
    commands = made.add_subparsers(required=True)
    report = argparse.ArgumentParser(add_help=False)
    report.add_argument("--json", action="store_true", help="print JSON, one object a line")
    air = argparse.ArgumentParser(add_help=False, parents=[report])
    default = Air()
    for name, value, words in (
        ("--rate", default.rate_mbit, "Mbit/s of the medium"),
        ("--delay", default.delay_ms, "one-way delay in ms"),
        ("--jitter", default.jitter_ms, "up to so many ms more"),
        ("--loss", default.loss_percent, "per cent of frames lost"),
        ("--queue", default.queue_ms, "ms of airtime that a station may have waiting"),
    ):
        air.add_argument(name, type=float, default=value, help=f"{words} [{value:g}]")
    air.add_argument("--separate", action="store_true", help="each station has its own medium")
    air.add_argument("--filter-multicast", action="store_true", help="pass no multicast on")
    air.add_argument("--seed", type=int, default=1, help="of loss and jitter")
    run_words = "bring a network up and serve it"
    one = commands.add_parser("run", help=run_words, parents=[air])
    one.add_argument("--station", action="append", required=True, metavar="NAME", type=_station)
    one.add_argument("--script", type=Path, help="commands and when: 12.5 partition a b,c")
    one.add_argument("--control", type=Path, metavar="SOCKET", help="Unix socket for commands")
    one.add_argument("--duration", type=float, metavar="S", help="end after so many seconds")
    one.set_defaults(action=run)
    again = commands.add_parser("measure", help="measure rate, delay and loss", parents=[air])
    again.set_defaults(action=measured)
    checking = commands.add_parser("check", help="does this machine permit it?", parents=[report])
    checking.set_defaults(action=check)
    return made


def run(options: argparse.Namespace) -> int:
    """Bring the network up and serve it."""
    stations = tuple(dict.fromkeys(options.station))
    text = options.script.read_text(encoding="utf-8") if options.script else ""
    script = parse_script(text, stations)
    hub = Hub(stations, _air(options), seed=options.seed)
    require_permitted()
    say = _say_json if options.json else _say_words
    _on_signals(partial(_interrupt, lambda: None))
    with contextlib.suppress(KeyboardInterrupt), contextlib.ExitStack() as stack:
        taps = stack.enter_context(stations_up(stations))
        point = AccessPoint(hub, taps, script=script, say=say)
        _on_signals(partial(_interrupt, point.stop))
        if options.control is not None:
            stack.enter_context(point.control_socket(options.control))
        point.follow_stdin(until_its_end=options.control is None and options.duration is None)
        say(_up(stations))
        point.run(options.duration)
    say({"event": "down", **dataclasses.asdict(hub.counts())})
    return 0


def measured(options: argparse.Namespace) -> int:
    """Measure a network with these parameters."""
    require_permitted()
    found = dataclasses.asdict(measure(_air(options), seed=options.seed))
    if options.json:
        print(json.dumps(found))
    else:
        print("\n".join(f"{name:<20} {value}" for name, value in found.items()))
    return 0


def check(options: argparse.Namespace) -> int:
    """Say that it is possible, and remove what killed emulators left."""
    require_permitted()
    swept = sweep()
    words = "wifi_emulator: networks can be emulated here"
    print(json.dumps({"possible": True, "swept": swept}) if options.json else words)
    return 0


def _air(options: argparse.Namespace) -> Air:
    return Air(
        rate_mbit=options.rate,
        delay_ms=options.delay,
        jitter_ms=options.jitter,
        loss_percent=options.loss,
        queue_ms=options.queue,
        shared=not options.separate,
        multicast=not options.filter_multicast,
    )


def _up(stations: tuple[str, ...]) -> Event:
    return {
        "event": "up",
        "addresses": {station: address_of(index) for index, station in enumerate(stations)},
        "namespaces": {station: namespace_name(station, os.getpid()) for station in stations},
    }


def _say_json(event: Event) -> None:
    with contextlib.suppress(BrokenPipeError):  # whoever started us does not listen any more
        print(json.dumps(event), flush=True)


def _say_words(event: Event) -> None:
    words = " ".join(f"{key}={value}" for key, value in event.items() if key != "event")
    print(f"{event['event']}: {words}", flush=True)


def _on_signals(handler: Callable[[int, FrameType | None], None]) -> None:
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, handler)


def _interrupt(stop: Callable[[], None], _number: int, _frame: FrameType | None) -> None:
    """End now; and soon where whatever runs at this instant swallows exceptions."""
    stop()
    raise KeyboardInterrupt


def _station(text: str) -> str:
    if not text.isascii() or not text.isalnum() or len(text) > 12:
        raise argparse.ArgumentTypeError(f"{text!r} is no name: letters and digits, at most 12")
    return text


if __name__ == "__main__":
    sys.exit(main())
