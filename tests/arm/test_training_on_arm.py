"""An aarch64 machine draws the same parameters and trains every shipped bundle as x86-64 does."""

from __future__ import annotations

import json
import subprocess

import numpy as np
import pytest

from p2ptrain.engine.contract import Array
from p2ptrain.store.bundles import shipped_bundles
from tests import shipped_training
from tests.arm.guest import in_guest

STEPS, BATCH = 3, 1
TOLERANCE = 1e-4
TIMEOUT_S = 300.0


@pytest.fixture(scope="module")
def trained_on_arm(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the guest saved."""
    directory = tmp_path_factory.mktemp("arm")
    out = str(directory / "trained.npz")
    line = in_guest(directory, "-m", "tests.shipped_training", out, str(STEPS), str(BATCH))
    ran = subprocess.run(line, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout) == {
        "machine": "aarch64", "runtime": "onnxruntime", "isa": "neon",
    }  # fmt: skip
    return out


@pytest.mark.parametrize("name", shipped_bundles())
def test_bundle_trains_on_arm_as_on_x86(name: str, trained_on_arm: str) -> None:
    arm = shipped_training.load(trained_on_arm, name)
    here = shipped_training.train(name, steps=STEPS, batch=BATCH)
    drawn, after, arm_drawn, arm_after = map(joined, (here.drawn, here.after, arm.drawn, arm.after))
    assert arm_drawn.tobytes() == drawn.tobytes()
    assert arm.losses[-1] < arm.losses[0]
    np.testing.assert_allclose(arm.losses, here.losses, rtol=TOLERANCE)
    difference = np.abs(arm_after - after).max()
    assert difference <= TOLERANCE * np.abs(after - drawn).max(), "relative to the largest change"


def joined(tensors: dict[str, Array]) -> Array:
    """Every value of the model in one vector."""
    return np.concatenate([tensors[name].reshape(-1) for name in sorted(tensors)])
