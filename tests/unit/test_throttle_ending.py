"""What a program says that needs throttled peers, and its exit code, where it cannot go on."""

from __future__ import annotations

import pytest
import trio

from p2ptrain.errors import PeerLost
from tools.throttle.ending import FAILED, UNAVAILABLE, told
from tools.wifi_emulator.namespaces import Unavailable


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (Unavailable("it takes root"), UNAVAILABLE, "check: not possible here: it takes root\n"),
        (PeerLost("b is gone", hint="start it"), FAILED, "check: b is gone; start it\n"),
        (trio.TooSlowError(), FAILED, "check: a run was not over in time\n"),
    ],
)
def test_what_ends_it_is_told_in_a_line(
    error: Exception, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended, told("check"):
        raise error
    assert ended.value.code == code
    assert capsys.readouterr() == ("", said)


def test_other_faults_and_none_pass_through() -> None:
    with told("check"):
        pass
    with pytest.raises(ZeroDivisionError), told("check"):
        raise ZeroDivisionError
