"""What this device has: its home folder, its groups, the control sockets of its peers."""

from __future__ import annotations

import socket
from pathlib import Path


def peer_socket(group_name: str) -> Path:
    """The control socket of this device's peer in a group.

    Raises:
        NotFound: this device knows no such group.
    """
    from p2ptrain.store.groups import load_group
    from p2ptrain.store.home import control_socket_path, open_home

    home = open_home()
    return control_socket_path(home, load_group(home, group_name).id)


def device_name() -> str:
    """What people call this device, unless they say otherwise: its host name."""
    name = socket.gethostname().split(".")[0]
    return "".join(c for c in name if c.isascii() and (c.isalnum() or c in "-_"))[:32] or "device"


def guess_address(port: int) -> str:
    """The address at which others most likely reach this device; loopback when it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing; only asks for the way out
            host = probe.getsockname()[0]
        except OSError:
            host = "127.0.0.1"
    return f"{host}:{port}"
