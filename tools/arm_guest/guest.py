"""The guest's folder: what is in it, what it was made from, how it is made and removed."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from tools.arm_guest.emulation import install_programs, register, require_emulation
from tools.arm_guest.namespace import CHECKOUT, Entry, enter_command

ROOT: Final = Path(__file__).resolve().parents[2]
RECIPE: Final = 1
SUITE: Final = "bookworm"
PYTHON: Final = "3.11"
SITE: Final = "/opt/site"
BYTECODE: Final = "/var/cache/bytecode"
SYSTEM_PACKAGES: Final = (
    f"python{PYTHON}-minimal", f"libpython{PYTHON}-stdlib", "libssl3", "libffi8", "libsqlite3-0",
    "libbz2-1.0", "liblzma5", "libstdc++6", "libgcc-s1", "zlib1g", "libexpat1", "libuuid1", "dash",
)  # fmt: skip
SOURCES: Final = (Path("/etc/apt/sources.list.d/debian.sources"), Path("/etc/apt/sources.list"))
WHEEL_PLATFORMS: Final = (
    "manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux_2_17_aarch64",
    "manylinux2014_aarch64",
)  # fmt: skip
MARKER: Final = "p2ptrain-arm-guest"
SYSTEM_STAMP: Final = "system.stamp"
WHEELS_STAMP: Final = "wheels.stamp"


class GuestError(Exception):
    """The guest is not what it should be; the sentence says what to do."""


def default_root() -> Path:
    """Where the guest is kept: in the user's cache, never in the checkout."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "p2ptrain" / "arm-guest"


