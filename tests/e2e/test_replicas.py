"""Stages that several peers share by microbatches, with real processes and real TLS."""

from __future__ import annotations

import dataclasses
import json
import signal
from pathlib import Path
from typing import Any, Final

import pytest
import trio

from p2ptrain.planner.traffic import all_reduce_bytes
from p2ptrain.runtime.reports import TrainRequest, TrainResult
from p2ptrain.store.bundles import load_bundle, shipped_bundles
from p2ptrain.training.contract import OptimizerChoice
from tests.e2e.peers import PeerProcess, Watched, job, peer_group, train
from tests.replicated import TOLERANCE, Layout, assert_near, deviation, parameters, plan_text

SGD: Final = OptimizerChoice(name="sgd", peak_learning_rate=0.05, warmup_steps=4, clip_norm=1.0)
"""Not AdamW: it divides by the size of the gradient, which makes steps of rounding where the true
gradient is zero (a key's bias)."""
BYTES_TOLERANCE: Final = 0.02
GPT: Final = load_bundle(shipped_bundles()["gpt-nano"]).manifest
BERT: Final = load_bundle(shipped_bundles()["bert-mini"]).manifest


def texts(folder: Path) -> Path:
    """Labelled ones, of twenty classes."""
    path = folder / "texts.jsonl"
    rows = [
        {"text": f"module number {index % 20} does what it is called for {index} times",
         "label": f"module{index % 20}"}
        for index in range(60)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


async def run(
    home: PeerProcess, asked: TrainRequest, layout: Layout, path: Path
) -> tuple[TrainResult, dict[str, Any]]:  # Any: JSON
    """What came of it, and its plan."""
    tensors = str(path / "trained.safetensors")
    plan = plan_text(layout, name="peer-{}")
    wanted = dataclasses.replace(asked, plan=plan, safetensors=tensors, optimizer=SGD)
    result, watched = await train(home, wanted)
    (report,) = watched.named("plan")
    return result, report


def reduced_bytes(result: TrainResult) -> dict[str, float]:
    """Per step, what every peer sent to add up gradients: encrypted, at the socket."""
    found: dict[str, float] = {}
    for each in result.traffic:
        if each.kind == "reduce":
            found[each.sender] = found.get(each.sender, 0.0) + each.bytes_sent / len(result.losses)
    return found


async def test_gpt_on_replicas_agrees_with_one_peer_and_sends_what_is_predicted(
    tmp_path: Path, text: Path
) -> None:
    count, trained = len(GPT.segments), tmp_path / "trained.safetensors"
    layouts: list[Layout] = [
        [([1, 2], count, [3, 1])],
        [([1, 2], 4, [1, 1]), ([3, 4], count - 4, [1, 1])],
    ]
    async with peer_group(tmp_path, 4) as (home, *_):
        one, _ = await run(home, job(text), [([1], count, [1])], tmp_path)
        alone = parameters(trained)
        for layout in layouts:
            shared, plan = await run(home, job(text), layout, tmp_path)
            assert_near(shared, one)
            assert deviation(parameters(trained), alone) < TOLERANCE
            assert plan["exactness"].startswith("within tolerance: several peers may share")
            assert_predicted(shared, plan["stages"])
        again, _ = await run(home, job(text), layouts[-1], tmp_path)
        assert (again.losses, again.state_digest) == (shared.losses, shared.state_digest)


def assert_predicted(result: TrainResult, stages: list[dict[str, Any]]) -> None:  # Any: JSON
    """Every peer sends 2 (n - 1) / n of its stage's gradients in each step."""
    sent = reduced_bytes(result)
    assert sent.keys() == {own["device"] for own in stages}
    for own in stages:
        peers = [each for each in stages if each["stage"] == own["stage"]]
        elements = trained_elements(own["first_segment"], own["last_segment"])
        wanted = all_reduce_bytes(4 * elements, len(peers))
        assert sent[own["device"]] == pytest.approx(wanted, rel=BYTES_TOLERANCE)


def trained_elements(first: int, last: int) -> int:
    tensors = (t for index in range(first, last + 1) for t in GPT.segment_tensors(index))
    return sum(t.elements for t in tensors if t.binding == "trainable")


async def test_bert_on_mixed_stages_agrees_with_one_peer(tmp_path: Path) -> None:
    count, trained = len(BERT.segments), tmp_path / "trained.safetensors"
    asked = dataclasses.replace(
        job(texts(tmp_path)), bundle=str(shipped_bundles()["bert-mini"]), microbatch_size=2
    )
    async with peer_group(tmp_path, 3) as (home, *_):
        one, _ = await run(home, asked, [([1], count, [1])], tmp_path)
        alone = parameters(trained)
        layout: Layout = [([2, 1], count - 2, [2, 1]), ([3], 2, [1])]
        shared, _ = await run(home, asked, layout, tmp_path)
    assert_near(shared, one)
    assert deviation(parameters(trained), alone) < TOLERANCE


async def test_stage_beside_replicas_is_killed_and_replayed_from_the_logs_of_both(
    tmp_path: Path, text: Path
) -> None:
    layout: Layout = [([1, 2], 6, [2, 1]), ([3], len(GPT.segments) - 6, [1])]
    asked = dataclasses.replace(
        job(text), plan=plan_text(layout), optimizer=SGD, replicate_every=2, steps=30
    )
    async with peer_group(tmp_path, 3) as (home, _, lost):
        whole, _ = await train(home, asked)
        watched, results = Watched(), list[TrainResult]()

        async def conduct() -> None:
            result, _ = await train(home, asked, watched)
            results.append(result)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(conduct)
            await watched.wait_step(8)
            lost.send(signal.SIGKILL)
            reached = watched.reached
    (result,) = results
    assert result.losses[:reached] == whole.losses[:reached]
    assert_near(result, whole)
