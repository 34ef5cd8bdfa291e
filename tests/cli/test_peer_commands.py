"""Commands that ask a running peer, against a control socket that answers like one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import trio

from p2ptrain.errors import NumericsError
from p2ptrain.net.control_socket import Emit
from p2ptrain.runtime.reports import NoteReport, TrainRequest
from p2ptrain.wire.codec import from_plain, to_plain

from .conftest import command_line, peer_answering, run_command
from .reports import ENERGY, PLAN, RESULT, STATUS, STEP


class ScriptedPeer:
    """Answers like a peer: fixed reports, and what it was asked for the test to look at."""

    def __init__(self) -> None:
        self.request: TrainRequest | None = None
        self.stopped = trio.Event()
        self.cancelled = trio.Event()
        self.waits_for_stop = False
        self.is_slow_to_stop = False
        self.error: NumericsError | None = None

    async def handle(self, command: str, arguments: dict[str, Any], emit: Emit) -> dict[str, Any]:
        answers = {"status": STATUS, "energy": ENERGY}
        if command in answers:
            return dict(to_plain(answers[command]))
        if command == "stop":
            if not self.is_slow_to_stop:
                self.stopped.set()
            return {}
        self.request = from_plain(TrainRequest, arguments)
        return await self._train(emit)

    async def _train(self, emit: Emit) -> dict[str, Any]:
        emit("plan", to_plain(PLAN))
        emit("step", to_plain(STEP))
        emit("evaluation", {"step": 1, "heldout_loss": 5.25})
        emit("note", to_plain(NoteReport(text="cellar is on battery")))
        emit("from-the-future", {"x": 1})
        if self.error is not None:
            raise self.error
        if self.waits_for_stop:
            try:
                await self.stopped.wait()
            except trio.Cancelled:
                self.cancelled.set()
                raise
        return {**to_plain(RESULT), "stopped": self.waits_for_stop}


@pytest.fixture
def peer() -> ScriptedPeer:
    return ScriptedPeer()


@pytest.fixture
def job(tmp_path: Path) -> list[str]:
    """Options of a small run, with paths relative to the working folder."""
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "manifest.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("text")
    return ["--model", "bundle", "--data", "notes.txt", "--steps", "40"]


async def test_status_shows_members(home: Path, member: str, peer: ScriptedPeer) -> None:
    async with peer_answering(home, member, peer.handle):
        ended = await run_command("status", "--group", member)
    printed = ended.stdout.decode()
    assert (ended.returncode, ended.stderr) == (0, b"")
    assert "group home (gggggggg)" in printed
    assert "cellar" in printed
    cellar, loft = (
        next(r for r in printed.splitlines() if name in r) for name in ("cellar", "loft")
    )
    assert "alive for 75 min, heard 2 s ago  " in cellar
    assert "4.2 ms" in cellar
    assert "dead for 2 min: it was silent  " in loft
    assert "cellar was down before: suspended for 30 s" in printed
    assert "loft was down before" not in printed
    assert "this device is attic (aaaaaaaa) at 192.0.2.7:47615" in printed
    assert "can be resumed: rrrrrrrr at step 40" in printed


async def test_json_prints_the_report_itself(home: Path, member: str, peer: ScriptedPeer) -> None:
    async with peer_answering(home, member, peer.handle):
        for command, report in (("status", STATUS), ("energy", ENERGY)):
            ended = await run_command(command, "--group", member, "--json")
            assert json.loads(ended.stdout) == to_plain(report)
            assert ended.stderr == b""


async def test_energy_counts_a_shared_meter_once(
    home: Path, member: str, peer: ScriptedPeer
) -> None:
    async with peer_answering(home, member, peer.handle):
        ended = await run_command("energy", "--group", member)
    printed = ended.stdout.decode()
    assert "2 peers on one meter counted once" in printed
    assert "RAPL package 0; package, measured within 5%" in printed
    assert all(word in printed for word in ("compute", "communicate", "wait", "idle", "above idle"))


async def test_train_shows_plan_progress_and_summary(
    home: Path, member: str, peer: ScriptedPeer, job: list[str]
) -> None:
    async with peer_answering(home, member, peer.handle):
        ended = await run_command("train", "--group", member, *job)
    printed, said = ended.stdout.decode(), ended.stderr.decode()
    assert ended.returncode == 0
    assert "embedding .. block0.attention (2)" in printed
    assert "why: attic is 1.5 times faster\n" in printed
    assert "5.6000 -> 2.6000" in printed
    assert "2.0 MiB" in printed
    assert said.splitlines() == [
        "p2ptrain: step 1/40  loss 5.5000  64.0 samples/s  250 mJ/sample",
        "p2ptrain: held-out loss after step 1: 5.2500 nats",
        "p2ptrain: cellar is on battery",
    ]


async def test_train_hands_over_what_is_best_and_what_is_left_to_the_planner(
    home: Path, member: str, peer: ScriptedPeer, job: list[str]
) -> None:
    options = "--objective energy --deadline 60 --joules 5.5 --parallelism auto"
    options += " --microbatch-size auto --schedule auto --codec auto --rematerialise-auto"
    async with peer_answering(home, member, peer.handle):
        await run_command("train", "--group", member, *job, *options.split())
        asked = peer.request
        wrong = await run_command("train", "--group", member, *job, "--microbatch-size", "few")
    assert asked is not None
    assert (asked.objective, asked.deadline_s, asked.joules) == ("energy", 60.0, 5.5)
    assert (asked.parallelism, asked.schedule, asked.codec) == ("auto", "auto", "auto")
    assert (asked.microbatch_size, asked.rematerialise) == (None, None)
    assert wrong.returncode == 2
    assert b"'few' is not a number from 1 to 1048576, or auto" in wrong.stderr


async def test_train_hands_a_plan_over_once_it_agrees_with_itself(
    home: Path, member: str, peer: ScriptedPeer, job: list[str], tmp_path: Path
) -> None:
    plan = tmp_path / "plan.toml"
    plan.write_text('[[stage]]\ndevices = ["attic"]\nsegments = 4\n')
    async with peer_answering(home, member, peer.handle):
        ended = await run_command("train", "--group", member, *job, "--plan", "plan.toml")
        assert ended.returncode == 0
        assert peer.request is not None
        assert peer.request.plan == plan.read_text()
        peer.request = None
        plan.write_text('[[stage]]\ndevices = ["attic"]\n')
        ended = await run_command("train", "--group", member, *job, "--plan", "plan.toml")
    assert (ended.returncode, peer.request) == (2, None)
    assert b"plan.toml: stage 0 needs a number of segments" in ended.stderr


async def test_train_json_keeps_stdout_for_one_object(
    home: Path, member: str, peer: ScriptedPeer, job: list[str]
) -> None:
    async with peer_answering(home, member, peer.handle):
        ended = await run_command("train", "--group", member, "--json", *job)
    assert json.loads(ended.stdout) == to_plain(RESULT)
    assert b"why: attic" in ended.stderr


async def test_train_hands_every_option_to_the_peer(
    home: Path, member: str, peer: ScriptedPeer, job: list[str], tmp_path: Path
) -> None:
    options = "--stages 2 --microbatches 4 --microbatch-size 2 --seed 7 --threads 1 --form training"
    options += " --schedule zb-h1 --dropout 0 --learning-rate 0.01 --warmup-steps 0 --out t.onnx"
    options += " --weight-decay 0 --clip-norm 0 --optimizer sgd --evaluate-every 5"
    options += " --checkpoint-every 9 --text-field body --label-field topic --labels notes.txt"
    options += " --rematerialise --codec int8"
    async with peer_answering(home, member, peer.handle):
        await run_command("train", "--group", member, *job, *options.split())
    request = peer.request
    assert request is not None
    assert request.bundle == str(tmp_path / "bundle")
    assert request.data == str(tmp_path / "notes.txt")
    assert request.out == str(tmp_path / "t.onnx")
    assert (request.stages, request.microbatches, request.microbatch_size) == (2, 4, 2)
    assert (request.seed, request.threads, request.form, request.schedule) == (
        7, 1, "training", "zb-h1",
    )  # fmt: skip
    assert (request.dropout, request.evaluate_every, request.checkpoint_every) == (0.0, 5, 9)
    assert request.rematerialise
    assert request.codec == "int8"
    assert (request.text_field, request.label_field) == ("body", "topic")
    assert request.labels == str(tmp_path / "notes.txt")
    chosen = request.optimizer
    assert (chosen.name, chosen.peak_learning_rate, chosen.warmup_steps) == ("sgd", 0.01, 0)
    assert (chosen.weight_decay, chosen.clip_norm) == (0.0, 0.0)
    assert chosen.final_learning_rate == pytest.approx(0.001)


async def test_options_not_given_keep_the_request_s_defaults(
    home: Path, member: str, peer: ScriptedPeer, job: list[str], tmp_path: Path
) -> None:
    async with peer_answering(home, member, peer.handle):
        await run_command("train", "--group", member, *job)
    data, bundle = str(tmp_path / "notes.txt"), str(tmp_path / "bundle")
    assert peer.request == TrainRequest(bundle=bundle, data=data, steps=40)


async def test_error_of_the_peer_decides_the_exit_code(
    home: Path, member: str, peer: ScriptedPeer, job: list[str]
) -> None:
    peer.error = NumericsError("the loss of step 2 is not finite")
    async with peer_answering(home, member, peer.handle):
        ended = await run_command("train", "--group", member, *job)
    assert ended.returncode == 9
    assert ended.stderr.decode().splitlines()[-2:] == [
        "p2ptrain: the loss of step 2 is not finite",
        "p2ptrain: hint: lower the learning rate, or resume from the last checkpoint",
    ]


async def _start_training(member: str, job: list[str]) -> tuple[trio.Process, bytes]:
    """A `train` that has begun, with what it has said so far."""
    process = await trio.lowlevel.open_process(
        command_line("train", "--group", member, *job),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    return process, await _read_until(process, b"on battery")


async def _read_until(process: trio.Process, wanted: bytes) -> bytes:
    assert process.stderr is not None
    said = b""
    while wanted not in said:
        chunk = await process.stderr.receive_some()
        assert chunk, said
        said += chunk
    return said


async def test_ctrl_c_stops_gracefully_and_says_how_to_resume(
    home: Path, member: str, peer: ScriptedPeer, job: list[str]
) -> None:
    peer.waits_for_stop = True
    with trio.fail_after(60):
        async with peer_answering(home, member, peer.handle):
            process, _ = await _start_training(member, job)
            process.send_signal(signal.SIGINT)
            said = await _read_until(process, b"--resume")
            assert process.stdout is not None
            printed = b"".join([chunk async for chunk in process.stdout])
            assert await process.wait() == 130
    assert peer.stopped.is_set()
    assert b"stopping after this step; Ctrl-C again leaves at once" in said
    assert b"p2ptrain: stopped after step 3; nothing is lost" in said
    assert b"3 of 40" in printed


async def test_second_ctrl_c_leaves_at_once(
    home: Path, member: str, peer: ScriptedPeer, job: list[str]
) -> None:
    peer.waits_for_stop = True
    peer.is_slow_to_stop = True
    with trio.fail_after(60):
        async with peer_answering(home, member, peer.handle):
            process, _ = await _start_training(member, job)
            process.send_signal(signal.SIGINT)
            await _read_until(process, b"again leaves at once")
            process.send_signal(signal.SIGINT)
            await _read_until(process, b"left at once")
            assert await process.wait() == 130
            await peer.cancelled.wait()


async def test_invite_asks_the_running_peer_for_its_addresses(
    home: Path, member: str, peer: ScriptedPeer, tmp_path: Path
) -> None:
    async with peer_answering(home, member, peer.handle):
        ended = await run_command("group", "invite", member, "--json", "--out", "family.invite")
    document = json.loads(ended.stdout)
    assert document["addresses"] == ["192.0.2.7:47615", "[2001:db8::7]:47615"]
    written = json.loads((tmp_path / "family.invite").read_text())
    assert written["addresses"] == document["addresses"]
    assert "PRIVATE" not in (tmp_path / "family.invite").read_text()
