"""A run that starts from given weights, with real processes and real TLS."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from p2ptrain.runtime.reports import TrainRequest, TrainResult
from p2ptrain.store.bundles import Bundle, load_bundle
from p2ptrain.training.random import draw_tensor
from tests.e2e.peers import BUNDLE, job, peer_group, train
from tests.weights import write_weighted

STEPS = 3
WEIGHTS_SEED = 11


def short(text: Path, bundle: Path, stages: int) -> TrainRequest:
    return dataclasses.replace(
        job(text, stages=stages), bundle=str(bundle), steps=STEPS, checkpoint_every=0
    )


def weighted(directory: Path) -> Bundle:
    """gpt-nano with every tensor given: what seed 11 would draw."""
    plain = load_bundle(BUNDLE)
    tensors = {
        tensor.name: draw_tensor(plain.manifest, WEIGHTS_SEED, index)
        for index, tensor in enumerate(plain.manifest.tensors)
    }
    return write_weighted(directory, plain, tensors)


async def test_two_peers_train_given_weights_as_one_does(tmp_path: Path, text: Path) -> None:
    bundle = weighted(tmp_path / "weighted")
    assert bundle.directory is not None
    results: list[TrainResult] = []
    async with peer_group(tmp_path, 2) as (home, other):
        for stages in (1, 2):
            result, watched = await train(home, short(text, bundle.directory, stages))
            (plan,) = watched.named("plan")
            assert len(plan["stages"]) == stages
            results.append(result)
        drawn, _ = await train(home, short(text, BUNDLE, 2))
        assert not list(other.member.home.glob("runs/*/weights")), "a complete run cleans up"
    one, two = results
    assert len(one.losses) == STEPS
    assert one.losses == two.losses
    assert (one.state_digest, one.heldout_last) == (two.state_digest, two.heldout_last)
    assert one.losses[0] != drawn.losses[0], "the weights were not used"
