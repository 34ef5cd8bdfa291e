"""Runs of bundles with weights: each member fetches what its own stage needs, and checks it."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import trio

from p2ptrain.errors import BundleError, P2PTrainError
from p2ptrain.ids import DeviceId
from p2ptrain.runtime.keeping.run_state import RunState
from p2ptrain.runtime.reports import PlanReport, TrainRequest, TrainResult
from p2ptrain.store.bundles import Bundle
from p2ptrain.training.contract import OptimizerChoice
from p2ptrain.training.messages import Abort, BlobRequest, Ready
from tests.bundles import tiny_bundle
from tests.memory_group import (
    MemoryGroup,
    float_bits,
    memory_group,
    request_for,
    tiny_text,
    until,
)
from tests.weights import some_weights, write_weighted

CLIPPING = OptimizerChoice(warmup_steps=2, clip_norm=0.05, peak_learning_rate=0.02)
NAMES = ("embed.table", *(f"block{i}.w" for i in range(4)), "block2.b", "head.head")
SECONDS_MAX = 60


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """A weighted bundle where `request_for` looks for it, and a text."""
    (tmp_path / "data.txt").write_bytes(tiny_text())
    tiny = tiny_bundle()
    return write_weighted(tmp_path / "bundle", tiny, some_weights(tiny, NAMES))


def request(path: Path, bundle: Bundle, **changes: object) -> TrainRequest:
    return request_for(path, bundle, **{"optimizer": CLIPPING, **changes})


async def wait_idle(group: MemoryGroup) -> None:
    def idle() -> bool:
        alive = [member for member in group.members.values() if member.lives]
        return all(member.runs.current_run is None for member in alive)

    await until(idle)


async def train(path: Path, members: int, wanted: TrainRequest) -> TrainResult:
    async with memory_group(path, members) as group:
        with trio.fail_after(SECONDS_MAX):
            result = await group[0].train(wanted)
            await wait_idle(group)
    return result


def asked(group: MemoryGroup, bundle: Bundle) -> dict[DeviceId, set[str]]:
    """Which tensors each member has asked its home peer for; none twice."""
    names = {tensor.digest: tensor.name for tensor in bundle.manifest.tensors if tensor.digest}
    found: dict[DeviceId, set[str]] = {}
    for sender, message in zip(group[0].senders, group[0].received, strict=True):
        if isinstance(message, BlobRequest) and message.digest in names:
            name = names[message.digest]
            assert name not in found.setdefault(sender, set()), f"{name} was fetched twice"
            found[sender].add(name)
    return found


async def test_run_starts_from_the_weights_on_any_number_of_stages(
    tmp_path: Path, bundle: Bundle
) -> None:
    results = [
        await train(tmp_path, n, request(tmp_path, bundle, stages=n, steps=3)) for n in (1, 2, 3)
    ]
    assert len({float_bits(result.losses) for result in results}) == 1
    assert len({result.state_digest for result in results}) == 1
    drawn_path = tmp_path / "drawn"
    drawn_path.mkdir()
    drawn = await train(drawn_path, 1, request(drawn_path, tiny_bundle(), stages=1, steps=3))
    assert drawn.losses[0] != results[0].losses[0]


async def test_member_fetches_the_tensors_of_its_own_stage_only(
    tmp_path: Path, bundle: Bundle
) -> None:
    async with memory_group(tmp_path, 3) as group:
        with trio.fail_after(SECONDS_MAX):
            result = await group[0].train(request(tmp_path, bundle, stages=3, steps=2))
            await wait_idle(group)
        (plan,) = group.reports("plan")
        assert isinstance(plan, PlanReport)
        fetched = asked(group, bundle)
        for stage in plan.stages:
            wanted = {
                tensor.name
                for segment in range(stage.first_segment, stage.last_segment + 1)
                for tensor in bundle.manifest.segment_tensors(segment)
                if tensor.digest is not None
            }
            expected = wanted if stage.device != group[0].device else set()
            assert fetched.get(stage.device, set()) == expected
        assert sum(len(names) for names in fetched.values()) > 0
        # A complete run is resumed by nobody: what was fetched for it is gone.
        for index in (1, 2):
            assert not (group[index].runs_path / result.run / "weights").exists()


async def test_stopped_run_keeps_what_was_fetched_and_goes_on_without_the_original(
    tmp_path: Path, bundle: Bundle
) -> None:
    whole = await train(tmp_path, 2, request(tmp_path, bundle, stages=2))
    async with memory_group(tmp_path, 3) as group:
        first: list[TrainResult] = []

        async def conduct() -> None:
            first.append(await group[0].train(request(tmp_path, bundle, stages=3, steps=6)))

        with trio.fail_after(SECONDS_MAX):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(conduct)
                await group.wait(lambda: len(group.reports("step")) >= 2)
                group[0].runs.stop()
            await wait_idle(group)
            (run,) = (path.name for path in group[0].runs_path.iterdir() if path.name != whole.run)
            kept = {path.name for path in (group[1].runs_path / run / "weights").iterdir()}
            assert bundle.directory is not None
            (bundle.directory / "weights.safetensors").unlink()
            group[0].senders.clear()
            group[0].received.clear()
            # Frozen tensors come from the weights again, with other cuts.
            again = await group[0].train(request(tmp_path, bundle, resume=run, stages=2))
            await wait_idle(group)
    assert first[0].losses + again.losses == whole.losses
    assert again.state_digest == whole.state_digest
    segments = {f"segment-{index:04d}.safetensors": index for index in range(6)}
    had = {
        tensor.name for name in kept for tensor in bundle.manifest.segment_tensors(segments[name])
    }
    assert had
    assert not asked(group, bundle).get(group[1].device, set()) & had


async def test_damaged_weights_train_nothing(tmp_path: Path, bundle: Bundle) -> None:
    assert bundle.directory is not None
    path = bundle.directory / "weights.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 0x40  # in the last tensor: the head's
    path.write_bytes(content)
    async with memory_group(tmp_path, 2) as group:
        with trio.fail_after(SECONDS_MAX):
            for stages in (1, 2):
                with pytest.raises(Exception, match=r"damaged|does not match its digest"):
                    await group[0].train(request(tmp_path, bundle, stages=stages, steps=2))
                await wait_idle(group)
        assert not group.reports("step")


async def test_missing_weights_are_noticed_before_anybody_is_asked(
    tmp_path: Path, bundle: Bundle
) -> None:
    assert bundle.directory is not None
    (bundle.directory / "weights.safetensors").unlink()
    async with memory_group(tmp_path, 2) as group:
        with trio.fail_after(SECONDS_MAX), pytest.raises(BundleError, match="lacks weights"):
            await group[0].train(request(tmp_path, bundle, stages=2))
        assert group[1].received == []


async def test_disk_that_refuses_the_weights_ends_the_session(
    tmp_path: Path, bundle: Bundle
) -> None:
    async with memory_group(tmp_path, 2) as group:
        group[1].runs_path.write_text("not a folder")
        with trio.fail_after(SECONDS_MAX):
            with pytest.raises(P2PTrainError, match=r"cannot be (stored|written)"):
                await group[0].train(request(tmp_path, bundle, stages=2))
            await wait_idle(group)
        assert not group.broken
        group[1].runs_path.unlink()
        with trio.fail_after(SECONDS_MAX):
            result = await group[0].train(request(tmp_path, bundle, stages=2, steps=1))
    assert np.isfinite(result.losses).all()


async def test_weights_are_there_before_the_home_peer_s_own_disk_is(
    tmp_path: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A member that is ahead of its home peer waits for nothing that is not offered yet."""
    open_disk, opened = RunState.open_disk, threading.Event()

    def slowly(state: RunState) -> None:
        if state.services.host == "peer-0":
            opened.wait(SECONDS_MAX)
        open_disk(state)

    monkeypatch.setattr(RunState, "open_disk", slowly)
    async with memory_group(tmp_path, 2) as group:
        results: list[TrainResult] = []

        async def conduct() -> None:
            results.append(await group[0].train(request(tmp_path, bundle, stages=2, steps=1)))

        def decided() -> bool:
            return any(isinstance(m, Ready | Abort) for m in group[0].received)

        with trio.fail_after(SECONDS_MAX):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(conduct)
                try:
                    await group.wait(decided)
                finally:
                    opened.set()
            await wait_idle(group)
    assert results[0].steps == 1
