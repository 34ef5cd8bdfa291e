"""Build an aarch64 guest and run commands in it, on x86-64 Linux, as root.

    python tools/arm_guest check     can a guest be built here?
    python tools/arm_guest build     make it, or only what is missing
    python tools/arm_guest run -- python3.11 -m pytest -q tests/numerics
    python tools/arm_guest remove

The guest is Debian 12 with Python 3.11 and the packages of a stock environment; the kernel starts
its programs through qemu-user (binfmt_misc), so they are ordinary processes of this machine and
share its network. It needs Debian's apt-get, about 40 s the first time and 400 MB.
`run` has the checkout, read only, at /src; every mount lives in a namespace of that command
and is gone when it ends, however it ends. Speed under emulation says nothing about ARM boards.

Exit codes: 0; 1 failed; 3 not possible on this machine, with the reason; `run`: the command's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.arm_guest.emulation import Unavailable, require_emulation
from tools.arm_guest.guest import Guest, GuestError, default_root
from tools.arm_guest.namespace import Entry, enter, enter_command

FAILED, UNAVAILABLE = 1, 3


def main(arguments: list[str] | None = None) -> int:
    """Do what the command line says; the exit code."""
    options = parser().parse_args(arguments)
    action: Callable[[argparse.Namespace], int] = options.action
    try:
        return action(options)
    except Unavailable as error:
        print(f"arm_guest: not possible here: {error}", file=sys.stderr)
        return UNAVAILABLE
    except (GuestError, OSError) as error:
        print(f"arm_guest: {error}", file=sys.stderr)
        return FAILED
    except subprocess.CalledProcessError as error:
        command = " ".join(map(str, error.cmd))
        print(f"arm_guest: exit code {error.returncode} from: {command}", file=sys.stderr)
        return FAILED


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="arm_guest", description="an aarch64 guest for tests")
    commands = made.add_subparsers(required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--root", type=Path, default=default_root(), help="where the guest is")
    report = argparse.ArgumentParser(add_help=False, parents=[common])
    report.add_argument("--json", action="store_true", help="print one JSON object")
    for name, action, words in (
        ("check", check, "say whether a guest can be built on this machine"),
        ("build", build, "make the guest, or only what is missing of it"),
        ("remove", remove, "delete the guest"),
    ):
        commands.add_parser(name, help=words, parents=[report]).set_defaults(action=action)
    one = commands.add_parser("run", help="run a command in the guest", parents=[common])
    one.add_argument("--bind", type=Path, action="append", default=[], metavar="DIR",
                     help="a folder that the guest sees at the same path; repeatable")  # fmt: skip
    one.add_argument("--env", action="append", default=[], metavar="NAME",
                     help="a variable to pass on; repeatable")  # fmt: skip
    one.add_argument("command", nargs="+", help="after --: the command and its arguments")
    one.set_defaults(action=run)
    inner = commands.add_parser("enter", help="the second half of run, in its own namespace")
    inner.add_argument("entry", help="JSON")
    inner.set_defaults(action=lambda options: enter(Entry.from_json(options.entry)))
    return made


def check(options: argparse.Namespace) -> int:
    """Say whether emulation works or can be made to work."""
    require_emulation()
    say(options, {"possible": True}, "a guest can be built here")
    return 0


def build(options: argparse.Namespace) -> int:
    """Make what is missing and try the result."""
    started_s = time.monotonic()
    guest = Guest(options.root)
    made = guest.build()
    seconds = round(time.monotonic() - started_s, 1)
    words = f"{guest.root}: {', '.join(made) or 'nothing'} made in {seconds} s"
    say(options, {"root": str(guest.root), "made": made, "seconds": seconds}, words)
    return 0


def run(options: argparse.Namespace) -> int:
    """Become the command, in the guest."""
    guest = Guest(options.root)
    guest.require_built()
    variables = {name: os.environ[name] for name in options.env if name in os.environ}
    line = enter_command(guest.entry(options.command, binds=options.bind, variables=variables))
    os.execvp(line[0], line)


def remove(options: argparse.Namespace) -> int:
    """Delete the guest's folder."""
    removed = Guest(options.root).remove()
    words = f"{options.root}: {'removed' if removed else 'there is no guest'}"
    say(options, {"root": str(options.root), "removed": removed}, words)
    return 0


def say(options: argparse.Namespace, report: dict[str, object], words: str) -> None:
    """Print a result, for a program or for a person."""
    print(json.dumps(report) if options.json else f"arm_guest: {words}")


if __name__ == "__main__":
    sys.exit(main())
