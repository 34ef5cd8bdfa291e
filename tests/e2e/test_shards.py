"""Models that several real peers compute together, over TLS: tensor and sequence parallelism."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import pytest
import trio

from p2ptrain.bundle.shard_traffic import shard_traffic
from p2ptrain.bundle.sharding import MODES
from p2ptrain.runtime.reports import TrainRequest, TrainResult
from p2ptrain.store.bundles import load_bundle, shipped_bundles
from p2ptrain.training.contract import OptimizerChoice
from tests.bundles import write_bundle
from tests.e2e.peers import Member, PeerProcess, Watched, peer_group, train
from tests.shipped_training import short_context

SGD: Final = OptimizerChoice(
    name="sgd", peak_learning_rate=0.05, warmup_steps=2, clip_norm=0.5, weight_decay=0.0
)
STEPS: Final = 20
TOLERANCE: Final = 1e-5
Plan = tuple[str, tuple[int, ...]]
"""Mode, and the shares of peer-1, peer-2 and so on."""


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Short texts with as many labels as bert-mini has classes, of which most have one."""
    classes = [*range(20), *[0] * 380]
    rows = [{"text": f"text {i}", "label": f"class {n}"} for i, n in enumerate(classes)]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def job(name: str, data: Path, folder: Path) -> TrainRequest:
    """Twenty steps of a shipped model on samples of 16 tokens, with its dropout."""
    path = folder / name
    write_bundle(path, short_context(load_bundle(shipped_bundles()[name])))
    return TrainRequest(
        bundle=str(path), data=str(data), steps=STEPS, microbatches=1, microbatch_size=2,
        threads=1, heldout_microbatches=1, optimizer=SGD,
    )  # fmt: skip


def shared(request: TrainRequest, mode: str, weights: Sequence[int]) -> TrainRequest:
    """The same, computed by the group's first peers together."""
    return dataclasses.replace(request, plan=plan_text(request, len(weights), mode, weights))


def alone(request: TrainRequest) -> TrainRequest:
    """The same on the home peer."""
    return dataclasses.replace(request, plan=plan_text(request, 1))


def plan_text(
    request: TrainRequest, peers: int, mode: str = "", weights: Sequence[int] = ()
) -> str:
    names = [f"peer-{rank + 1}" for rank in range(peers)]
    segments = len(load_bundle(Path(request.bundle)).manifest.segments)
    table = f"[[stage]]\ndevices = {names}\nsegments = {segments}\n"
    return table + (f'split = "{mode}"\nweights = {list(weights)}\n' if mode else "")


async def assert_agree(home: PeerProcess, request: TrainRequest, plans: Sequence[Plan]) -> None:
    """Every plan's losses are those of one peer, within the tolerance of DESIGN section 10."""
    single, _ = await train(home, alone(request))
    assert single.heldout_last < single.heldout_first
    for mode, weights in plans:
        found, watched = await train(home, shared(request, mode, weights))
        (plan,) = watched.named("plan")
        assert [stage["split"] for stage in plan["stages"]] == [mode] * len(weights)
        assert found.losses == pytest.approx(single.losses, rel=TOLERANCE, abs=0.0)
        assert found.heldout_last == pytest.approx(single.heldout_last, rel=TOLERANCE, abs=0.0)


@pytest.mark.parametrize(
    ("name", "plans"),
    [
        ("gpt-nano", (("tensor", (2, 1)), ("sequence", (2, 1, 1)))),
        ("llama-nano", (("tensor", (1, 1, 1)), ("sequence", (4, 3)))),
        ("bert-mini", (("tensor", (2, 1, 1)), ("sequence", (1, 1)))),
    ],
)
async def test_shards_agree_with_one_peer(
    name: str, plans: tuple[Plan, ...], tmp_path: Path, text: Path, texts: Path
) -> None:
    data = texts if name == "bert-mini" else text
    async with peer_group(tmp_path, 3) as (home, *_):
        await assert_agree(home, job(name, data, tmp_path), plans)


async def test_the_same_plan_gives_the_same_bits(tmp_path: Path, text: Path) -> None:
    request = job("gpt-nano", text, tmp_path)
    short = dataclasses.replace(request, steps=3)
    async with peer_group(tmp_path, 3) as peers:
        home = peers[0]
        for mode, weights in (("tensor", (3, 2, 1)), ("sequence", (3, 2, 1))):
            first, _ = await train(home, shared(short, mode, weights))
            again, _ = await train(home, shared(short, mode, weights))
            assert again.losses == first.losses
            assert again.state_digest == first.state_digest
        await assert_recovers(peers, request)


async def assert_recovers(peers: tuple[PeerProcess, ...], request: TrainRequest) -> None:
    """A shard's owner is killed: committed steps keep their bits, and the others go on."""
    home, watched = peers[0], Watched()
    asked = shared(dataclasses.replace(request, replicate_every=4), "tensor", (3, 2, 1))
    undisturbed, _ = await train(home, asked)
    results: list[TrainResult] = []

    async def conduct() -> None:
        result, _ = await train(home, asked, watched)
        results.append(result)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(conduct)
        await watched.wait_step(6)
        reached = watched.reached
        await peers[2].kill()
    (result,) = results
    assert 6 <= reached < request.steps
    assert result.losses[:reached] == undisturbed.losses[:reached]
    assert result.losses == pytest.approx(undisturbed.losses, rel=TOLERANCE, abs=0.0)


async def test_bytes_at_the_sockets_are_the_predicted_ones(tmp_path: Path, text: Path) -> None:
    """Frames of the full context, whose headers weigh little."""
    ranks, steps, size = 3, 2, 4
    path = shipped_bundles()["gpt-nano"]
    asked = dataclasses.replace(
        job("gpt-nano", text, tmp_path), bundle=str(path), steps=steps, microbatch_size=size
    )
    results: dict[str, TrainResult] = {}
    async with peer_group(tmp_path, ranks) as (home, *_):
        for mode in MODES:
            results[mode], _ = await train(home, shared(asked, mode, (1,) * ranks))
    for mode, result in results.items():
        traffic = shard_traffic(load_bundle(path).manifest, mode, batch=size)
        costs = [cost for each in traffic for cost in (*each.forward, *each.backward)]
        predicted = asked.microbatches * sum(cost.ring_bytes(ranks) for cost in costs)
        predicted += sum(2 * (ranks - 1) * each.step_bytes // ranks for each in traffic)
        sent = Counter({report.sender: 0 for report in result.traffic})
        for report in result.traffic:
            sent[report.sender] += report.bytes_sent if report.kind in ("reduce", "gather") else 0
        assert len(sent) == ranks
        assert list(sent.values()) == pytest.approx([steps * predicted] * ranks, rel=0.02), mode


@pytest.mark.stock
async def test_both_runtimes_share_a_model(tmp_path: Path, text: Path, stock_python: str) -> None:
    def second_is_stock(member: Member) -> Member:
        is_second = member.name == "peer-2"
        return dataclasses.replace(member, python=stock_python) if is_second else member

    async with peer_group(tmp_path, 2, change=second_is_stock) as (home, _):
        runtimes = {m.name: m.runtime.split()[0] for m in (await home.status()).members}
        assert runtimes == {"peer-1": "onnxruntime-training", "peer-2": "onnxruntime"}
        request = job("gpt-nano", text, tmp_path)
        await assert_agree(home, request, (("tensor", (1, 1)), ("sequence", (4, 3))))
