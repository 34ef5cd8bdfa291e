"""The tool that makes the aarch64 guest, as far as it only computes or refuses."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import pytest

from tools.arm_guest import __main__ as command_line
from tools.arm_guest import guest as guests
from tools.arm_guest.guest import Guest, GuestError, mounted_below, requirements
from tools.arm_guest.namespace import Entry, enter_command, mounts

ENTRY = Entry(
    system="/g/system", checkout="/code", binds=("/tmp/a b",), environment={"PATH": "/usr/bin"},
    command=("python3.11", "-c", "print('x')"),
)  # fmt: skip
MOUNTINFO = """\
22 1 254:0 / / rw - ext4 /dev/vda rw
23 22 0:21 / /proc rw - proc proc rw
90 22 0:21 / /g/system/proc rw - proc proc rw
91 22 0:21 / /g/with\\040space rw - proc proc rw
92 22 0:21 / /gone rw - proc proc rw
"""


def test_guest_sees_the_checkout_read_only_and_no_sys() -> None:
    lines = mounts(ENTRY)
    targets = [line[-1] for line in lines]
    assert targets[:3] == ["/g/system/proc", "/g/system/dev", "/g/system/tmp"]
    assert ["mount", "--bind", "-o", "ro", "/code", "/g/system/src"] in lines
    assert targets[-1] == "/g/system/tmp/a b"
    assert not any("/sys/" in f"{target}/" for target in targets)


def test_entry_survives_the_command_line() -> None:
    line = enter_command(ENTRY)
    assert line[:2] == ["unshare", "--mount"]
    assert Entry.from_json(line[-1]) == ENTRY


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("/g", ["/g/system/proc", "/g/with space"]),
        ("/g/system/proc", ["/g/system/proc"]),
        ("/g/sys", []),
    ],
)
def test_mounts_below_a_folder_are_found(path: str, found: list[str]) -> None:
    assert mounted_below(Path(path), MOUNTINFO) == found


def test_requirements_are_those_of_a_stock_environment() -> None:
    lines = requirements()
    assert [line for line in lines if line.startswith("onnxruntime")] == ["onnxruntime>=1.20"]
    assert not [line for line in lines if ";" in line]


def test_stamp_changes_with_the_requirements(monkeypatch: pytest.MonkeyPatch) -> None:
    before = guests.wheels_stamp()
    assert guests.wheels_stamp() == before
    monkeypatch.setattr(guests, "requirements", lambda: ["onnxruntime>=9"])
    assert guests.wheels_stamp() != before


def test_guest_in_the_checkout_is_refused() -> None:
    with pytest.raises(GuestError, match="in the checkout"):
        Guest(guests.ROOT / "guest").build()


def test_command_in_a_guest_that_is_not_there_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line.main(["run", "--root", str(tmp_path), "--", "true"]) == 1
    assert "run the command build first" in capsys.readouterr().err


def test_guest_with_older_requirements_asks_to_be_built_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / guests.SYSTEM_STAMP).write_text(guests.system_stamp())
    (tmp_path / guests.WHEELS_STAMP).write_text(guests.wheels_stamp())
    Guest(tmp_path).require_built()
    monkeypatch.setattr(guests, "requirements", lambda: ["onnxruntime>=9"])
    with pytest.raises(GuestError, match="requirements have changed"):
        Guest(tmp_path).require_built()


def test_remove_deletes_a_guest_and_nothing_else(tmp_path: Path) -> None:
    mine, foreign = tmp_path / "guest", tmp_path / "holiday"
    for folder in (mine, foreign):
        (folder / "system").mkdir(parents=True)
    (mine / guests.MARKER).touch()
    assert Guest(mine).remove()
    assert not mine.exists()
    assert not Guest(mine).remove()
    with pytest.raises(GuestError, match="not made by this tool"):
        Guest(foreign).remove()
    assert (foreign / "system").is_dir()


def test_remove_stops_at_a_mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / guests.MARKER).touch()
    monkeypatch.setattr(guests, "mounted_below", lambda path, text: [f"{path}/system/proc"])
    with pytest.raises(GuestError, match="unmount it first"):
        Guest(tmp_path).remove()
    assert (tmp_path / guests.MARKER).exists()


def test_remove_reports_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "none"
    assert command_line.main(["remove", "--root", str(root), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"root": str(root), "removed": False}


def test_machine_that_cannot_have_a_guest_says_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert command_line.main(["check"]) == command_line.UNAVAILABLE
    assert "not possible here: Linux on riscv64" in capsys.readouterr().err


def test_only_named_variables_reach_the_guest(tmp_path: Path) -> None:
    entry = Guest(tmp_path).entry(["true"], variables={"P2PTRAIN_HOME": "/h"})
    assert entry.environment["P2PTRAIN_HOME"] == "/h"
    assert entry.environment["ORT_DISABLE_TELEMETRY"] == "1"
    assert set(entry.environment) == {*guests.guest_environment(), "P2PTRAIN_HOME"}
