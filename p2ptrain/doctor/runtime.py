"""Is onnxruntime intact, and can it be imported? Asked in a process of its own: it may crash."""

from __future__ import annotations

import json
import subprocess
import sys

from p2ptrain import limits
from p2ptrain.diagnosis.observations import Distribution, Runtime
from p2ptrain.engine.installation import Installed, installed_runtimes

_IMPORT = """
import json
from p2ptrain.engine.onnxruntime_engine import import_onnxruntime
from p2ptrain.errors import P2PTrainError
try:
    import_onnxruntime()
    print(json.dumps(None))
except P2PTrainError as error:
    print(json.dumps(error.message))
"""


def runtime() -> Runtime:
    """The onnxruntime of this environment, compared with what was installed."""
    return Runtime(
        distributions=tuple(_distribution(each) for each in installed_runtimes()),
        error=_import_error(),
    )


def _distribution(installed: Installed) -> Distribution:
    return Distribution(
        name=installed.name,
        version=installed.version,
        changed_count=len(installed.changed),
        example=next(iter(installed.changed), None),
    )


def _import_error() -> str | None:
    try:
        ended = subprocess.run(
            [sys.executable, "-c", _IMPORT],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=limits.DOCTOR_IMPORT_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"importing onnxruntime takes more than {limits.DOCTOR_IMPORT_TIMEOUT_S:.0f} s"
    try:
        said = json.loads(ended.stdout.decode(errors="replace").strip().rpartition("\n")[2])
    except ValueError:
        return f"importing onnxruntime ends the process with {ended.returncode}"
    return None if said is None else str(said)
