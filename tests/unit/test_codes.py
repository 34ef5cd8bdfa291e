"""The open code on disk: one at a time, ten minutes, three tries, one use."""

from __future__ import annotations

import stat
import time
from pathlib import Path

import pytest

from p2ptrain.errors import TrustError
from p2ptrain.store import codes
from p2ptrain.store.codes import claim_code, code_ends_s, create_code, open_code, spend_try
from p2ptrain.store.groups import Group, create_group
from p2ptrain.store.home import open_home
from p2ptrain.trust.code import CODE_LIFE_S, code_password, read_code


@pytest.fixture
def group(tmp_path: Path) -> Group:
    return create_group(open_home(tmp_path / "home"), "home", "correct horse", "alpha")


def test_code_is_kept_privately_and_not_as_it_is_shown(group: Group) -> None:
    code = create_code(group)
    assert read_code(code) == code
    path = group.folder / codes.CODE_FILE
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert code not in path.read_text()
    pending = open_code(group)
    assert pending is not None
    assert pending.password == code_password(code).hex()
    assert (pending.tries_left, pending.admits) == (3, True)
    ends_s = code_ends_s(group)
    assert ends_s is not None
    assert ends_s == pytest.approx(time.time() + CODE_LIFE_S, abs=30)


def test_new_code_closes_the_one_before(group: Group) -> None:
    assert create_code(group) != create_code(group, admits=False)
    pending = open_code(group)
    assert pending is not None
    assert not pending.admits


def test_code_is_used_once(group: Group) -> None:
    create_code(group)
    pending = open_code(group)
    assert pending is not None
    assert claim_code(group, pending)
    assert not claim_code(group, pending)
    assert open_code(group) is None
    assert code_ends_s(group) is None


def test_code_that_was_replaced_cannot_be_claimed(group: Group) -> None:
    create_code(group)
    before = open_code(group)
    create_code(group)
    assert before is not None
    assert not claim_code(group, before)
    assert spend_try(group, before) == 0
    after = open_code(group)
    assert after is not None
    assert after.tries_left == 3


def test_third_wrong_guess_voids_the_code_and_each_is_remembered(group: Group) -> None:
    create_code(group)
    for left in (2, 1, 0):
        pending = open_code(group)  # as a restarted peer reads it
        assert pending is not None
        assert pending.tries_left == left + 1
        assert spend_try(group, pending) == left
    assert open_code(group) is None
    assert not claim_code(group, pending)


@pytest.mark.parametrize("offset_s", [CODE_LIFE_S + 1, -CODE_LIFE_S])
def test_code_ends_after_ten_minutes_and_when_the_clock_was_set_back(
    group: Group, monkeypatch: pytest.MonkeyPatch, offset_s: float
) -> None:
    create_code(group)
    later = time.time() + offset_s
    monkeypatch.setattr(codes.time, "time", lambda: later)
    assert open_code(group) is None
    assert not (group.folder / codes.CODE_FILE).exists()


def test_damaged_code_is_no_code(group: Group) -> None:
    create_code(group)
    (group.folder / codes.CODE_FILE).write_bytes(b"{half")
    assert open_code(group) is None


def test_member_that_may_not_admit_opens_no_code(group: Group) -> None:
    (group.folder / "issuer.key").unlink()
    with pytest.raises(TrustError, match="may not admit"):
        create_code(group)
