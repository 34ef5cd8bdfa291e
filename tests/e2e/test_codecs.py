"""Boundary tensors as bf16 and int8 between real processes: fewer bytes, nearly the same curve."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from p2ptrain.runtime.reports import TrainResult
from tests.e2e.peers import job, peer_group, train


async def test_codecs_send_fewer_bytes_and_say_what_they_cost(tmp_path: Path, text: Path) -> None:
    results: dict[str, TrainResult] = {}
    async with peer_group(tmp_path, 2) as (home, _):
        for codec in ("fp32", "bf16", "int8"):
            # States go whole, and with what int8 still owes: no more of them than must be.
            request = dataclasses.replace(
                job(text, stages=2), codec=codec, replicate_every=100, checkpoint_every=100
            )
            results[codec], watched = await train(home, request)
            (plan,) = watched.named("plan")
            promise = "exact for one placement" if codec != "fp32" else "exact: "
            assert plan["exactness"].startswith(promise)
    for result in results.values():
        prediction = result.prediction
        assert prediction is not None
        assert prediction.timed_steps > 0
        assert prediction.measured_boundary_bytes == pytest.approx(
            prediction.predicted_boundary_bytes, rel=0.02
        )
    sent = {
        codec: sum(peer.bytes_sent for peer in result.energy.peers)
        for codec, result in results.items()
    }
    assert sent["int8"] < sent["bf16"] < sent["fp32"]
    for codec in ("bf16", "int8"):
        assert results[codec].losses != results["fp32"].losses
        assert results[codec].losses == pytest.approx(results["fp32"].losses, rel=0.05)
