"""The study's pure parts: which cells there are, what a run comes to, tables and plots."""

from __future__ import annotations

import csv
import io
import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from p2ptrain.planner.kinds import KINDS, RUNTIME_KINDS
from p2ptrain.planner.plan_file import read_plan
from p2ptrain.runtime.reports import PeerEnergy, PhaseEnergy, TrafficReport
from tests.planning_cases import device
from tools import parallelism_study
from tools.parallelism_study import Study, chosen, is_due, parser, watts_of
from tools.study.cells import LINKS, MODELS, PEERS, SHORT, Cell, cells, place, plan_text
from tools.study.figures import PHASES, Figures, Watts, phase_joules, phase_seconds, step_bytes
from tools.study.report import as_csv, as_markdown, as_svg
from tools.throttle.group import checked

NAMES = ("peer-1", "peer-2", "peer-3", "peer-4")
PIPELINE = Cell(model=MODELS[0], kind="pipeline", peers=2, link=LINKS[0])
RAN = Figures(
    key=PIPELINE.key, outcome="ran", plan="1f1b, 5 + 5 segments", step_s=1.6,
    seconds_per_sample=0.05, joules_per_sample=0.4, phase_joules=dict.fromkeys(PHASES, 0.1),
    bytes_per_sample=200_000.0, peak_bytes=200 << 20, date="2026-11-26",
)  # fmt: skip


def test_every_kind_is_there_for_every_link_and_number_of_peers() -> None:
    whole = cells()
    assert len({cell.key for cell in whole}) == len(whole)
    for model in MODELS:
        own = [cell for cell in whole if cell.model == model]
        assert [cell.kind for cell in own].count("one device") == 1
        for kind in set(KINDS) - {"one device", "hybrid"}:
            assert sum(cell.kind == kind for cell in own) == len(LINKS) * len(PEERS)
        assert {cell.peers for cell in own if cell.kind == "hybrid"} == {3, 4}


