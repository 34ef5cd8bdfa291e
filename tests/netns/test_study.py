"""One column of the parallelism study, with real peers: small model, two peers, 1 Gbit/s."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from p2ptrain.planner.kinds import RUNTIME_KINDS
from tools import parallelism_study
from tools.throttle.group import require_permitted
from tools.wifi_emulator.namespaces import Unavailable


def test_one_column_of_the_study(permitted: None, tmp_path: Path) -> None:
    try:
        require_permitted()
    except Unavailable as error:
        pytest.skip(f"no peer can be throttled here: {error}")
    assert parallelism_study.main(["--short", "--out", str(tmp_path)]) == 0
    kept = json.loads((tmp_path / "results.json").read_text())["cells"]
    outcomes = {each["key"].split("/")[1]: each for each in kept}
    assert outcomes.keys() == {"one device", "pipeline", "data", "tensor", "sequence"}
    for kind, each in outcomes.items():
        wanted = "ran" if kind in RUNTIME_KINDS else "not run in this version"
        assert each["outcome"] == wanted, each
        if wanted == "ran":
            assert each["seconds_per_sample"] > 0
            assert sum(each["phase_joules"].values()) == pytest.approx(each["joules_per_sample"])
            assert (each["bytes_per_sample"] > 0) == (kind != "one device")
            assert each["peak_bytes"] > 50 << 20
    assert (tmp_path / "gpt-nano-joules.svg").exists()
