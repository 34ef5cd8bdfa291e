"""`p2ptrain bundle info` and `verify`: transcripts, exit codes and the shape of `--json`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from p2ptrain.cli.main import run
from p2ptrain.store.bundles import Bundle
from tests.bundles import tiny_bundle, write_bundle
from tests.hostile import GRAPHS, MANIFESTS, changed_by


@pytest.fixture(scope="module")
def tiny() -> Bundle:
    return tiny_bundle(blocks=2)


def lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.splitlines()]


def test_info_says_what_is_inside(
    tiny: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_bundle(tmp_path / "tiny", tiny)
    assert run(["bundle", "info", "tiny"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert lines(printed.out) == [
        f"bundle tiny ({tiny.digest[:8]})",
        "kind   segments              parameters  FLOPs  backward    stash  boundary  forms",
        "embed  embed                      4.1 k    1 k       2 k     64 B     512 B  portable",
        "block  block0 .. block1 (2)         272    1 k       2 k  1.5 KiB     512 B  portable",
        "head   head                       4.1 k    1 k       2 k  8.6 KiB       0 B  portable",
        "hand-made for tests",
        "task: language-modelling, cross-entropy loss",
        "data: windows (256 tokens by bytes); tokens int64 (batch, sequence)",
        "parameters: 8.74 k trainable, in 6 tensors",
        "weights: drawn from the seed of a run",
        "graphs: 9, 4.5 KiB",
        "optimizers: adamw, sgd",
        f"digest: {tiny.digest}",
    ]


def test_info_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bundle", "info", "gpt-nano", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["version"] == 1
    assert (report["segments"], report["graphs"], report["weights"]) == (10, 43, False)
    assert report["parameters"] == {"trainable": 1_902_720, "frozen": 0, "running": 0}
    assert [kind["name"] for kind in report["kinds"]] == ["embedding", "attention", "mlp", "head"]
    assert report["inputs"] == ["ids int64 (batch, sequence)"]
    assert max(report["checks"].values()) < 1e-5


@pytest.mark.parametrize("command", ["info", "verify"])
def test_missing_bundle_is_named(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bundle", command, "absent"]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("p2ptrain: there is no bundle 'absent'\np2ptrain: hint: ")
    assert printed.out == ""


def test_verify_of_a_sound_bundle(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bundle", "verify", "gpt-nano"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    title, heading, *rows = lines(printed.out)
    assert title.endswith("gpt-nano: sound")
    assert heading.split() == ["checked", "found"]
    assert [row.split(maxsplit=2) for row in rows] == [
        ["manifest.json", "ok", "10 segments, 69 tensors"],
        ["graphs", "ok", "43 graphs as the manifest says"],
        ["weights.safetensors", "ok", "none: every tensor is drawn from the run's seed"],
    ]


def test_verify_of_a_bad_bundle_lists_it_and_fails(
    tiny: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed_by(tiny, GRAPHS["random numbers"][0]).write(tmp_path / "bad")
    assert run(["bundle", "verify", "bad"]) == 7
    printed = capsys.readouterr()
    assert "bad: not sound" in printed.out
    assert "'RandomNormalLike' is not allowed" in " ".join(printed.out.split())
    assert printed.err == (
        "p2ptrain: the bundle is not sound: one problem\n"
        "p2ptrain: hint: get it again from where it came, or export the model again\n"
    )


@pytest.mark.parametrize("case", GRAPHS | MANIFESTS)
def test_verify_fails_for_every_bad_bundle(
    case: str, tiny: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed_by(tiny, (GRAPHS | MANIFESTS)[case][0]).write(tmp_path / "bad")
    assert run(["bundle", "verify", "bad", "--json"]) == 7
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert (report["version"], report["sound"]) == (1, False)
    assert any(finding["state"] == "wrong" for finding in report["findings"])
    assert printed.err.startswith("p2ptrain: the bundle is not sound: ")


@pytest.mark.parametrize("case", MANIFESTS)
def test_info_refuses_a_manifest_that_contradicts_itself(
    case: str, tiny: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed_by(tiny, MANIFESTS[case][0]).write(tmp_path / "bad")
    assert run(["bundle", "info", "bad"]) == 7
    assert capsys.readouterr().err.startswith("p2ptrain: manifest.json: ")