class Guest:
    """One guest in one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.system = self.root / "system"

    def build(self) -> list[str]:
        """Make what its stamps do not vouch for; the names of what was made.

        Raises:
            Unavailable: this machine cannot run a guest.
            GuestError, CalledProcessError: a step failed; what it had made is made again next time.
        """
        if self.root.is_relative_to(ROOT):
            raise GuestError(f"{self.root} is in the checkout; choose another --root")
        require_emulation()
        with self._locked():
            install_programs()
            register()
            made = []
            if not self._is_stamped(SYSTEM_STAMP, system_stamp()):
                self._make_system()
                made.append("system")
            if not self._is_stamped(WHEELS_STAMP, wheels_stamp()):
                self._make_wheels()
                made.append("wheels")
            self._try()
        return made

    def require_built(self) -> None:
        """GuestError when it has to be built first."""
        if not self._is_stamped(SYSTEM_STAMP, system_stamp()):
            raise GuestError(f"no guest in {self.root}: run the command build first")
        if not self._is_stamped(WHEELS_STAMP, wheels_stamp()):
            raise GuestError("the requirements have changed: run the command build again")

    def entry(
        self,
        command: Sequence[str],
        *,
        binds: Sequence[Path] = (),
        variables: Mapping[str, str] | None = None,
    ) -> Entry:
        """A command in this guest, with an environment of its own and `variables` beside."""
        return Entry(
            system=str(self.system),
            checkout=str(ROOT),
            binds=tuple(str(path.resolve(strict=True)) for path in binds),
            environment={**guest_environment(), **(variables or {})},
            command=tuple(command),
        )

    def remove(self) -> bool:
        """Delete the folder; False when there is none.

        Raises:
            GuestError: it is not a guest's folder, or something is mounted in it; nothing is
                deleted.
        """
        if not self.root.exists():
            return False
        if not (self.root / MARKER).is_file():
            raise GuestError(f"{self.root} was not made by this tool, so it stays")
        with self._locked():
            self._delete(self.root)
        return True

    def _make_system(self) -> None:
        """Unpack the packages; none of their scripts runs, so nothing is emulated."""
        self._delete(self.system)
        (self.root / WHEELS_STAMP).unlink(missing_ok=True)
        line = ["mmdebstrap", "--quiet", "--mode=root", "--arch=arm64", "--variant=extract"]
        line += [f"--include={','.join(SYSTEM_PACKAGES)}", SUITE, str(self.system)]
        subprocess.run([*line, *apt_sources()], check=True)
        self._stamp(SYSTEM_STAMP, system_stamp())

    def _make_wheels(self) -> None:
        """Fetch the wheels with this interpreter's pip: the guest has none."""
        site = Path(f"{self.system}{SITE}")
        (self.root / WHEELS_STAMP).unlink(missing_ok=True)
        self._delete(site)
        line = [sys.executable, "-m", "pip", "install", "--quiet", "--quiet", "--no-input"]
        line += ["--disable-pip-version-check", "--target", str(site), "--only-binary=:all:"]
        line += ["--implementation", "cp", "--python-version", PYTHON]
        for abi in ("cp" + PYTHON.replace(".", ""), "abi3", "none"):
            line += ["--abi", abi]
        for platform in WHEEL_PLATFORMS:
            line += ["--platform", platform]
        subprocess.run([*line, *requirements()], check=True)
        self._stamp(WHEELS_STAMP, wheels_stamp())

    def _try(self) -> None:
        """Start the guest's Python once."""
        code = "import platform; print(platform.machine())"
        line = enter_command(self.entry([f"python{PYTHON}", "-c", code]))
        ran = subprocess.run(line, capture_output=True, text=True, check=False)
        if ran.stdout.strip() != "aarch64":
            raise GuestError(f"the guest's Python does not start: {ran.stderr.strip()}")

    def _is_stamped(self, name: str, stamp: str) -> bool:
        try:
            return (self.root / name).read_text() == stamp
        except OSError:
            return False

    def _stamp(self, name: str, stamp: str) -> None:
        (self.root / name).write_text(stamp)

    def _delete(self, path: Path) -> None:
        inside = mounted_below(path, Path("/proc/self/mountinfo").read_text())
        if inside:
            raise GuestError(f"something is mounted at {inside[0]}: unmount it first")
        if path.exists():
            shutil.rmtree(path)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One builder at a time; the others wait."""
        self.root.mkdir(parents=True, exist_ok=True)
        if not (self.root / MARKER).exists() and any(self.root.iterdir()):
            raise GuestError(f"{self.root} is not empty and no guest: choose another --root")
        with (self.root / MARKER).open("a") as marker:
            fcntl.flock(marker, fcntl.LOCK_EX)
            yield


def guest_environment() -> dict[str, str]:
    """What a command in the guest starts with.

    Python keeps its bytecode in one folder of the guest: the checkout is read only there, and
    compiling under emulation takes longer than most tests.
    """
    return {
        "PATH": "/usr/bin:/bin",
        "HOME": "/tmp",
        "LANG": "C.UTF-8",
        "PYTHONPATH": f"{SITE}:{CHECKOUT}",
        "PYTHONPYCACHEPREFIX": BYTECODE,
        "ORT_DISABLE_TELEMETRY": "1",
    }


def requirements() -> list[str]:
    """What a stock environment holds on any machine, from pyproject.toml."""
    environments = importlib.import_module("tools.make_environment")
    lines: list[str] = environments.requirements(
        environments.read_project(), environments.RECIPES["stock"]
    )
    return lines


def apt_sources() -> list[str]:
    """This machine's own package sources where they are of the same suite; else the default."""
    return [str(path) for path in SOURCES if path.is_file() and SUITE in path.read_text()][:1]


def system_stamp() -> str:
    """What the file system is made from."""
    return _digest(SUITE, *SYSTEM_PACKAGES)


def wheels_stamp() -> str:
    """What the packages are made from."""
    return _digest(PYTHON, *WHEEL_PLATFORMS, *sorted(requirements()))


def mounted_below(path: Path, mountinfo: str) -> list[str]:
    """Mount points at or below a path, from /proc/self/mountinfo (proc(5), field 5)."""
    points = [Path(line.split()[4].replace("\\040", " ")) for line in mountinfo.splitlines()]
    return sorted(str(point) for point in points if point.is_relative_to(path))


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join((str(RECIPE), *parts)).encode()).hexdigest()
