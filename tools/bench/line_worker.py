"""A child process that answers one JSON line for every line it is sent."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from p2ptrain.errors import ConfigError
from tools.bench.processes import peak_bytes

ROOT: Final = Path(__file__).resolve().parents[2]


class LineWorker:
    """Starts the child, waits until it is ready, and ends it with the `with` block."""

    def __init__(
        self, command: Sequence[str], *, log: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        self._command, self._log = list(command), log
        self._environment = {**os.environ, "ORT_DISABLE_TELEMETRY": "1", **(environment or {})}
        self._environment["PYTHONPATH"] = str(ROOT)
        self.ready: dict[str, Any] = {}  # Any: what the child says of itself

    def __enter__(self) -> Self:
        with self._log.open("ab") as errors:
            self._process = subprocess.Popen(
                self._command,
                cwd=ROOT,
                env=self._environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        self.ready = self._answer()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.wait()

    def ask(self, line: str) -> dict[str, Any]:  # Any: JSON
        """Send one line and wait for its answer.

        Raises:
            ConfigError: the child ended; its last words are in the message.
        """
        if self._process.stdin is None:
            raise ConfigError("the worker has no input")
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self._answer()

    def peak_bytes(self) -> int | None:
        """The most memory that the child has had resident."""
        return peak_bytes(self._process.pid)

    def _answer(self) -> dict[str, Any]:  # Any: JSON
        line = self._process.stdout.readline() if self._process.stdout is not None else ""
        if not line:
            words = self._log.read_text(errors="replace").strip().splitlines()
            raise ConfigError(f"a worker ended: {words[-1] if words else 'it said nothing'}")
        answer: dict[str, Any] = json.loads(line)
        return answer