def test_peers_are_promised_what_the_machine_can_keep() -> None:
    for model in (*MODELS, *SHORT):
        checked([place(model)] * (2 if model in SHORT else max(PEERS)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("peers", PEERS)
def test_plans_that_are_asked_for_can_be_read(kind: str, peers: int) -> None:
    text = plan_text(kind, NAMES[:peers], 10)  # type: ignore[arg-type]  # one of them
    if kind in ("one device", "pipeline"):
        assert text is None
        return
    assert text is not None
    stages = read_plan(text, file="plan").stages
    assert sum(stage.segments for stage in stages) == 10
    assert [name for stage in stages for name in stage.devices] == list(NAMES[:peers])
    splits = {"data": ["replicas"], "tensor": ["tensor"], "sequence": ["sequence"]}
    if kind in splits:
        assert [stage.split for stage in stages] == splits[kind]
    elif peers == 4:
        assert [(s.split, s.segments) for s in stages] == [("replicas", 5), ("replicas", 5)]
    elif peers == 3:
        assert [(s.split, s.segments) for s in stages] == [("replicas", 7), ("none", 3)]


def test_joules_follow_from_phases_and_bytes() -> None:
    seconds = {"compute": 6.0, "communicate": 1.0, "wait": 2.0, "idle": 1.0}
    watts = Watts(idle=3.0, busy=6.0, joules_per_byte=1e-6)
    joules = phase_joules(seconds, step_s=1.0, peers=2, step_bytes=50_000.0, watts=watts)
    assert joules == pytest.approx({
        "compute": 1.2 * 6.0, "communicate": 0.2 * 3.0 + 0.1, "wait": 0.4 * 3.0, "idle": 0.2 * 3.0,
    })  # fmt: skip
    assert sum(joules.values()) == pytest.approx(2 * 3.0 + 1.2 * 3.0 + 0.1)  # idle, above it, bytes


def test_only_what_steps_send_counts_as_theirs() -> None:
    a, b = device("a"), device("b")
    traffic = [
        TrafficReport(sender=a, receiver=b, kind=kind, bytes_sent=count)
        for kind, count in (("activation", 600), ("cotangent", 400), ("state", 9), ("data", 9))
    ]
    assert step_bytes(traffic, 10) == 100.0


def test_phases_of_all_peers_are_added() -> None:
    def peer(letter: str, compute_s: float) -> PeerEnergy:
        phase = PhaseEnergy(seconds=compute_s, marginal_joules=1.0, total_joules=1.0)
        return PeerEnergy(
            device=device(letter), name=letter, phases={"compute": phase}, marginal_joules=1.0,
            total_joules=1.0, scope="model", quality="estimated", error_band=0.5, meter="m",
            source="s", bytes_sent=1, samples=1,
        )  # fmt: skip

    assert phase_seconds([peer("a", 1.5), peer("b", 2.0)]) == {
        "compute": 3.5, "communicate": 0, "wait": 0, "idle": 0,
    }  # fmt: skip


def test_watts_are_those_of_the_device_file() -> None:
    assert watts_of("raspberry-pi-4") == Watts(idle=3.0, busy=6.3, joules_per_byte=1e-7)


def test_csv_and_table_tell_every_outcome() -> None:
    whole = cells(MODELS[:1])
    data = next(cell for cell in whole if cell.kind == "data")
    tensor = next(cell for cell in whole if cell.kind == "tensor")
    found = {
        RAN.key: RAN,
        data.key: Figures(key=data.key, outcome="does not fit", why="needs 1 GiB"),
        tensor.key: Figures(key=tensor.key, outcome="not run in this version"),
    }
    rows = list(csv.DictReader(io.StringIO(as_csv(whole, found))))
    assert [(row["kind"], row["outcome"], row["why"]) for row in rows] == [
        ("pipeline", "ran", ""),
        ("data", "does not fit", "needs 1 GiB"),
        ("tensor", "not run in this version", ""),
    ]
    assert rows[0]["wait_joules_per_sample"] == "0.1"
    table = as_markdown(MODELS[0], whole, found).splitlines()
    assert table[3].startswith("| pipeline | 50 ms, 0.40 J, 200 kB, 200 MiB | not looked at yet |")
    assert table[4].startswith("| data | does not fit |")
    assert table[5].startswith("| hybrid |  | not looked at yet |")


def test_plot_is_well_formed_and_has_a_bar_for_what_ran() -> None:
    drawn = as_svg(MODELS[0], cells(), {RAN.key: RAN}, name="seconds_per_sample", title="a < b")
    titles = [
        each.text for each in ElementTree.fromstring(drawn).iter() if each.tag.endswith("title")
    ]
    assert titles == ["pipeline: 0.05"]
    assert "a &lt; b" in drawn
    empty = as_svg(MODELS[0], cells(), {}, name="seconds_per_sample", title="nothing")
    assert not any(each.tag.endswith("title") for each in ElementTree.fromstring(empty).iter())


def test_study_goes_on_where_an_earlier_part_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Study.load(tmp_path, "command")
    assert is_due(PIPELINE, first, again=False)
    first.keep(RAN)
    later = Study.load(tmp_path, "command")
    assert later.found == {RAN.key: RAN}
    assert not is_due(PIPELINE, later, again=False)
    assert is_due(PIPELINE, later, again=True)
    later.keep(Figures(key=PIPELINE.key, outcome="not run in this version"))
    assert is_due(PIPELINE, later, again=False)  # this version runs pipelines
    monkeypatch.setattr("tools.study.cells.RUNTIME_KINDS", ("one device",))
    assert not is_due(PIPELINE, later, again=False)
    written = {path.name for path in tmp_path.iterdir()}
    assert {"results.json", "results.csv", "RESULTS.md", "gpt-nano-seconds.svg"} <= written
    assert json.loads((tmp_path / "results.json").read_text())["version"] == 1


def test_options_choose_cells() -> None:
    short = chosen(parser().parse_args(["--short"]), SHORT)
    assert {(cell.peers, cell.link.name) for cell in short} == {(1, "1-gbit"), (2, "1-gbit")}
    assert [cell.kind for cell in short][:2] == list(RUNTIME_KINDS)[:2]
    asked = ["--kind", "hybrid", "--kind", "pipeline", "--link", "wifi"]
    kinds = chosen(parser().parse_args(asked), MODELS)
    assert {cell.kind for cell in kinds} == {"hybrid", "pipeline"}
    assert {cell.link.name for cell in kinds} == {"wifi"}
    some = chosen(parser().parse_args(["--model", "gpt-nano", "--link", "wifi"]), MODELS)
    assert {(cell.model.name, cell.link.name) for cell in some if cell.peers > 1} == {
        ("gpt-nano", "wifi")
    }


def test_machine_that_permits_nothing_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse() -> None:
        raise parallelism_study.Unavailable("network namespaces need root")

    monkeypatch.setattr(parallelism_study, "require_permitted", refuse)
    line = ["--short", "--out", str(tmp_path)]
    assert parallelism_study.main(line) == parallelism_study.UNAVAILABLE
    assert "network namespaces need root" in capsys.readouterr().err


def test_results_that_are_kept_belong_to_the_study_and_to_its_pages() -> None:
    kept = Study.load(parallelism_study.FOLDER, "command")
    assert set(kept.found) <= {cell.key for cell in cells()}
    written = (parallelism_study.FOLDER / "results.csv").read_text(encoding="utf-8")
    assert written == as_csv(cells(), kept.found)
