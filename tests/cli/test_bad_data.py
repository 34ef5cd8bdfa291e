"""Data that a peer refuses, as a person sees it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio

from p2ptrain.ids import RunId
from p2ptrain.net.control_socket import Emit
from p2ptrain.runtime.planning.job import open_job
from p2ptrain.runtime.reports import TrainRequest
from p2ptrain.wire.codec import from_plain
from tests.bundles import tiny_bundle, write_bundle

from .conftest import peer_answering, run_command


async def open_and_nothing_more(command: str, arguments: dict[str, Any], emit: Emit) -> Any:
    """What a peer does first with a request to train."""
    request = from_plain(TrainRequest, arguments)
    await trio.to_thread.run_sync(
        lambda: open_job(
            request, runs_path=Path("home/runs").absolute(), new_run=RunId("a" * 26),
            default_threads=1,
        )
    )  # fmt: skip
    return {}


@pytest.mark.parametrize(
    ("files", "options", "stderr"),
    [
        (
            {"talk.jsonl": '{"text": "hello"}\n{"txt": "you"}\n'},
            "--data talk.jsonl",
            "p2ptrain: {here}/talk.jsonl, line 2 (record 2): there is no field 'text';"
            " it has: txt\n"
            "p2ptrain: hint: name the field with --text-field\n",
        ),
        (
            {"photos/cat/1.png": "x", "photos/dog/1.png": "x"},
            "--data photos",
            "p2ptrain: {here}/photos is a folder of images; this model wants text: a file, a"
            " folder, JSON lines or CSV with a text field, or conversations\n"
            "p2ptrain: hint: give data of that kind, or another model\n",
        ),
        (
            {"long.txt": "x" * 100, "short.txt": "x"},
            "--data long.txt --heldout short.txt",
            "p2ptrain: {here}/short.txt: 1 bytes of held-out text; one sample needs 9\n"
            "p2ptrain: hint: give a longer text with --data, or a held-out file with --heldout\n",
        ),
    ],
)
async def test_data_that_the_peer_refuses(
    home: Path, member: str, tmp_path: Path, files: dict[str, str], options: str, stderr: str
) -> None:
    write_bundle(tmp_path / "bundle", tiny_bundle(blocks=1))
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    async with peer_answering(home, member, open_and_nothing_more):
        ended = await run_command("train", "--group", member, "--model", "bundle", *options.split())
    assert (ended.returncode, ended.stdout) == (2, b"")
    assert ended.stderr.decode() == stderr.format(here=tmp_path)
