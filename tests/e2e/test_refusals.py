"""Bad input to a running peer: a sentence, a hint and an exit code, and nothing is lost."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

from p2ptrain.demo.group import GROUP_NAME
from p2ptrain.runtime.reports import TrainRequest
from tests.bundles import tiny_bundle, write_bundle
from tests.e2e.peers import (
    Member,
    PeerProcess,
    assert_refused,
    command,
    peer_group,
    train,
)

TRAIN = ("train", "--group", GROUP_NAME, "--json")
IMITATION = """
from . import capi
__version__ = "9.9.9"
def set_default_logger_severity(level): pass
"""
TEXT = "to be or not to be, that is the question. " * 20


def first_graph(bundle: Path) -> Path:
    return min((bundle / "graphs").iterdir())


def flip_a_byte(bundle: Path) -> None:
    path = first_graph(bundle)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_short(bundle: Path) -> None:
    path = first_graph(bundle)
    path.write_bytes(path.read_bytes()[:-1])


def link_outside(bundle: Path) -> None:
    path = first_graph(bundle)
    path.rename(bundle.parent / "outside.onnx")
    path.symlink_to(bundle.parent / "outside.onnx")


def name_a_path(bundle: Path) -> None:
    edit_manifest(bundle, first_graph(bundle).stem, "../../etc/passwd")


def raise_version(bundle: Path) -> None:
    edit_manifest(bundle, '"version": 2', '"version": 99')
    edit_manifest(bundle, '"version":1', '"version":99')


def edit_manifest(bundle: Path, old: str, new: str) -> None:
    path = bundle / "manifest.json"
    path.write_text(path.read_text().replace(old, new))


DAMAGES: tuple[tuple[Callable[[Path], object], str], ...] = (
    (flip_a_byte, "is damaged: its hash differs"),
    (cut_short, "bytes instead of"),
    (lambda bundle: first_graph(bundle).unlink(), "the bundle lacks"),
    (link_outside, "lies outside the bundle"),
    (name_a_path, "graph"),
    (raise_version, "version"),
    (lambda bundle: (bundle / "manifest.json").write_text("{"), "manifest"),
    (lambda bundle: (bundle / "manifest.json").unlink(), "there is no bundle in"),
)


async def test_missing_or_damaged_bundle_is_refused(tmp_path: Path) -> None:
    text = written(tmp_path / "text", TEXT)
    async with peer_group(tmp_path, 1) as (peer,):
        for index, (damage, said) in enumerate(DAMAGES):
            bundle = write_bundle(tmp_path / f"bundle-{index}", tiny_bundle())
            damage(bundle)
            ended = await command(peer.member, *TRAIN, "--model", str(bundle), "--data", text)
            assert_refused(ended, 7, said)
        await assert_still_trains(peer, tmp_path)


async def test_unusable_data_and_unknown_names_are_refused(tmp_path: Path) -> None:
    bundle = str(write_bundle(tmp_path / "bundle", tiny_bundle()))
    async with peer_group(tmp_path, 1) as (peer,):
        for data, said in (
            (str(tmp_path / "absent"), "there is no file"),
            (written(tmp_path / "empty", ""), "is empty"),
            (written(tmp_path / "short", "12345678"), "has 8 tokens"),
        ):
            ended = await command(peer.member, *TRAIN, "--model", bundle, "--data", data)
            assert_refused(ended, 2, said)
        ended = await command(peer.member, *TRAIN, "--resume", "nosuchrun")
        assert_refused(ended, 2, "this device has no run 'nosuchrun'")
        ended = await command(peer.member, "train", "--group", "nowhere", "--resume", "nosuchrun")
        assert_refused(ended, 2, "no group called 'nowhere'")
        await assert_still_trains(peer, tmp_path)


async def test_model_that_fits_no_peer_is_refused(tmp_path: Path) -> None:
    def cramped(member: Member) -> Member:
        return dataclasses.replace(member, options=("--memory", "64KiB"))

    text = written(tmp_path / "text", TEXT)
    bundle = str(write_bundle(tmp_path / "bundle", tiny_bundle()))
    async with peer_group(tmp_path, 2, change=cramped) as (peer, _):
        line = (*TRAIN, "--model", bundle, "--data", text)
        assert_refused(await command(peer.member, *line), 4, "the largest peer has 64.0 KiB")
        too_many = await command(peer.member, *line, "--stages", "3")
        assert_refused(too_many, 4)
        assert (await peer.status()).runs == ()


async def test_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    async with peer_group(tmp_path, 1) as (peer,):
        runs = [await assert_still_trains(peer, tmp_path, blocks) for blocks in (4, 3)]
        line = (*TRAIN, "--resume", runs[0])
        other = await command(peer.member, *line, "--model", str(tmp_path / "bundle-of-3"))
        assert_refused(other, 10, "trains tiny, not this tiny bundle")
        ours, theirs = (peer.member.home / "runs" / run / "checkpoints" for run in runs)
        shutil.rmtree(ours)
        shutil.copytree(theirs, ours)
        for change, said in (
            ({}, "is of another run"),
            ({"run": runs[0]}, "is of another model"),
            ({"version": 99}, "has version 99"),
        ):
            for saved in ours.glob("*/checkpoint.json"):
                saved.write_text(json.dumps(json.loads(saved.read_text()) | change))
            assert_refused(await command(peer.member, *line), 10, said)
        await assert_still_trains(peer, tmp_path, 2)


async def test_overwritten_onnxruntime_keeps_a_peer_from_starting(tmp_path: Path) -> None:
    package = tmp_path / "overwritten" / "onnxruntime"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text('__version__ = "9.9.9"\n')
    line = ("join", "--group", GROUP_NAME, "--port", "0", "--no-discovery")
    async with peer_group(tmp_path, 1) as (peer,):
        await peer.kill()
        ended = await command(peer.member, *line, python_path_first=package.parent)
        assert_refused(ended, 8, "onnxruntime is damaged", "pip install --force-reinstall")
        (package / "__init__.py").write_text(IMITATION)
        (package / "capi").mkdir()
        (package / "capi" / "__init__.py").write_text("from . import _pybind_state\n")
        (package / "capi" / "_pybind_state.py").write_text("")
        ended = await command(peer.member, *line, python_path_first=package.parent)
        said = "has been overwritten by onnxruntime 9.9.9"
        assert_refused(ended, 8, said, "pip install --force-reinstall")


def written(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


async def assert_still_trains(peer: PeerProcess, tmp_path: Path, blocks: int = 4) -> str:
    """Train two steps of a tiny model: whatever was refused before did no harm. Gives the run."""
    bundle = tmp_path / f"bundle-of-{blocks}"
    write_bundle(bundle, tiny_bundle(blocks=blocks))
    request = TrainRequest(
        bundle=str(bundle), data=written(tmp_path / "good", TEXT), steps=2, threads=1
    )
    result, _ = await train(peer, request)
    assert len(result.losses) == 2
    return result.run
