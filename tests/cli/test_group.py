"""Founding a group and inviting a device, without any peer."""

from __future__ import annotations

import io
import json
import re
import stat
import sys
import time
from pathlib import Path

import pytest

from p2ptrain.cli.main import run
from p2ptrain.store.groups import create_group
from p2ptrain.store.home import open_home
from p2ptrain.trust.invite import read_invite_url


@pytest.fixture
def passphrase(tmp_path: Path) -> str:
    (tmp_path / "passphrase").write_text("correct horse battery staple\n")
    return "passphrase"


def test_create_makes_a_group_and_says_what_comes_next(
    passphrase: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["group", "create", "home", "--passphrase-file", passphrase]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("group home (")
    assert "to a safe place" in printed.err
    assert printed.err.endswith("hint: start the peer with: p2ptrain join --group home\n")


def test_recovery_file_is_moved_where_asked(
    home: Path, passphrase: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["group", "create", "home", "--passphrase-file", passphrase, "--json"]
    assert run([*line, "--recovery-file", "stick.pem"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["recovery_file"] == "stick.pem"
    assert stat.S_IMODE((tmp_path / "stick.pem").stat().st_mode) == 0o600
    assert "ENCRYPTED" in (tmp_path / "stick.pem").read_text()
    assert list(home.glob("groups/*/recovery.pem")) == []


def test_recovery_file_is_never_overwritten(
    passphrase: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "stick.pem").write_text("another group's")
    line = ["group", "create", "home", "--passphrase-file", passphrase]
    assert run([*line, "--recovery-file", "stick.pem"]) == 2
    assert "stick.pem exists already" in capsys.readouterr().err
    assert (tmp_path / "stick.pem").read_text() == "another group's"


def test_taken_name_is_refused(
    passphrase: str, member: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["group", "create", member, "--passphrase-file", passphrase]) == 2
    assert "hint: choose another name" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"\xff\xfe", b"x" * 2000])
def test_unusable_passphrase_file_is_refused(
    content: bytes, tmp_path: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad").write_bytes(content)
    assert run(["group", "create", "home", "--passphrase-file", "bad"]) == 2
    assert "bad is " in capsys.readouterr().err
    assert not (home / "groups").exists() or not any((home / "groups").iterdir())


def test_invite_with_addresses_needs_no_peer(
    member: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["group", "invite", member, "--address", "192.0.2.9:1234", "--out", "card"]
    assert run(line) == 0
    printed = capsys.readouterr()
    assert printed.out == "card\n"
    assert "at 192.0.2.9:1234" in printed.err
    assert "join --group family --invite card" in printed.err
    assert stat.S_IMODE((tmp_path / "card").stat().st_mode) == 0o600
    assert json.loads((tmp_path / "card").read_text())["addresses"] == ["192.0.2.9:1234"]


def test_invite_without_a_peer_says_that_it_guesses(
    member: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["group", "invite", member, "--out", "card"]) == 0
    assert "no peer runs here; guessing" in capsys.readouterr().err


def test_invite_file_is_never_overwritten(
    member: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "card").write_text("precious")
    assert run(["group", "invite", member, "--out", "card"]) == 2
    assert (tmp_path / "card").read_text() == "precious"


def test_members_lists_this_device_without_a_peer(
    member: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["group", "members", member]) == 0
    printed = capsys.readouterr().out
    assert "attic (this one)" in printed
    assert "the group's root certificate ends on " in printed
    assert run(["group", "members", member, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    (line,) = document["members"]
    assert (line["name"], line["state"], line["may_admit"]) == ("attic", "member", True)
    assert (document["version"], document["roots_trusted"]) == (1, 1)


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        (["attik", "--reason", "lost"], 2, "no member is called 'attik'; this device knows: attic"),
        (["attic"], 2, "missing option '--reason'"),
        (["attic", "--reason", "x", "--keep-all", "--keep-none"], 2, "exclude each other"),
        (["attic", "--reason", "a\nb"], 3, "one line"),
        (["attic", "--reason", "x", "--group", "work"], 2, "no group called 'work'"),
    ],
)
def test_revocation_that_makes_no_sense_is_refused(
    line: list[str], code: int, said: str, member: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["group", "revoke", *line]) == code
    assert said in capsys.readouterr().err


def test_revoke_without_a_peer_is_written_down_and_says_that_nobody_knows(
    home: Path, member: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["group", "revoke", "attic", "--reason", "sold", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["name"], document["told"], document["peer_running"]) == ("attic", 0, False)
    (log,) = home.glob("groups/*/revoked.jsonl")
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
    assert run(["group", "members", member]) == 0
    assert "revoked: sold" in capsys.readouterr().out
    assert run(["group", "revoke", "attic", "--reason", "sold"]) == 2
    assert "revoked already" in capsys.readouterr().err


def test_group_must_be_named_when_there_are_several(
    home: Path, member: str, capsys: pytest.CaptureFixture[str]
) -> None:
    create_group(open_home(home), "work", "a passphrase long enough", "desk")
    assert run(["group", "revoke", "attic", "--reason", "lost"]) == 2
    assert "several groups: family, work" in capsys.readouterr().err


def test_revoke_without_any_group_says_so(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["group", "revoke", "attic", "--reason", "lost"]) == 2
    assert "this device is in no group" in capsys.readouterr().err


def test_invite_shows_a_code_that_only_this_device_can_check(
    home: Path, member: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["group", "invite", member, "--address", "192.0.2.9:1234"]) == 0
    printed = capsys.readouterr()
    code = printed.out.strip()
    assert re.fullmatch(r"[0-9A-HJKMNP-TV-Z]{5}-[0-9A-HJKMNP-TV-Z]{5}", code)
    assert "good for one device, 10 minutes and 3 tries" in printed.err
    assert "start this device's peer, which lets it in" in printed.err
    assert f"join --group family --code {code} (and --peer 192.0.2.9:1234 if" in printed.err
    (kept,) = home.glob("groups/*/code.json")
    assert code.encode() not in kept.read_bytes()
    assert json.loads(kept.read_text())["admits"] is True


def test_invite_tells_programs_the_same(
    home: Path, member: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["group", "invite", member, "--address", "192.0.2.9:1234", "--no-admit", "--json"]
    assert run(line) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["version"], document["minutes"], document["tries"]) == (1, 10, 3)
    assert document["peer_running"] is False
    (kept,) = home.glob("groups/*/code.json")
    assert json.loads(kept.read_text())["admits"] is False


def test_qr_code_shows_its_url_and_holds_it(
    member: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["group", "invite", member, "--qr", "--address", "192.0.2.9:1234"]) == 0
    *drawn, url = capsys.readouterr().out.splitlines()
    invite = read_invite_url(url)
    assert (invite.group_name, invite.addresses) == ("family", ("192.0.2.9:1234",))
    assert invite.expires_at_s == pytest.approx(time.time() + 86_400, abs=60)
    assert len({len(line) for line in drawn}) == 1
    assert len(drawn[0]) in (2 * len(drawn), 2 * len(drawn) - 1)  # square, two rows a line
    assert set("".join(drawn)) == set("\u2588\u2580\u2584 ")
    assert run(["group", "invite", member, "--qr", "--json", "--address", "192.0.2.9:1"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert read_invite_url(document["url"]).addresses == ("192.0.2.9:1",)


def test_qr_code_without_its_package_is_still_a_url(
    member: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "segno", None)
    assert run(["group", "invite", member, "--qr", "--address", "192.0.2.9:1234"]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("p2ptrain://join/1?")
    assert "pip install 'p2ptrain[qr]'" in printed.err


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["--qr", "--out", "x"], "exclude each other"),
        (["--minutes", "20"], "a code is good for ten minutes"),
    ],
)
def test_invites_that_make_no_sense_are_refused(
    line: list[str], said: str, member: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["group", "invite", member, *line]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        (["--code", "x", "--invite", "y"], 2, "exclude each other"),
        (["--code", "hello"], 2, "is not a code"),
        (["--code", "00000-00000"], 3, "no member that shows a code was found"),
        (["--code", "00000-00000", "--peer", "127.0.0.1:1"], 3, "cannot be reached at 127.0.0.1:1"),
        (["--invite", "p2ptrain://join/1?g=x"], 3, "not a usable invite"),
        (["--invite", "nowhere"], 2, "cannot read the invite nowhere"),
        ([], 2, "ask a member for a code: p2ptrain group invite office"),
    ],
)
def test_device_that_cannot_join_is_told_why(
    line: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["join", "--group", "office", "--no-discovery", *line]) == code
    assert said in capsys.readouterr().err


@pytest.fixture
def passphrases(tmp_path: Path, passphrase: str) -> list[str]:
    """Options of both recovery files; `old.pem` is that of group `home`, which is made."""
    (tmp_path / "new").write_text("staple battery horse correct\n")
    line = ["group", "create", "home", "--passphrase-file", passphrase]
    assert run([*line, "--recovery-file", "old.pem"]) == 0
    return ["--recovery-file", "old.pem", "--passphrase-file", passphrase]


def rotate_line(passphrases: list[str]) -> list[str]:
    new = ["--new-recovery-file", "new.pem", "--new-passphrase-file", "new"]
    return ["group", "rotate", "home", *passphrases, *new]


def test_rotate_writes_the_new_file_before_anybody_hears_of_the_new_root(
    passphrases: list[str], tmp_path: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*rotate_line(passphrases), "--json"]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (document["rotation"], document["peer_running"], document["told"]) == (1, False, 0)
    assert document["recovery_file"] == "new.pem"
    assert stat.S_IMODE((tmp_path / "new.pem").stat().st_mode) == 0o600
    (log,) = home.glob("groups/*/rotations.jsonl")
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
    # The old file opens nothing any more; the new one does.
    assert run(["group", "recover", "home", *passphrases]) == 3
    assert "present root" in capsys.readouterr().err
    fresh = ["--recovery-file", "new.pem", "--passphrase-file", "new"]
    assert run(["group", "recover", "home", *fresh, "--device-name", "again"]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("this device is again (")
    assert printed.err.endswith("hint: start the peer with: p2ptrain join --group home\n")


def test_rotate_says_what_comes_next_and_overwrites_nothing(
    passphrases: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(rotate_line(passphrases)) == 0
    printed = capsys.readouterr()
    assert printed.out.endswith("group home has root 2\n")
    assert "the old file opens nothing any more" in printed.err
    assert "nobody else knows yet" in printed.err
    before = (tmp_path / "new.pem").read_bytes()
    assert run(rotate_line(passphrases)) == 2
    assert "new.pem exists already" in capsys.readouterr().err
    assert (tmp_path / "new.pem").read_bytes() == before


def test_recover_brings_a_group_back_on_a_device_that_knows_nothing(
    passphrases: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    monkeypatch.setenv("P2PTRAIN_HOME", str(tmp_path / "elsewhere"))
    line = ["group", "recover", "ours", *passphrases, "--device-name", "spare", "--json"]
    assert run(line) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["name"] == "ours"
    assert run(["group", "members", "ours"]) == 0
    assert "spare (this one)" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["missing.pem", "."])
def test_recovery_file_that_cannot_be_read_is_told(
    name: str, passphrase: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["group", "recover", "home", "--recovery-file", name, "--passphrase-file", passphrase]
    assert run(line) == 2
    assert f"cannot read {name}" in capsys.readouterr().err


def test_leave_without_a_peer_deletes_the_keys_and_says_who_was_not_told(
    home: Path, member: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["group", "leave", member, "--yes"]) == 0
    printed = capsys.readouterr()
    assert printed.out == "left group family\n"
    assert "on a member, run: p2ptrain group revoke attic --reason left" in printed.err
    assert list((home / "groups").iterdir()) == []


def test_leave_asks_first(
    home: Path, member: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("n\n"))
    assert run(["group", "leave", member]) == 130
    assert len(list((home / "groups").iterdir())) == 1
    assert run(["group", "leave", member, "--yes", "--json"]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (document["told"], document["not_handed_over"]) == (False, None)
