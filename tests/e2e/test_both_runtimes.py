"""Both runtimes: they train together, and stock onnxruntime loads what was trained."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Final

import pytest
import trio

from p2ptrain.training.contract import OptimizerChoice
from tests.e2e.peers import Member, job, peer_group, train

SGD: Final = OptimizerChoice(name="sgd", peak_learning_rate=0.1, warmup_steps=4)
ADAMW: Final = job(Path()).optimizer
STEPS: Final = 10
LOGITS: Final = """
import json, sys
import numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
(tokens,) = session.get_inputs()
text = numpy.frombuffer(sys.argv[2].encode(), numpy.uint8).astype(numpy.int64)[None]
(logits,) = session.run(None, {tokens.name: text})
print(json.dumps({
    "training": hasattr(onnxruntime, "training"), "shape": logits.shape,
    "finite": bool(numpy.isfinite(logits).all()), "spread": float(logits.std()),
}))
"""


@pytest.mark.stock
@pytest.mark.parametrize(
    ("optimizer", "tolerance"), [(SGD, 1e-5), (ADAMW, 1e-4)], ids=["sgd", "adamw"]
)
async def test_peers_with_both_runtimes_train_together_within_tolerance(
    optimizer: OptimizerChoice, tolerance: float, tmp_path: Path, text: Path, stock_python: str
) -> None:
    """Losses of two runtimes beside those of one peer.

    The 1e-5 of DESIGN section 10 holds with SGD (worst of ten steps: 8e-8). It does not hold at
    every step with AdamW, the default: single steps, with and without dropout, were seen to differ
    by up to 2.2e-5 while their neighbours agree within 1e-7. AdamW divides by the size of the
    gradient, which may turn rounding into a step; which parameters do so is not known.
    """

    def second_is_stock(member: Member) -> Member:
        return (
            dataclasses.replace(member, python=stock_python) if member.name == "peer-2" else member
        )

    together = dataclasses.replace(job(text, stages=2), steps=STEPS, optimizer=optimizer)
    alone = dataclasses.replace(together, stages=1)
    async with peer_group(tmp_path, 2, change=second_is_stock) as (home, _):
        members = (await home.status()).members
        runtimes = {member.name: member.runtime.split()[0] for member in members}
        assert runtimes == {"peer-1": "onnxruntime-training", "peer-2": "onnxruntime"}
        mixed, watched = await train(home, together)
        single, watched_alone = await train(home, alone)
    (plan,), (plan_alone,) = watched.named("plan"), watched_alone.named("plan")
    assert plan["exactness"] == "within tolerance: 2 different runtime builds take part"
    assert plan_alone["exactness"].startswith("exact")
    assert (mixed.stages, single.stages) == (2, 1)
    assert single.losses[-1] < single.losses[0]
    assert mixed.losses == pytest.approx(single.losses, rel=tolerance, abs=0.0)
    assert mixed.heldout_last == pytest.approx(single.heldout_last, rel=tolerance, abs=0.0)


@pytest.mark.stock
async def test_trained_model_runs_in_stock_onnxruntime(
    tmp_path: Path, text: Path, stock_python: str
) -> None:
    out = tmp_path / "trained.onnx"
    short = dataclasses.replace(job(text, stages=2), steps=3, out=str(out))
    async with peer_group(tmp_path, 2) as (home, _):
        result, _ = await train(home, short)
    assert result.model_path == str(out)
    assert json.loads(await run_stock(stock_python, out, "The function")) == {
        "training": False, "shape": [1, 12, 256], "finite": True,
        "spread": pytest.approx(0.5, abs=0.45),
    }  # fmt: skip


async def run_stock(python: str, model: Path, prompt: str) -> str:
    """What the logits of a prompt look like to a program that knows nothing of p2ptrain."""
    with trio.fail_after(60):
        ended = await trio.run_process(
            [python, "-I", "-c", LOGITS, str(model), prompt],
            capture_stdout=True,
            env={**os.environ, "ORT_DISABLE_TELEMETRY": "1"},
        )
    return ended.stdout.decode()
