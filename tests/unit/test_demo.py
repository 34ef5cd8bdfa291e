"""The demonstration's parts: homes, invites, waiting, and never leaving anything behind."""

from __future__ import annotations

import json
import stat
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from p2ptrain.demo.demo import STEPS, STEPS_LONG, DemoOptions, _workplace
from p2ptrain.demo.group import (
    DemoPeer,
    make_peers,
    run_peer,
    wait_started,
    wait_together,
    write_invites,
)
from p2ptrain.errors import ConfigError, PeerLost
from p2ptrain.ids import DeviceId
from p2ptrain.net.control_socket import Emit, serve_control
from p2ptrain.runtime.reports import MemberReport, PeerStatus
from p2ptrain.store.groups import load_group
from p2ptrain.store.home import control_socket_path, open_home
from p2ptrain.wire.codec import to_plain


@pytest.fixture(autouse=True)
def _short_runtime_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))


@pytest.fixture
def peers(tmp_path: Path) -> tuple[DemoPeer, ...]:
    return make_peers(tmp_path, 3)


def test_homes_are_private_and_the_first_founds_the_group(peers: tuple[DemoPeer, ...]) -> None:
    assert [peer.name for peer in peers] == ["peer-1", "peer-2", "peer-3"]
    assert all(stat.S_IMODE(peer.home.stat().st_mode) == 0o700 for peer in peers)
    assert load_group(open_home(peers[0].home), "demo").device_name == "peer-1"
    assert not (peers[1].home / "groups").exists()


def test_further_peers_get_an_invite_each(peers: tuple[DemoPeer, ...]) -> None:
    write_invites(peers, "127.0.0.1:4000")
    documents = [json.loads(peer.invite.read_text()) for peer in peers[1:]]
    assert [document["addresses"] for document in documents] == [["127.0.0.1:4000"]] * 2
    assert documents[0]["secret"] != documents[1]["secret"]
    assert not peers[0].invite.exists()


def test_command_is_the_join_of_a_person(peers: tuple[DemoPeer, ...]) -> None:
    write_invites(peers, "127.0.0.1:4000")
    line = peers[1].command(("127.0.0.1:4000",))
    assert line[:4] == [sys.executable, "-m", "p2ptrain", "join"]
    assert line[line.index("--interface") + 1] == "127.0.0.1"
    assert line[-4:] == ["--invite", str(peers[1].invite), "--peer", "127.0.0.1:4000"]
    assert "--invite" not in peers[0].command(())


async def test_peer_that_ends_is_named_with_its_last_words(tmp_path: Path) -> None:
    (tmp_path / "lonely").mkdir(mode=0o700)
    lonely = DemoPeer(name="lonely", home=tmp_path / "lonely")
    with (
        trio.fail_after(60),
        pytest.raises(PeerLost, match="lonely ended with exit code 2") as lost,
    ):
        await run_peer(lonely)
    assert "this device is in no group called 'demo'" in lost.value.message


def status_of(peer: DemoPeer, states: tuple[str, ...]) -> PeerStatus:
    members = tuple(
        MemberReport(
            device=DeviceId(f"{index}" * 26), name=f"peer-{index}", state=state, addresses=(),
            runtime="", activity="idle", last_heard_s=None,
        )
        for index, state in enumerate(states)
    )  # fmt: skip
    return PeerStatus(
        group="g" * 16, group_name="demo", device=members[0].device, name=peer.name,
        address="127.0.0.1:4000", discovery="zeroconf", alone_because=None, members=members,
        run=None, run_state="idle", plan=None, runs=(),
    )  # fmt: skip


@asynccontextmanager
async def answering(peers: tuple[DemoPeer, ...], *states: str) -> AsyncIterator[None]:
    """Peers of the founder's kind whose status shows members in these states."""
    async with AsyncExitStack() as stack:
        nursery = await stack.enter_async_context(trio.open_nursery())
        for peer in peers:
            report = to_plain(status_of(peer, states))

            async def answer(
                command: str, arguments: dict[str, Any], emit: Emit, report: Any = report
            ) -> dict[str, Any]:
                return dict(report)

            home = open_home(peer.home)
            path = control_socket_path(home, load_group(home, "demo").id)
            await nursery.start(serve_control, path, answer)
        yield
        nursery.cancel_scope.cancel()


async def test_peers_are_together_when_all_are_alive(peers: tuple[DemoPeer, ...]) -> None:
    async with answering(peers[:1], "self"):
        assert (await wait_started(peers[0])).address == "127.0.0.1:4000"
        assert await wait_together(peers[:1], 20.0)


async def test_suspected_peer_does_not_count(peers: tuple[DemoPeer, ...]) -> None:
    two = (peers[0], peers[0])
    async with answering(peers[:1], "self", "suspect: silent"):
        assert not await wait_together(two, 0.1)
    async with answering(peers[:1], "self", "alive"):
        assert await wait_together(two, 20.0)


async def test_peer_that_is_not_a_member_yet_has_no_status(peers: tuple[DemoPeer, ...]) -> None:
    assert await peers[1].status() is None
    assert await peers[0].status() is None
    assert not await wait_together(peers, 0.1)


def test_workplace_keeps_the_model_and_drops_the_keys() -> None:
    with _workplace(None) as folder:
        (folder / "peer-1").mkdir()
        (folder / "peer-1" / "device.key").write_text("secret")
        (folder / "trained.onnx").write_text("model")
    assert sorted(path.name for path in folder.iterdir()) == ["trained.onnx"]
    (folder / "trained.onnx").unlink()
    folder.rmdir()


def _fail_in_workplace(seen: list[Path]) -> None:
    with _workplace(None) as folder:
        seen.append(folder)
        raise PeerLost


def test_workplace_vanishes_with_an_error() -> None:
    seen: list[Path] = []
    with pytest.raises(PeerLost):
        _fail_in_workplace(seen)
    assert not seen[0].exists()


def _use(directory: Path) -> None:
    with _workplace(directory) as folder:
        (folder / "peer-1").mkdir()


def test_given_directory_is_kept_whole_and_must_be_empty(tmp_path: Path) -> None:
    _use(tmp_path / "given")
    assert (tmp_path / "given" / "peer-1").is_dir()
    with pytest.raises(ConfigError, match="not empty"):
        _use(tmp_path / "given")


@pytest.mark.parametrize(
    ("steps", "long", "expected"), [(None, False, STEPS), (None, True, STEPS_LONG), (7, True, 7)]
)
def test_given_steps_win(steps: int | None, long: bool, expected: int) -> None:
    assert DemoOptions.chosen(peers=3, steps=steps, long=long, directory=None).steps == expected
