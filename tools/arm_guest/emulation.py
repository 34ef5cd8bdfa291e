"""Have the kernel start aarch64 programs through qemu-user."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Final

BINFMT: Final = Path("/proc/sys/fs/binfmt_misc")
FORMAT: Final = "qemu-aarch64"
RULE: Final = Path("/usr/lib/binfmt.d/qemu-aarch64.conf")
PROGRAMS: Final = {
    "qemu-aarch64-static": "qemu-user-static",
    "mmdebstrap": "mmdebstrap",
    "unshare": "util-linux",
}
"""Program -> the Debian package that has it."""


class Unavailable(Exception):
    """This machine cannot run a guest, whatever is installed."""


def require_emulation() -> None:
    """Mount binfmt_misc if need be; Unavailable where the machine or its rights forbid a guest."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        raise Unavailable(f"{platform.system()} on {platform.machine()}, not Linux on x86_64")
    if os.geteuid() != 0:
        raise Unavailable("mounting and chroot need root")
    if shutil.which("unshare") is None or shutil.which("mount") is None:
        raise Unavailable("unshare and mount (util-linux) are missing")
    namespace = ["unshare", "--mount", "--propagation", "private", "true"]
    tried = subprocess.run(namespace, capture_output=True, text=True, check=False)
    if tried.returncode != 0:
        raise Unavailable(f"no mount namespace: {tried.stderr.strip()}")
    _mount_binfmt()


def install_programs() -> None:
    """Install what is missing of qemu-user and mmdebstrap; Unavailable where there is no apt."""
    missing = sorted(
        package for program, package in PROGRAMS.items() if shutil.which(program) is None
    )
    if not missing:
        return
    if shutil.which("apt-get") is None:
        raise Unavailable(f"there is no apt-get to install {' '.join(missing)} with")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *missing]
    # A new machine has no package lists, an old one has stale ones.
    subprocess.run(["apt-get", "update", "-qq"], check=True, env=environment)
    subprocess.run(install, check=True, env=environment, stdout=subprocess.DEVNULL)


def register() -> None:
    """Tell the kernel about aarch64; it stays registered until the machine restarts.

    The rule's flag F opens the emulator now, so that it is found from inside the guest too.
    """
    if not (BINFMT / FORMAT).exists():
        (BINFMT / "register").write_bytes(RULE.read_bytes())


def _mount_binfmt() -> None:
    if (BINFMT / "register").exists():
        return
    mount = ["mount", "-t", "binfmt_misc", "binfmt_misc", str(BINFMT)]
    tried = subprocess.run(mount, capture_output=True, text=True, check=False)
    if tried.returncode != 0:
        raise Unavailable(f"binfmt_misc cannot be mounted: {tried.stderr.strip()}")
