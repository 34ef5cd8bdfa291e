"""The folders of `peers/`: what they tell a person to type is real, and their units are sound."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

import click
import pytest

from p2ptrain.cli.main import cli

ROOT: Final = Path(__file__).resolve().parents[2]
PEERS: Final = ROOT / "peers"
UNIT: Final = PEERS / "linux-systemd" / "p2ptrain@.service"
DROP_INS: Final = sorted(PEERS.glob("*/*.conf"))
BOOT_FILE: Final = PEERS / "android-termux" / "p2ptrain"
INSTALLED: Final = "/opt/p2ptrain/bin/p2ptrain"
PLATFORMS: Final = ("android-termux", "jetson", "linux-systemd", "raspberry-pi")
HARDENING: Final = {
    "NoNewPrivileges": "yes", "CapabilityBoundingSet": "", "ProtectSystem": "strict",
    "ProtectHome": "yes", "PrivateTmp": "yes", "RestrictNamespaces": "yes",
    "SystemCallArchitectures": "native", "StateDirectoryMode": "0700", "UMask": "0077",
}  # fmt: skip


def readme(folder: str) -> str:
    return (PEERS / folder / "README.md").read_text(encoding="utf-8")


def typed(text: str) -> list[list[str]]:
    """The commands of each console block, in order."""
    blocks = re.findall(r"```console\n(.*?)```", text, re.DOTALL)
    return [re.findall(r"^\$ (.*)$", block, re.MULTILINE) for block in blocks]


def our_commands(text: str) -> list[list[str]]:
    """The arguments of every p2ptrain in some text; a comment or a quotation mark ends them."""
    pattern = r"(?:^|[ /`])p2ptrain ((?:group [a-z]+ \w+|[a-z]+) --[^`&|#']*)"
    found = re.findall(pattern, text.replace("\\\n", " "), re.MULTILINE)
    return [shlex.split(line.splitlines()[0]) for line in found]


def parse(arguments: list[str]) -> click.Context:
    """What click makes of a command line; UsageError where a person would see one."""
    command: click.Command = cli
    while isinstance(command, click.Group):
        name, *arguments = arguments
        command = command.commands[name]
    return command.make_context(command.name, list(arguments))


def settings(path: Path) -> dict[str, list[str]]:
    """The [Service] settings of a unit; a repeated one has several values."""
    found: dict[str, list[str]] = {}
    section = path.read_text(encoding="utf-8").partition("[Service]\n")[2].partition("\n[")[0]
    for line in section.splitlines():
        if line and not line.startswith("#"):
            name, _, value = line.partition("=")
            found.setdefault(name, []).append(value)
    return found


@pytest.mark.parametrize("folder", PLATFORMS)
def test_readme_has_five_commands_and_says_how_to_see_remove_and_what_was_tried(
    folder: str,
) -> None:
    text = readme(folder)
    install, see, remove = typed(text)
    assert len(install) == 5
    assert see
    assert remove
    titles = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert titles == ["See that it works", "Remove it", "Tried"]


@pytest.mark.parametrize(
    "path", [BOOT_FILE, UNIT, *sorted(PEERS.rglob("README.md"))], ids=lambda p: p.parent.name
)
def test_every_command_is_one_of_ours_with_real_options(path: Path) -> None:
    commands = our_commands(path.read_text(encoding="utf-8").replace("%i", "home"))
    assert commands
    for arguments in commands:
        assert "home" in parse(arguments).params.values(), "every example is of group home"


def test_files_that_the_commands_install_exist() -> None:
    named = {
        name
        for path in PEERS.rglob("README.md")
        for name in re.findall(r"(?<=[ /])(peers/\S+)", path.read_text(encoding="utf-8"))
    }
    files = [name for name in named if not name.endswith("`")]
    assert {str(path.relative_to(ROOT)) for path in (UNIT, BOOT_FILE, *DROP_INS)} == set(files)


def test_unit_starts_the_peer_of_its_instance_and_keeps_it_in_its_place() -> None:
    unit = settings(UNIT)
    (start,) = unit["ExecStart"]
    program, *arguments = shlex.split(start.replace("%i", "home"))
    context = parse(arguments)
    assert program == INSTALLED
    assert context.command.name == "join"
    environment = dict(line.split("=", 1) for line in unit["Environment"])
    assert environment["ORT_DISABLE_TELEMETRY"] == "1"
    assert environment["P2PTRAIN_HOME"] == f"/var/lib/{unit['StateDirectory'][0]}"
    assert Path(context.params["invite"]).is_relative_to(environment["P2PTRAIN_HOME"])
    assert environment["XDG_RUNTIME_DIR"] == f"/run/{unit['RuntimeDirectory'][0]}"
    assert {name: unit[name] for name in HARDENING} == {k: [v] for k, v in HARDENING.items()}


@pytest.mark.parametrize("path", DROP_INS, ids=lambda path: path.parent.name)
def test_drop_in_changes_only_what_the_unit_has(path: Path) -> None:
    changed = settings(path)
    assert changed
    assert set(changed) <= set(settings(UNIT))


@pytest.mark.parametrize("drop_in", [None, *DROP_INS], ids=lambda path: path and path.parent.name)
def test_systemd_accepts_the_unit(drop_in: Path | None, tmp_path: Path) -> None:
    """With this interpreter in the place of the installed command: systemd wants it to exist."""
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not installed")
    unit = tmp_path / "p2ptrain@home.service"
    unit.write_text(UNIT.read_text().replace(INSTALLED, sys.executable))
    if drop_in is not None:
        folder = tmp_path / f"{unit.name}.d"
        folder.mkdir()
        shutil.copy(drop_in, folder)
    line = [analyze, "verify", str(unit)]
    verified = subprocess.run(line, capture_output=True, text=True, check=False)
    assert (verified.returncode, verified.stderr) == (0, "")


def test_boot_file_is_a_shell_script() -> None:
    checked = subprocess.run(["sh", "-n", str(BOOT_FILE)], capture_output=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, b"")
    assert "ORT_DISABLE_TELEMETRY=1" in BOOT_FILE.read_text()
    assert BOOT_FILE.stat().st_mode & 0o100


def test_embedded_program_is_the_one_of_the_main_readme() -> None:
    """That one is run by the end-to-end tests."""
    shown, tested = (
        re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)
        for path in (PEERS / "embedded-app" / "README.md", ROOT / "README.md")
    )
    assert shown == tested
