"""What every test of this folder shares: a run-time folder, a text and the undisturbed run."""

from __future__ import annotations

import functools
import os
import pydoc_data.topics
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from p2ptrain.runtime.reports import TrainRequest, TrainResult
from tests.e2e.peers import ROOT, job, peer_group, short_job, train


@pytest.fixture(scope="session", autouse=True)
def private_runtime_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Control sockets go into a short, empty folder of our own."""
    folder = tmp_path_factory.mktemp("run")
    folder.chmod(0o700)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(folder))
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(ROOT), _python_path()))))
        yield


def _python_path() -> str:
    return os.environ.get("PYTHONPATH", "")


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """English to train on, the same wherever this Python is."""
    path = tmp_path_factory.mktemp("text") / "english.txt"
    topics = pydoc_data.topics.topics
    path.write_text("\n".join(topics[name] for name in sorted(topics)), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, text: Path) -> TrainResult:
    """The job of `peers.job` on one peer, without anything going wrong."""
    directory = tmp_path_factory.mktemp("undisturbed")
    return trio.run(functools.partial(_train_alone, directory, job(text, stages=1)))


@pytest.fixture(scope="session")
def short_alone(tmp_path_factory: pytest.TempPathFactory, text: Path) -> TrainResult:
    """The job of `peers.short_job` on one peer."""
    directory = tmp_path_factory.mktemp("short")
    return trio.run(functools.partial(_train_alone, directory, short_job(text, stages=1)))


async def _train_alone(directory: Path, asked: TrainRequest) -> TrainResult:
    async with peer_group(directory, 1) as (peer,):
        result, _ = await train(peer, asked)
    return result


@pytest.fixture
def stock_python() -> str:
    """The interpreter of an environment that has stock onnxruntime."""
    named = os.environ.get("P2PTRAIN_STOCK_PYTHON", "")
    if not Path(named).is_file():
        pytest.skip(f"P2PTRAIN_STOCK_PYTHON names no interpreter with stock onnxruntime: {named!r}")
    return named
