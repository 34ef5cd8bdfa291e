"""Transcripts of bad input: one sentence, one next move, a fixed exit code, never a traceback."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from p2ptrain.cli import main
from p2ptrain.cli.main import run
from p2ptrain.errors import InvariantBroken, NumericsError

USAGE = "p2ptrain: hint: see p2ptrain {} --help\n"


@pytest.mark.parametrize(
    ("line", "code", "stderr"),
    [
        (
            "status --group nowhere",
            2,
            "p2ptrain: this device is in no group called 'nowhere'; it knows: none\n"
            "p2ptrain: hint: make one with: p2ptrain group create NAME, or join one with an "
            "invite\n",
        ),
        (
            "join --group nowhere",
            2,
            "p2ptrain: this device is in no group called 'nowhere'; it knows: none\n"
            "p2ptrain: hint: ask a member for a code: p2ptrain group invite nowhere\n",
        ),
        (
            "join --group nowhere --invite absent",
            2,
            "p2ptrain: cannot read the invite absent: No such file or directory\n"
            "p2ptrain: hint: ask a member for a new one: p2ptrain group invite NAME\n",
        ),
        (
            "join --group nowhere --data /absent/notes.txt --code 1234-5678",
            2,
            "p2ptrain: there is no file or folder /absent/notes.txt to give to runs\n"
            "p2ptrain: hint: correct --data, or [data] in config.toml\n",
        ),
        (
            "join --group home --memory lots",
            2,
            "p2ptrain: invalid value for '--memory': 'lots' is not a size such as 512MiB or 2GiB\n"
            + USAGE.format("join"),
        ),
        (
            "join --group home --memory 0",
            2,
            "p2ptrain: invalid value for '--memory': '0' is not a size such as 512MiB or 2GiB\n"
            + USAGE.format("join"),
        ),
        (
            "join --group home --battery-reserve 96",
            2,
            "p2ptrain: invalid value for '--battery-reserve': 96 is not in the range 0<=x<=95\n"
            + USAGE.format("join"),
        ),
        (
            "join --group home --peer 192.0.2.1",
            2,
            "p2ptrain: invalid value for '--peer': '192.0.2.1' is not host:port\n"
            + USAGE.format("join"),
        ),
        (
            "join --group home --peer ::1:9",
            2,
            "p2ptrain: invalid value for '--peer': '::1:9' is not host:port\n"
            + USAGE.format("join"),
        ),
        (
            "train --group home --steps 10",
            2,
            "p2ptrain: a new run needs --model and --data; an old one needs --resume\n"
            "p2ptrain: hint: see p2ptrain COMMAND --help\n",
        ),
        (
            "train --group home --microbatch-size 0",
            2,
            "p2ptrain: invalid value for '--microbatch-size': '0' is not a number from 1 to "
            "1048576, or auto\n" + USAGE.format("train"),
        ),
        (
            "train --group home --dropout 1",
            2,
            "p2ptrain: invalid value for '--dropout': 1.0 is not in the range 0.0<=x<1.0\n"
            + USAGE.format("train"),
        ),
        ("energy", 2, "p2ptrain: missing option '--group'\n" + USAGE.format("energy")),
        (
            "group create home --passphrase-file absent",
            2,
            "p2ptrain: cannot read absent: No such file or directory\n"
            "p2ptrain: hint: see p2ptrain COMMAND --help\n",
        ),
        (
            "nonsense",
            2,
            "p2ptrain: no such command 'nonsense'\np2ptrain: hint: see p2ptrain --help\n",
        ),
    ],
)
def test_bad_command_line(
    line: str, code: int, stderr: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(line.split()) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == stderr


def test_peer_that_does_not_run_is_named(member: str, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("status", "energy"):
        assert run([command, "--group", member]) == 2
        assert capsys.readouterr().err == (
            "p2ptrain: no peer runs on this device for this group\n"
            "p2ptrain: hint: start one with: p2ptrain join --group NAME\n"
        )


@pytest.fixture
def bundle(tmp_path: Path) -> str:
    """A folder that looks like a bundle from outside; the peer checks the rest."""
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "manifest.json").write_text("{}")
    return "bundle"


def test_missing_bundle(member: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "--group", member, "--model", "absent", "--data", "x"]) == 7
    printed = capsys.readouterr().err
    assert printed.startswith("p2ptrain: there is no bundle 'absent'\n")
    assert "tools/export_model.py" in printed


@pytest.mark.parametrize("option", ["--data", "--heldout"])
@pytest.mark.parametrize(("content", "said"), [(None, "there is no file"), ("", "is empty")])
def test_missing_or_empty_data(
    member: str,
    bundle: str,
    option: str,
    content: str | None,
    said: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    (tmp_path / "good").write_text("text")
    if content is not None:
        (tmp_path / "bad").write_text(content)
    files = {"--data": "good", "--heldout": "good", option: "bad"}
    given = [part for pair in files.items() for part in pair]
    assert run(["train", "--group", member, "--model", bundle, *given]) == 2
    printed = capsys.readouterr().err
    assert said in printed
    assert "hint: give a readable file" in printed


@pytest.mark.parametrize("option", ["--out", "--safetensors"])
def test_out_in_a_missing_folder(
    member: str, bundle: str, option: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "good").write_text("text")
    line = ["train", "--group", member, "--model", bundle, "--data", "good", option, "no/x"]
    assert run(line) == 2
    printed = capsys.readouterr().err
    assert "there is no folder" in printed
    assert f"choose another {option}" in printed


@pytest.fixture
def port_in_use() -> Iterator[int]:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield listening.getsockname()[1]


def test_port_in_use(member: str, port_in_use: int, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["join", "--group", member, "--listen", "127.0.0.1", "--port", str(port_in_use)]
    assert run([*line, "--no-discovery"]) == 2
    printed = capsys.readouterr().err
    assert str(port_in_use) in printed
    assert "hint: choose another with --port, or --port 0 for any free one" in printed


def test_member_does_not_look_for_its_invite_again(
    member: str, port_in_use: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """A unit names the invite at every start: it gets as far as listening."""
    line = ["join", "--group", member, "--listen", "127.0.0.1", "--port", str(port_in_use)]
    assert run([*line, "--invite", "gone"]) == 2
    printed = capsys.readouterr().err
    assert "gone" not in printed
    assert str(port_in_use) in printed


def test_damaged_invite_is_not_trusted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "invite").write_text('{"version": 9}')
    assert run(["join", "--group", "home", "--invite", "invite"]) == 3
    assert "not a usable invite" in capsys.readouterr().err


def test_home_that_others_may_read_is_refused(
    home: Path, member: str, capsys: pytest.CaptureFixture[str]
) -> None:
    home.chmod(0o755)
    assert run(["status", "--group", member]) == 3
    assert f"hint: chmod 700 {home}" in capsys.readouterr().err


def test_key_that_others_may_read_is_refused(
    home: Path, member: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (key,) = home.glob("groups/*/device.key")
    key.chmod(0o644)
    assert run(["status", "--group", member]) == 3
    assert f"hint: chmod 600 {key}" in capsys.readouterr().err


def _command_raising(error: BaseException) -> click.Command:
    def fail() -> None:
        raise ExceptionGroup("tasks", [error]) if isinstance(error, Exception) else error

    return click.Command("fail", callback=fail)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (NumericsError("the loss is not finite"), 9, "p2ptrain: the loss is not finite\n"),
        (InvariantBroken("no"), 1, "p2ptrain: a rule of p2ptrain itself is broken: no\n"),
        (ValueError("two\nlines"), 1, "p2ptrain: unexpected ValueError: two lines\n"),
        (KeyboardInterrupt(), 130, "p2ptrain: stopped\n"),
    ],
)
def test_any_exception_becomes_a_sentence(
    error: BaseException,
    code: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(main.cli.commands, "fail", _command_raising(error))
    assert run(["fail"]) == code
    printed = capsys.readouterr().err
    assert printed.startswith(said)
    assert "Traceback" not in printed
    assert "hint: " in printed


def test_verbose_shows_the_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(main.cli.commands, "fail", _command_raising(ValueError("x")))
    assert run(["--verbose", "fail"]) == 1
    assert "Traceback" in capsys.readouterr().err
