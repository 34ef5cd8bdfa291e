"""What the benchmark reads and writes: sessions, settings for torch, processes, the report."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from p2ptrain.bundle.manifest import Manifest
from p2ptrain.bundle.reading import parse_manifest
from p2ptrain.errors import PeerLost
from p2ptrain.ids import DeviceId, RunId
from p2ptrain.planner.profile import KindCost
from p2ptrain.runtime.reports import (
    EnergyReport,
    PlanReport,
    StageReport,
    StepReport,
    TrainResult,
)
from p2ptrain.training.random import draw_parameter
from p2ptrain.wire.codec import to_plain
from tools.bench.peer_contender import session
from tools.bench.processes import parse_peak_bytes
from tools.bench.ratios import TORCH, TORCH_1F1B, TORCH_ZERO_BUBBLE, Turn, ours
from tools.bench.report import make_report, markdown, print_report
from tools.bench.rounds import Measured, Settings, turn_order
from tools.bench.torch_contender import pipeline_choices, zero_bubble_choices
from tools.bench.workload import ModelShape, Texts, Workload, torch_settings, write_torch_inputs
from tools.bench_pipeline import shown_arguments

ROOT = Path(__file__).resolve().parents[2]
RUN = RunId("0" * 32)
STEPS = 3
DELAYED = ours(2, 8, "eager-zb-h1")
NANO = ModelShape(layers=4, width=192, vocabulary=256)


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    folder = ROOT / "onnx_models" / "gpt-nano"
    return parse_manifest((folder / "manifest.json").read_bytes())


def plan_report(manifest: Manifest, *cuts: int) -> PlanReport:
    ends = [*cuts, len(manifest.segments)]
    starts = [0, *cuts]
    stages = tuple(
        StageReport(
            device=DeviceId(f"{index:064x}"),
            name=f"peer-{index}",
            stage=index,
            first_segment=start,
            last_segment=end - 1,
            segments=tuple(segment.name for segment in manifest.segments[start:end]),
            parameters=1,
            memory_bytes=1,
            share=0.5,
        )
        for index, (start, end) in enumerate(zip(starts, ends, strict=True))
    )
    return PlanReport(
        run=RUN,
        bundle=manifest.name,
        plan="p",
        view=1,
        schedule="1f1b",
        stages=stages,
        predicted_step_s=1.0,
        exactness="exact",
        reasons=(),
    )


def step_event(step: int) -> tuple[str, dict[str, Any]]:  # Any: JSON values
    report = StepReport(
        step=step,
        steps=STEPS,
        loss=8.0 - step,
        learning_rate=1e-3,
        gradient_norm=1.0,
        seconds=float(step),
        samples_per_s=1.0,
        joules_per_sample=None,
        activities={},
    )
    return "step", to_plain(report)


def result() -> TrainResult:
    energy = EnergyReport(peers=(), marginal_joules=0.0, total_joules=0.0, joules_per_sample=None)
    return TrainResult(
        run=RUN,
        bundle="b",
        peers=1,
        stages=1,
        first_step=0,
        steps=STEPS,
        losses=(),
        heldout_first=8.0,
        heldout_last=7.0,
        seconds=1.0,
        samples_per_s=1.0,
        tokens_per_s=1.0,
        bytes_sent=0,
        traffic=(),
        energy=energy,
        state_digest="d",
        model_path=None,
        stopped=False,
    )


def test_session_takes_times_and_losses_from_the_step_events(manifest: Manifest) -> None:
    plan = ("plan", to_plain(plan_report(manifest)))
    note = ("note", {"text": "x"})
    events = [plan, note, *(step_event(step) for step in (1, 2, 3))]
    found = session(events, result(), steps=STEPS)
    assert found.turn == Turn(seconds=(1.0, 2.0, 3.0), losses=(7.0, 6.0, 5.0))
    assert found.plan == plan_report(manifest)


@pytest.mark.parametrize("steps", [(1, 3), (1, 2), (2, 1, 3)])
def test_session_with_a_lost_step_is_refused(manifest: Manifest, steps: tuple[int, ...]) -> None:
    events = [("plan", to_plain(plan_report(manifest))), *(step_event(step) for step in steps)]
    with pytest.raises(PeerLost, match="3 steps"):
        session(events, result(), steps=STEPS)


def test_session_without_a_plan_is_refused() -> None:
    with pytest.raises(PeerLost, match="0 plans"):
        session([step_event(step) for step in (1, 2, 3)], result(), steps=STEPS)


def test_peak_is_read_in_bytes() -> None:
    status = "Name:\tpython\nVmPeak:\t  900 kB\nVmHWM:\t  119044 kB\nVmRSS:\t  80 kB\n"
    assert parse_peak_bytes(status) == 119044 * 1024
    assert parse_peak_bytes("Name:\tpython\n") is None


def test_turn_order_rotates() -> None:
    names = ["a", "b", "c"]
    assert [turn_order(names, number)[0] for number in range(4)] == ["a", "b", "c", "a"]
    assert sorted(turn_order(names, 2)) == names


def test_torch_is_cut_at_the_middle_or_half_a_block_later() -> None:
    choices = pipeline_choices("fused", 6)
    assert {choice.cuts for choice in choices} == {(7,), (8,)}
    assert {choice.pipeline for choice in choices} == {"own", "torch"}
    assert all(choice.ranks == 2 and "fused" in str(choice) for choice in choices)


def test_torch_has_four_parts_for_its_zero_bubble_schedules() -> None:
    choices = zero_bubble_choices("plain", 6)
    assert {choice.pipeline for choice in choices} == {"v", "interleaved"}
    for choice in choices:
        assert choice.ranks == 2
        assert 0 < choice.cuts[0] < choice.cuts[1] < choice.cuts[2] < 2 + 2 * 6
    assert "ScheduleZBVZeroBubble, plain attention, cut after 5 and 8 and 12 links" in map(
        str, choices
    )


def test_torch_inputs_are_what_our_peers_draw(manifest: Manifest, tmp_path: Path) -> None:
    text = tmp_path / "train.txt"
    text.write_bytes(bytes(range(256)) * 8)
    workload = Workload(model=NANO, microbatches=2, microbatch_size=3, steps=1, warm_up=1, seed=5)
    write_torch_inputs(tmp_path, workload, manifest, Texts(train=text, heldout=text))
    with np.load(tmp_path / "initial.npz") as initial:
        assert set(initial.files) == {tensor.name for tensor in manifest.tensors}
        last = len(manifest.tensors) - 1
        tensor = manifest.tensors[last]
        assert np.array_equal(initial[tensor.name], draw_parameter(5, tensor, last))
    with np.load(tmp_path / "batches.npz") as batches:
        assert batches["inputs"].shape == (2, 2, 3, 128)
        assert np.array_equal(batches["inputs"][..., 1:], batches["labels"][..., :-1])
    document = json.loads((tmp_path / "workload.json").read_text())
    assert document["learning_rates"] == [pytest.approx(3e-4)] * 2
    assert document["model"]["layers"] == 4


def test_torch_decays_what_we_decay(manifest: Manifest) -> None:
    undecayed = torch_settings(Workload(), manifest)["undecayed"]
    assert isinstance(undecayed, list)
    assert "blocks.0.attention.norm.weight" in undecayed
    assert "blocks.0.attention.query.weight" not in undecayed


def test_command_shows_no_places_of_this_machine() -> None:
    arguments = ["--rounds", "5", "--torch-python", "/x/python", "--cache=/y", "--json"]
    assert shown_arguments(arguments) == ["--rounds", "5", "--json"]


def measured(manifest: Manifest, one_s: float) -> Measured:
    """Two rounds in which two peers take 1 s per step, one peer `one_s`, torch 2 s and 1.5 s."""
    names = {
        TORCH: 2.0, TORCH_1F1B: 1.5, TORCH_ZERO_BUBBLE: 1.4, ours(1, 8): one_s, ours(2, 8): 1.0,
        DELAYED: 0.9,
    }  # fmt: skip
    turns = {
        name: [Turn(seconds=(9.0, seconds), losses=(8.0, 7.0))] * 2
        for name, seconds in names.items()
    }
    cost = KindCost(
        forward_ns=10**6, backward_ns=2 * 10**6, cotangents_ns=10**6, gradients_ns=10**6
    )
    costs = dict.fromkeys(manifest.kinds, cost)
    return Measured(
        manifest=manifest,
        turns=turns,
        peaks_bytes={name: [(2**29, None), (2**30, None)] for name in names},
        plans={
            ours(1, 8): [plan_report(manifest)] * 2,
            ours(2, 8): [plan_report(manifest, 5)] * 2,
            DELAYED: [dataclasses.replace(plan_report(manifest, 5), schedule="eager-zb-h1")] * 2,
        },
        digests={ours(1, 8): {"d"}, ours(2, 8): {"d"}, DELAYED: {"d"}},
        costs=[costs, costs],
        torch_version="2",
        runtime="onnxruntime",
    )


def settings() -> Settings:
    return Settings(
        workload=Workload(steps=1, warm_up=1),
        long_microbatches=None,
        rounds=2,
        torch_python="t",
        peer_python="p",
        bundle=Path("b"),
        folder=Path("f"),
    )


def test_report_holds_figures_ceiling_and_misses(manifest: Manifest) -> None:
    report = make_report(settings(), measured(manifest, 1.6), command="c", hardware={"cores": 2})
    reached = {verdict.what: verdict for verdict in report.verdicts}
    assert reached[f"{ours(1, 8)} / {TORCH}"].reached.median == pytest.approx(1.25)
    assert not reached[f"{ours(1, 8)} / {TORCH}"].is_met
    assert reached[f"{ours(2, 8)} / {ours(1, 8)}"].is_met
    # Ten equal segments cut in the middle: 8 microbatches allow 16 / 9.
    assert report.balances[ours(2, 8)][0].ceiling == pytest.approx(16 / 9)
    # ZB-H1 leaves a third of that bubble.
    assert report.balances[DELAYED][0].ceiling == pytest.approx(48 / 25)
    assert reached[f"{DELAYED} / {ours(1, 8)}"].reached.median == pytest.approx(1.6 / 0.9)
    share = next(v for what, v in reached.items() if "ceiling 1.778" in what)
    assert share.reached.median == pytest.approx(1.6 * 9 / 16)
    assert report.compute_share[ours(1, 8)] == pytest.approx(10 * 3e-3 * 8 / 1.6)
    shown = json.dumps(report.to_json())
    assert '"is_met": false' in shown


def test_report_prints_misses_and_unknown_memory(manifest: Manifest) -> None:
    report = make_report(settings(), measured(manifest, 1.6), command="c", hardware={"cores": 2})
    console = Console(width=200, record=True, file=io.StringIO())
    print_report(console, report)
    for text in (console.export_text(), markdown(report)):
        assert "MISSED" in text
        assert "512 + ?" in text
        assert "1024 + ?" in text
        assert "cores 2" in text


def test_checks_fail_on_other_losses_and_other_bits(manifest: Manifest) -> None:
    found = measured(manifest, 1.6)
    assert all(
        check.is_met for check in make_report(settings(), found, command="c", hardware={}).checks
    )
    found.turns[TORCH] = [Turn(seconds=(9.0, 2.0), losses=(8.0, 7.1))] * 2
    found.digests[ours(2, 8)] = {"other"}
    checks = make_report(settings(), found, command="c", hardware={}).checks
    assert [check.is_met for check in checks] == [False, True, True, False]


def test_the_same_losses_are_asked_to_the_last_bit(manifest: Manifest) -> None:
    found = measured(manifest, 1.6)
    first = found.turns[ours(2, 8)][0]
    near = dataclasses.replace(first, losses=(8.0, 7.0 + 1e-9))
    found.turns[ours(2, 8)] = [first, near]
    checks = make_report(settings(), found, command="c", hardware={}).checks
    assert [check.is_met for check in checks] == [True, True, True, False]


def test_ceiling_follows_the_cuts_of_each_round(manifest: Manifest) -> None:
    found = measured(manifest, 1.6)
    found.plans[ours(2, 8)] = [plan_report(manifest, 5), plan_report(manifest, 2)]
    report = make_report(settings(), found, command="c", hardware={})
    even, odd = report.balances[ours(2, 8)]
    assert odd.ceiling < even.ceiling
    share = next(v for v in report.verdicts if "ceiling" in v.what)
    assert share.reached.least == pytest.approx(1.6 / even.ceiling)
    assert share.reached.greatest == pytest.approx(1.6 / odd.ceiling)
    assert sum("in 1 of 2 rounds" in line for line in markdown(report).splitlines()) == 2
