"""Ask the peer of this device through its control socket, with Ctrl-C as a wish to stop."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from p2ptrain.cli.speech import say
from p2ptrain.errors import Interrupted

Document = dict[str, Any]  # Any: JSON values, checked by from_plain
OnEvent = Callable[[str, Document], None]


def ask(path: Path, command: str, arguments: Document | None = None) -> Document:
    """The peer's answer to one question."""
    import trio

    from p2ptrain.net.control_socket import call

    return trio.run(call, path, command, arguments or {}, lambda _name, _data: None)


def ask_stoppable(path: Path, command: str, arguments: Document, on_event: OnEvent) -> Document:
    """The same for something long: the first Ctrl-C asks it to stop, the second leaves.

    Raises:
        Interrupted: left at once; the peer was told by the closed connection.
    """
    import trio

    return trio.run(_ask_stoppable, path, command, arguments, on_event)


async def _ask_stoppable(
    path: Path, command: str, arguments: Document, on_event: OnEvent
) -> Document:
    import trio

    from p2ptrain.net.control_socket import call

    stop_requested = trio.Event()
    result: Document = {}
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_watch_signals, signals, stop_requested)
            result = await call(path, command, arguments, on_event, stop_requested=stop_requested)
            nursery.cancel_scope.cancel()
    return result


async def _watch_signals(signals: Any, stop_requested: Any) -> None:  # Any: trio is not imported
    async for _ in signals:
        if stop_requested.is_set():
            raise Interrupted("left at once", hint="p2ptrain status shows what the peer does")
        say("stopping after this step; Ctrl-C again leaves at once")
        stop_requested.set()
