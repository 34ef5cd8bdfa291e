"""`p2ptrain demo` with real processes: what it prints, what it leaves, and Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from p2ptrain.engine.onnxruntime_engine import open_engine

KEYS = {
    "peers", "stages", "steps", "loss_first", "loss_last", "heldout_loss", "unigram_loss",
    "bigram_loss", "samples_per_s", "joules_per_sample", "bytes_sent", "model_path", "seconds",
}  # fmt: skip


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "run").mkdir(mode=0o700)
    return {
        **os.environ,
        "XDG_RUNTIME_DIR": str(tmp_path / "run"),
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
        "PYTHONUNBUFFERED": "1",
    }


def demo_line(directory: Path, *options: str) -> list[str]:
    line = [sys.executable, "-m", "p2ptrain", "demo", "--directory", str(directory)]
    return [*line, *options]


def peers_living_in(directory: Path) -> list[str]:
    """Process ids whose P2PTRAIN_HOME is inside `directory`."""
    needle = f"P2PTRAIN_HOME={directory}/".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if needle in (entry / "environ").read_bytes():
                found.append(entry.name)
        except OSError:
            continue  # ended meanwhile, or another user's
    return found


def inputs_of(model: Path) -> tuple[str, ...]:
    """The inputs of an ONNX file that the installed onnxruntime loads."""
    return open_engine(threads=1).compile(model.read_bytes()).inputs


async def test_short_demo_ends_with_one_object_and_a_model(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    directory = tmp_path / "demo"
    with trio.fail_after(180):
        ended = await trio.run_process(
            demo_line(directory, "--json", "--steps", "4"),
            capture_stdout=True, capture_stderr=True, check=False, env=environment,
        )  # fmt: skip
    assert ended.returncode == 0, ended.stderr.decode()
    document = json.loads(ended.stdout)
    assert set(document) == KEYS
    assert (document["peers"], document["stages"], document["steps"]) == (3, 3, 4)
    assert document["loss_last"] < document["loss_first"]
    assert document["bytes_sent"] > 0
    assert document["bigram_loss"] < document["unigram_loss"]
    model = Path(document["model_path"])
    assert model == directory / "trained.onnx"
    assert len(inputs_of(model)) == 1
    said = ended.stderr.decode()
    assert "see each other over mutual TLS 1.3" in said
    assert "why: " in said
    assert peers_living_in(directory) == []


async def test_ctrl_c_ends_every_peer(tmp_path: Path, environment: dict[str, str]) -> None:
    directory = tmp_path / "demo"
    with trio.fail_after(120):
        process = await trio.lowlevel.open_process(
            demo_line(directory, "--steps", "100000"),
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment,
        )  # fmt: skip
        assert process.stderr is not None
        said = b""
        while b"step 1/" not in said:
            chunk = await process.stderr.receive_some()
            assert chunk, said.decode()
            said += chunk
        assert len(peers_living_in(directory)) == 3
        process.send_signal(signal.SIGINT)
        assert await process.wait() == 130
    assert peers_living_in(directory) == []
