"""Leaderless peer-to-peer training of ONNX models on the devices you already own."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING

# Before anything imports onnxruntime: from 1.29 on it sends telemetry unless told not to.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from p2ptrain.embed import open_peer
    from p2ptrain.errors import P2PTrainError
    from p2ptrain.runtime.config import PeerConfig
    from p2ptrain.runtime.peer import Peer
    from p2ptrain.runtime.reports import EnergyReport, PeerStatus, TrainRequest, TrainResult
    from p2ptrain.training.contract import OptimizerChoice

__version__ = "0.1.0"

__all__ = [
    "EnergyReport",
    "OptimizerChoice",
    "P2PTrainError",
    "Peer",
    "PeerConfig",
    "PeerStatus",
    "TrainRequest",
    "TrainResult",
    "__version__",
    "open_peer",
]

_HOMES = {
    "EnergyReport": "p2ptrain.runtime.reports",
    "OptimizerChoice": "p2ptrain.training.contract",
    "P2PTrainError": "p2ptrain.errors",
    "Peer": "p2ptrain.runtime.peer",
    "PeerConfig": "p2ptrain.runtime.config",
    "PeerStatus": "p2ptrain.runtime.reports",
    "TrainRequest": "p2ptrain.runtime.reports",
    "TrainResult": "p2ptrain.runtime.reports",
    "open_peer": "p2ptrain.embed",
}


def __getattr__(name: str) -> object:
    """Import a public name when it is first used: `p2ptrain --help` needs none of them."""
    if name not in _HOMES:
        raise AttributeError(f"module 'p2ptrain' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
