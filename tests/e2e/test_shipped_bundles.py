"""Every shipped bundle trains on stock onnxruntime, and agrees with onnxruntime-training."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Final

import numpy as np
import pytest

from p2ptrain.engine.contract import Array
from p2ptrain.store.bundles import load_bundle, shipped_bundles
from tests import shipped_training
from tests.e2e.peers import ROOT
from tests.shipped_training import Trained, has_running_values

STEPS: Final = 20
BATCH: Final = 4
TOLERANCE: Final = 1e-5
TOLERANCE_NORMED: Final = 1e-3
"""Of parameters where there is BatchNorm, whose means and shifts are sums that nearly cancel:
2.3e-4 was measured, while the losses keep within 2e-6."""
TIMEOUT_S: Final = 120
INTERPRETERS: Final = {"3.11": "P2PTRAIN_STOCK_PYTHON", "3.13": "P2PTRAIN_STOCK_PYTHON_3_13"}


@pytest.fixture(scope="module", params=INTERPRETERS)
def stock(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What an interpreter with stock onnxruntime made of every bundle."""
    variable = INTERPRETERS[request.param]
    python = os.environ.get(variable, "")
    if not Path(python).is_file():
        pytest.skip(f"{variable} names no interpreter with stock onnxruntime: {python!r}")
    out = tmp_path_factory.mktemp("stock") / "trained.npz"
    line = [python, "-m", "tests.shipped_training", str(out), str(STEPS), str(BATCH)]
    ran = subprocess.run(
        line, cwd=ROOT, capture_output=True, text=True, check=False, timeout=TIMEOUT_S
    )
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["runtime"] == "onnxruntime"
    return str(out)


@pytest.fixture(scope="module")
def here() -> dict[str, Trained]:
    """What this interpreter, with onnxruntime-training, made of each bundle so far."""
    return {}


@pytest.mark.stock
@pytest.mark.parametrize("name", shipped_bundles())
def test_bundle_trains_on_stock_onnxruntime(
    name: str, stock: str, here: dict[str, Trained]
) -> None:
    if name not in here:
        here[name] = shipped_training.train(name, steps=STEPS, batch=BATCH)
    ours, theirs = here[name], shipped_training.load(stock, name)
    assert ours.losses[-1] < 0.99 * ours.losses[0]
    assert theirs.losses[-1] < 0.99 * theirs.losses[0]
    assert same_bits(ours.drawn, theirs.drawn)
    np.testing.assert_allclose(theirs.losses, ours.losses, rtol=TOLERANCE)
    normed = has_running_values(load_bundle(shipped_bundles()[name]))
    limit = TOLERANCE_NORMED if normed else TOLERANCE
    assert parameter_error(ours.after, theirs.after) <= limit


def same_bits(ours: dict[str, Array], theirs: dict[str, Array]) -> bool:
    same = [ours[name].tobytes() == theirs[name].tobytes() for name in ours]
    return len(ours) == len(theirs) and all(same)


def parameter_error(ours: dict[str, Array], theirs: dict[str, Array]) -> float:
    """Of tensors as DESIGN section 10 has it for gradients: the largest difference over the
    tensor's largest value, which counts as 1e-4 of the model's largest at least. An attention's
    key bias stays zero but for rounding."""
    sizes = {name: float(np.abs(values).max()) for name, values in ours.items()}
    smallest = 1e-4 * max(sizes.values())
    differences = {name: float(np.abs(ours[name] - theirs[name]).max()) for name in ours}
    return max(differences[name] / max(sizes[name], smallest) for name in ours)
