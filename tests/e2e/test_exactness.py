"""The numerics contract with real processes and real TLS: every bit of the loss curve."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
from pathlib import Path

import trio

from p2ptrain.demo.group import GROUP_NAME
from p2ptrain.errors import P2PTrainError
from p2ptrain.runtime.reports import TrainResult
from p2ptrain.wire.codec import from_plain
from tests.e2e.peers import (
    CLIP_NORM,
    POLL_S,
    STEPS,
    Member,
    PeerProcess,
    Watched,
    command,
    job,
    peer_group,
    running_command,
    short_job,
    train,
    typed,
)


def assert_same_bits(result: TrainResult, reference: TrainResult) -> None:
    """Every loss of this session and the hash of parameters and optimizer state."""
    assert result.first_step + len(result.losses) == STEPS
    assert result.losses == reference.losses[result.first_step :]
    assert result.state_digest == reference.state_digest
    assert result.heldout_last == reference.heldout_last


async def test_every_number_of_stages_gives_the_same_bits(
    tmp_path: Path, text: Path, short_alone: TrainResult
) -> None:
    assert len(set(short_alone.losses)) == STEPS
    async with peer_group(tmp_path, 4) as (home, *_):
        for stages, schedule in ((2, "1f1b"), (3, "eager-1f1b"), (4, "eager-zb-h1"), (3, "zb-h1")):
            asked = dataclasses.replace(short_job(text, stages=stages), schedule=schedule)
            result, watched = await train(home, asked)
            assert (result.stages, result.stopped) == (stages, False)
            assert_same_bits(result, short_alone)
            norms = [step.gradient_norm for step in watched.steps]
            assert max(norms) > CLIP_NORM > 0.0, "clipping was never active"
            (plan,) = watched.named("plan")
            assert len({stage["device"] for stage in plan["stages"]}) == stages
            assert plan["exactness"].startswith("exact")
            assert plan["schedule"] == schedule
        checked = dataclasses.replace(short_job(text, stages=4), checkpoint_every=5)
        ended = await command(home.member, *typed(checked), "--private")
        assert ended.returncode == 0, ended.stderr
        result = from_plain(TrainResult, json.loads(ended.stdout))
        assert (result.stages, result.stopped) == (4, False)
        assert_same_bits(result, short_alone)


async def test_home_peer_without_a_stage_gives_the_same_bits(
    tmp_path: Path, text: Path, short_alone: TrainResult
) -> None:
    def cramped(member: Member) -> Member:
        options = ("--memory", "1MiB") if member.name == "peer-1" else ()
        return dataclasses.replace(member, options=options)

    async with peer_group(tmp_path, 2, change=cramped) as (home, other):
        result, watched = await train(home, short_job(text))
        assert (await home.status()).run is None
    (plan,) = watched.named("plan")
    assert [stage["name"] for stage in plan["stages"]] == [other.name]
    assert_same_bits(result, short_alone)


async def test_another_seed_no_dropout_or_no_clipping_gives_other_bits(
    tmp_path: Path, text: Path, short_alone: TrainResult
) -> None:
    """On one peer: every number of stages gives its bits."""
    usual = short_job(text, stages=1)
    unclipped = dataclasses.replace(usual.optimizer, clip_norm=0.0)
    async with peer_group(tmp_path, 1) as (home,):
        for request in (
            dataclasses.replace(usual, seed=usual.seed + 1),
            dataclasses.replace(usual, dropout=0.0),
            dataclasses.replace(usual, optimizer=unclipped),
        ):
            result, _ = await train(home, request)
            assert result.losses[-1] != short_alone.losses[-1]
            assert result.state_digest != short_alone.state_digest


async def test_ctrl_c_and_resume_on_more_peers_gives_the_same_bits(
    tmp_path: Path, text: Path, undisturbed: TrainResult
) -> None:
    async with peer_group(tmp_path, 3) as (home, *_):
        stopped = await train_until_ctrl_c(home, text, stages=2, step=7)
        assert 7 <= len(stopped.losses) < STEPS
        assert stopped.losses == undisturbed.losses[: len(stopped.losses)]
        line = ("train", "--group", GROUP_NAME, "--resume", stopped.run, "--stages", "3", "--json")
        ended = await command(home.member, *line)
        assert ended.returncode == 0, ended.stderr
        result = from_plain(TrainResult, json.loads(ended.stdout))
    assert (result.stages, result.first_step) == (3, len(stopped.losses))
    assert_same_bits(result, undisturbed)


async def train_until_ctrl_c(
    home: PeerProcess, text: Path, *, stages: int, step: int
) -> TrainResult:
    """Start `peers.job` with the command of a person and press Ctrl-C after a step."""
    line = typed(job(text, stages=stages))
    async with running_command(home.member, *line, timeout_s=120.0) as started:
        await started.wait_said(f"step {step}/")
        started.process.send_signal(signal.SIGINT)
        ended = await started.wait_ended()
    assert ended.returncode == 130, ended.stderr
    result = from_plain(TrainResult, json.loads(ended.stdout))
    assert result.stopped
    assert f"stopped after step {len(result.losses)}; nothing is lost" in ended.stderr
    assert f"--resume {result.run}" in ended.stderr
    return result


async def test_home_peer_killed_and_started_again_takes_part_to_the_same_bits(
    tmp_path: Path, text: Path, undisturbed: TrainResult
) -> None:
    async with peer_group(tmp_path, 3) as peers:
        home, other, third = peers
        watched = Watched()

        async def conduct() -> None:
            with contextlib.suppress(P2PTrainError):  # whoever watches there loses its peer
                await train(home, job(text, stages=3), watched)

        with trio.fail_after(120.0):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(conduct)
                await home.wait_status(  # the data has its second copy
                    lambda s: (
                        s.run_status is not None and s.run_status.safety.startswith("protected")
                    ),
                    60.0,
                )
                await watched.wait_step(7)
                await home.kill()
            await home.start((await other.status()).address)
            while not (found := models(peers)):  # noqa: ASYNC110 other processes
                await trio.sleep(POLL_S)
        await third.wait_status(lambda status: status.run is None, 60.0)
    assert {path.read_bytes() for path in found} == {read_bytes(undisturbed.model_path)}


def models(peers: tuple[PeerProcess, ...]) -> list[Path]:
    """What has been trained, wherever it was stored."""
    return [path for peer in peers for path in peer.member.home.glob("runs/*/trained.onnx")]


def read_bytes(path: str | None) -> bytes:
    """A model's bytes."""
    return Path(path or "").read_bytes()
