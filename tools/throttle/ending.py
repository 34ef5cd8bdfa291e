"""How a program that needs throttled peers ends where it cannot go on: one line, and its code."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Final

import trio

from p2ptrain.errors import P2PTrainError
from tools.wifi_emulator.namespaces import Unavailable

FAILED: Final = 2
UNAVAILABLE: Final = 3


@contextlib.contextmanager
def told(program: str) -> Iterator[None]:
    """Say on stderr why the block ended early.

    Raises:
        SystemExit: UNAVAILABLE where this machine does not allow it, else FAILED: a peer's error,
            or a run that was not over in time.
    """
    try:
        yield
    except Unavailable as error:
        why, code = f"not possible here: {error}", UNAVAILABLE
    except P2PTrainError as error:
        why, code = f"{error.message}; {error.hint}", FAILED
    except trio.TooSlowError:
        why, code = "a run was not over in time", FAILED
    else:
        return
    print(f"{program}: {why}", file=sys.stderr)
    raise SystemExit(code)
