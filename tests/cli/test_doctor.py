"""`p2ptrain doctor` as a person runs it: what it prints, and its exit code."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
from importlib.metadata import distribution
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from p2ptrain.engine.build import installed_distributions
from p2ptrain.net.control_socket import Emit
from p2ptrain.runtime.reports import LinksReport
from p2ptrain.store import groups
from p2ptrain.store.groups import create_group
from p2ptrain.store.home import open_home
from p2ptrain.wire.codec import to_plain

from .conftest import peer_answering, run_command
from .reports import STATUS

OWN_NAME = Path("/proc/self/comm").read_text().strip()
LINKS = LinksReport(
    listen_host="127.0.0.1",
    port=47615,
    discovery="switched off",
    discovery_works=False,
    refusals={},
    failures={},
    refused_count=2,
    last_refusal="certificates do not fit",
)


async def doctor(*arguments: str) -> tuple[subprocess.CompletedProcess[bytes], dict[str, Any]]:
    """Run it with --json; how it ended, and its report."""
    ended = await run_command("doctor", "--json", "--seconds", "0.2", *arguments)
    assert b"Traceback" not in ended.stderr, ended.stderr
    return ended, json.loads(ended.stdout)


def said(report: dict[str, Any], check: str) -> list[str]:
    """What was found in one check, by severity."""
    found = [each for each in report["findings"] if each["check"] == check]
    return [f"{each['severity']}: {each['found']}" for each in found]


async def test_device_without_a_group_is_told_what_to_do() -> None:
    ended = await run_command("doctor", "--port", "0", "--seconds", "0.2")
    assert ended.returncode == 11
    lines = ended.stdout.decode().splitlines()
    assert lines[:2] == [
        "problem  group: this device is in no group",
        "         why: peers only link with members of their own group",
    ]
    assert lines[2].startswith("         next: make one with p2ptrain group create NAME")
    assert b"p2ptrain: 1 problem was found\np2ptrain: hint: make one with" in ended.stderr


async def test_member_without_a_peer_is_well(home: Path, member: str) -> None:
    ended, report = await doctor("--port", "0")
    assert ended.returncode == 0, report
    assert (report["version"], report["group_name"]) == (1, member)
    assert {each["severity"] for each in report["findings"]} <= {"fine", "hint"}
    assert said(report, "peer") == ["hint: no peer of group family runs on this device"]
    assert said(report, "certificate")[0] == (
        "fine: this device's certificate is good for 30 days more"
    )


async def test_unknown_group_and_a_choice_of_groups_are_refused(home: Path, member: str) -> None:
    ended = await run_command("doctor", "--group", "nowhere")
    assert ended.returncode == 2
    create_group(open_home(home), "work", "a passphrase long enough", "attic")
    ended = await run_command("doctor")
    assert ended.returncode == 2
    assert b"p2ptrain: this device is in several groups: family, work" in ended.stderr


async def test_taken_port_is_found_with_who_has_it(member: str) -> None:
    with socket.create_server(("0.0.0.0", 0)) as taken:
        port = taken.getsockname()[1]
        ended, report = await doctor("--port", str(port))
    assert ended.returncode == 11
    assert said(report, "port") == [
        f"problem: port {port} is taken by {OWN_NAME} (process {os.getpid()})"
    ]


async def test_running_peer_is_asked(home: Path, member: str) -> None:
    async def handle(command: str, arguments: dict[str, Any], emit: Emit) -> dict[str, Any]:
        return dict(to_plain({"status": STATUS, "links": LINKS}[command]))

    async with peer_answering(home, member, handle):
        ended, report = await doctor()
    assert ended.returncode == 11
    assert said(report, "port") == ["problem: the peer listens at 127.0.0.1 only"]
    assert "hint: the peer was started with --no-discovery" in said(report, "multicast")
    assert said(report, "peer")[0] == (
        "hint: connections were refused here, 2 so far, the last one because: certificates do "
        "not fit"
    )


async def test_peer_of_another_version_is_told(home: Path, member: str) -> None:
    async def handle(command: str, arguments: dict[str, Any], emit: Emit) -> dict[str, Any]:
        return {"from": "the future"}

    async with peer_answering(home, member, handle):
        ended, report = await doctor()
    assert ended.returncode == 11
    (problem,) = said(report, "peer")
    assert problem.startswith("problem: the peer of this device cannot be asked: ")


async def test_loose_key_is_found(home: Path, member: str) -> None:
    (key,) = (home / "groups").glob("*/device.key")
    key.chmod(0o644)
    ended, report = await doctor("--port", "0")
    assert ended.returncode == 11
    assert said(report, "certificate") == [f"problem: {key} has mode 0644, too open"]
    assert report["findings"][0]["next_step"] == f"chmod 600 {key}"


async def test_expired_certificates_are_found(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long_ago = time.time() - 400 * 86_400
    with monkeypatch.context() as patch:
        patch.setattr(groups, "time", SimpleNamespace(time=lambda: long_ago))
        create_group(open_home(home), "family", "a passphrase long enough", "attic")
    ended, report = await doctor("--port", "0")
    assert ended.returncode == 11
    problems = [each for each in report["findings"] if each["severity"] == "problem"]
    assert problems[0]["check"] == "certificate"
    assert "expired" in problems[0]["found"]


async def test_clock_before_the_certificate_is_found(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead = time.time() + 5 * 86_400
    with monkeypatch.context() as patch:
        patch.setattr(groups, "time", SimpleNamespace(time=lambda: ahead))
        create_group(open_home(home), "family", "a passphrase long enough", "attic")
    ended, report = await doctor("--port", "0")
    assert ended.returncode == 11
    problems = {each["check"]: each for each in report["findings"] if each["severity"] == "problem"}
    assert "set" in problems["clock"]["next_step"]


async def test_overwritten_onnxruntime_is_found(
    tmp_path: Path, member: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ((name, version),) = installed_distributions().items()
    site = copy_of_the_runtime(tmp_path, name)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(site), os.environ["PYTHONPATH"]]))
    ended, report = await doctor("--port", "0")
    assert (ended.returncode, said(report, "onnxruntime")) == (
        0, [f"fine: {name} {version} is intact"],
    )  # fmt: skip
    damaged = site / "onnxruntime" / "__init__.py"
    content = damaged.read_bytes() + b"\n"
    damaged.unlink()  # the copy shares its files with the installation
    damaged.write_bytes(content)
    ended, report = await doctor("--port", "0")
    assert ended.returncode == 11
    assert said(report, "onnxruntime") == [
        f"problem: {name} {version} is not as it was installed: 1 file of {name} changed, as "
        "onnxruntime/__init__.py"
    ]


def copy_of_the_runtime(tmp_path: Path, name: str) -> Path:
    """The package and its record in a folder of their own, by hard links where that works."""
    site = tmp_path / "site"
    site.mkdir()
    installed = distribution(name)
    parts = {file.parts[0] for file in installed.files or () if ".." not in file.parts}
    for part in parts:
        source = Path(str(installed.locate_file(part)))
        if source.is_dir() and part != "__pycache__":
            shutil.copytree(source, site / part, copy_function=_link_or_copy)
    for file in installed.files or ():
        if ".." in file.parts:  # scripts in bin/
            target = site.joinpath(*file.parts).resolve()
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(str(file.locate()), target)
    return site


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
