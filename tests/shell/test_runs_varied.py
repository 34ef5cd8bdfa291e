"""Runs of a model with two inputs, running values, frozen and tied tensors, over links."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import trio

from p2ptrain.runtime.reports import TrainRequest, TrainResult
from p2ptrain.store.bundles import Bundle
from p2ptrain.store.runs import RunDirectory
from p2ptrain.training.contract import OptimizerChoice
from p2ptrain.training.safetensors import decode_tensors
from tests.bundles import CONTEXT, VOCABULARY
from tests.memory_group import float_bits, memory_group, request_for, until
from tests.varied_bundle import varied_bundle
from tests.weights import some_weights, write_weighted

CHOICE = OptimizerChoice(warmup_steps=2, clip_norm=0.5, peak_learning_rate=0.02)
SECONDS_MAX = 60


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """The varied bundle with given weights for its frozen, one running and its tied tensors."""
    rng = np.random.Generator(np.random.Philox(4))
    tokens = rng.integers(0, VOCABULARY, (60, CONTEXT + 1))
    keep = rng.random((60, CONTEXT)) < 0.8
    np.savez(tmp_path / "data.npz", tokens=tokens[:, :-1], keep=keep, labels=tokens[:, 1:])
    made = varied_bundle()
    given = some_weights(made, ("fixed.w", "start.table", "mix0.mean", "block0.w"))
    return write_weighted(tmp_path / "bundle", made, given)


def request(path: Path, bundle: Bundle, **changes: object) -> TrainRequest:
    data = {} if "resume" in changes else {"data": str(path / "data.npz")}
    return request_for(path, bundle, **{"optimizer": CHOICE, **data, **changes})


async def train(path: Path, members: int, wanted: TrainRequest) -> TrainResult:
    async with memory_group(path, members) as group:
        with trio.fail_after(SECONDS_MAX):
            result = await group[0].train(wanted)
            await until(lambda: all(m.runs.current_run is None for m in group.members.values()))
    return result


async def test_curve_state_and_model_are_equal_on_one_to_seven_stages(
    tmp_path: Path, bundle: Bundle
) -> None:
    results = {
        n: await train(tmp_path, n, request(tmp_path, bundle, stages=n, evaluate_every=2))
        for n in (1, 2, 3, 7)
    }
    models = {model_of(result) for result in results.values()}
    for stages, result in results.items():
        assert result.stages == stages
        assert float_bits(result.losses) == float_bits(results[1].losses)
        assert result.state_digest == results[1].state_digest
        assert result.heldout_last == results[1].heldout_last
    assert len(models) == 1


async def test_running_values_are_saved_and_resumed_with_other_cuts(
    tmp_path: Path, bundle: Bundle
) -> None:
    whole = await train(tmp_path, 2, request(tmp_path, bundle, stages=2, steps=8))
    async with memory_group(tmp_path, 3) as group:
        results: list[TrainResult] = []

        async def conduct() -> None:
            results.append(await group[0].train(request(tmp_path, bundle, stages=3, steps=8)))

        with trio.fail_after(SECONDS_MAX):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(conduct)
                await group.wait(lambda: len(group.reports("step")) >= 3)
                group[0].runs.stop()
            first = results[0]
            assert first.stopped
            assert bundle.directory is not None
            # The run has its own weights: frozen tensors are not in checkpoints.
            (bundle.directory / "weights.safetensors").unlink()
            second = await group[0].train(request(tmp_path, bundle, resume=first.run, stages=2))
            await until(lambda: all(m.runs.current_run is None for m in group.members.values()))
        folder = RunDirectory(group[0].runs_path / first.run).path / "checkpoints"
        stored = decode_tensors(
            (folder / "step-00000008" / "segment-0001.safetensors").read_bytes()
        )
    assert float_bits(first.losses + second.losses) == float_bits(whole.losses)
    assert second.state_digest == whole.state_digest
    assert second.heldout_last == whole.heldout_last
    assert np.abs(stored.tensors["running/mix0.mean"]).max() > 0
    held = {name for path in folder.glob("*/*.safetensors") for name in names_of(path)}
    assert not any("fixed.w" in name for name in held)


def model_of(result: TrainResult) -> bytes:
    return Path(result.model_path or "").read_bytes()


def names_of(path: Path) -> set[str]:
    return set(decode_tensors(path.read_bytes()).tensors)
