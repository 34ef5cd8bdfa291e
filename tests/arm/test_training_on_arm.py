"""An aarch64 machine draws the same parameters and trains every shipped bundle as x86-64 does."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from p2ptrain.engine.contract import Array
from p2ptrain.store.bundles import load_bundle, shipped_bundles
from tests.arm import small_training
from tests.arm.guest import in_guest

TOLERANCE = 1e-4
TIMEOUT_S = 300.0


@pytest.fixture(scope="module")
def trained_on_arm(tmp_path_factory: pytest.TempPathFactory, text: Path) -> dict[str, Array]:
    """What the guest saved; bundle/losses, bundle/drawn and bundle/trained."""
    directory = text.parent
    out = directory / "trained.npz"
    line = in_guest(directory, "-m", "tests.arm.small_training", str(text), str(out))
    ran = subprocess.run(line, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout) == {
        "machine": "aarch64", "runtime": "onnxruntime", "isa": "neon",
    }  # fmt: skip
    with np.load(out) as saved:
        return dict(saved)


@pytest.mark.parametrize("name", shipped_bundles())
def test_bundle_trains_on_arm_as_on_x86(
    name: str, text: Path, trained_on_arm: dict[str, Array]
) -> None:
    arm = {what: trained_on_arm[f"{name}/{what}"] for what in ("losses", "drawn", "trained")}
    tokens = np.frombuffer(text.read_bytes(), np.uint8)
    here = small_training.train(load_bundle(shipped_bundles()[name]), tokens)
    assert arm["drawn"].tobytes() == here["drawn"].tobytes()
    assert arm["losses"][-1] < arm["losses"][0]
    np.testing.assert_allclose(arm["losses"], here["losses"], rtol=TOLERANCE)
    change = here["trained"] - here["drawn"]
    difference = np.abs(arm["trained"] - here["trained"]).max()
    assert difference <= TOLERANCE * np.abs(change).max(), "relative to the largest change"
