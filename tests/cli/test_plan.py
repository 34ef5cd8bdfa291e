"""`p2ptrain plan`: transcripts, exit codes, the shape of `--json`, the picture."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from p2ptrain.cli import display
from p2ptrain.cli.main import run
from p2ptrain.schedule.labels import cells

DEVICES = """
[[device]]
type = "laptop"

[[device]]
name = "pi"
type = "raspberry-pi-5"
count = 2
"""
SLOW = """
[[device]]
name = "slow"
gflops = 1
memory = "{memory}"
idle_watts = 1
busy_watts = 2
"""


def _plan(*arguments: str, devices: str = DEVICES) -> int:
    Path("devices.toml").write_text(devices, encoding="utf-8")
    return run(["plan", "--model", "gpt-nano", "--devices", "devices.toml", *arguments])


def test_table_reasons_and_timeline(capsys: pytest.CaptureFixture[str]) -> None:
    Path("links.toml").write_text("mbit_per_s = 1000\nlatency_ms = 0.2\n", encoding="utf-8")
    assert _plan("--links", "links.toml") == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert printed.out.startswith("gpt-nano, least time: 100 steps of 32 samples")
    for words in (
        "J/sample", "above", "why: ", "tensor parallelism: ", "all 100 steps: ",
        "joules are modelled", "each device's part of a step", "letters: backward", "|00",
    ):  # fmt: skip
        assert words in printed.out, words
    assert "what-if" not in printed.out


def test_json_is_versioned_and_adds_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert _plan("--json", "--objective", "energy", "--steps", "7") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["version"] == 1
    assert answer["objective"] == "least energy"
    joules = [one["joules"] for one in answer["candidates"]]
    assert joules == sorted(joules)
    winner = answer["winner"]
    assert winner == answer["candidates"][0]
    assert sum(part["joules"] for part in winner["parts"]) == pytest.approx(winner["joules"])
    assert answer["total_joules"] == pytest.approx(7 * winner["joules"])
    assert answer["runnable"]["kind"] in ("one device", "pipeline")
    taking_part = {part["device"] for part in winner["parts"]}
    left_out = {out["device"] for out in answer["left_out"]}
    assert taking_part | left_out == {"laptop", "pi-1", "pi-2"}
    assert not taking_part & left_out


def test_svg_shows_every_action(capsys: pytest.CaptureFixture[str]) -> None:
    Path("p.toml").write_text(
        "schedule = 'zb-h1'\n[[stage]]\ndevices = ['pi-1']\nsegments = 5\n"
        "[[stage]]\ndevices = ['pi-2']\nsegments = 5\n",
        encoding="utf-8",
    )
    assert _plan("--plan", "p.toml", "--svg", "step.svg", "--microbatches", "4") == 0
    assert "a pipeline under zb-h1 on pi-1, pi-2, as asked" in capsys.readouterr().out
    picture = ElementTree.parse("step.svg")
    titles = {each.text for each in picture.iter("{http://www.w3.org/2000/svg}title")}
    assert {"0F0", "1F3", "1B0", "0B3"} <= titles


LONG = "Grandmother's old laptop in the kitchen <upstairs> & next door"[:60]
WIDE = "客厅的笔记本电脑客厅的笔记本电脑"


def test_long_names_stay_beside_the_pictures_and_80_columns_are_enough(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(display, "PLAIN_WIDTH", 80)
    devices = "".join(f'[[device]]\ntype = "laptop"\nname = "{name}"\n' for name in (LONG, WIDE))
    Path("p.toml").write_text(
        f'[[stage]]\ndevices = ["{WIDE}"]\nsegments = 5\n'
        f'[[stage]]\ndevices = ["{LONG}"]\nsegments = 5\n',
        encoding="utf-8",
    )
    asked = ("--schedule", "zb-h1", "--svg", "step.svg", "--plan", "p.toml")
    assert _plan(*asked, devices=devices) == 0
    tables, picture = capsys.readouterr().out.split("digits: ")
    assert "w: delayed gradients" in picture
    assert [cells(row) for row in picture.splitlines()[1:]] == [80, 80]
    assert all(heading in tables for heading in ("J/sample", "memory", "batches", "compute"))
    assert "…" not in tables, "no number and no heading is cut"
    names = {}
    for text in ElementTree.parse("step.svg").iter("{http://www.w3.org/2000/svg}text"):
        if text.get("font-family") == "monospace":
            names[text[0].text] = cells(text.text or "")
    assert names == {WIDE: 32, LONG: 40}


@pytest.mark.parametrize(
    ("arguments", "devices", "code", "sentence", "hint"),
    [
        ([], SLOW.replace("gflops = 1\n", ""), 2, "gflops is missing", "a type"),
        ([], SLOW.replace("busy_watts = 2", "busy_watts = -2"), 2, "busy_watts lies", "correct"),
        ([], SLOW.format(memory="64MiB"), 4, "segment", "add a device with at least"),
        ([], SLOW.format(memory="170MiB"), 4, "the model needs", "use --microbatch-size"),
        (["--deadline", "1"], DEVICES, 4, "nothing is done within 1.0 s", "use --deadline"),
        (["--joules", "1"], DEVICES, 4, "nothing is done with 1 J", "use --joules"),
        (
            ["--steps", "100000"], SLOW.format(memory="4GiB") + "battery_wh = 1", 4,
            "the batteries do not last for 100000 steps: slow has 3.6 kJ", "--steps",
        ),
        (["--links", "none.toml"], DEVICES, 2, "there is no file none.toml", "--links"),
        (["--optimizer", "lion"], DEVICES, 2, "no optimizer 'lion'", "adamw, sgd"),
        (["--svg", "no/such.svg"], DEVICES, 2, "cannot be written", "--svg"),
        (["--deadline", "nan"], DEVICES, 2, "'nan' is not a number above 0", "plan --help"),
        (["--deadline", "1e300"], DEVICES, 2, "is not a number above 0, at most", "plan --help"),
        (["--joules", "inf"], DEVICES, 2, "'inf' is not a number above 0", "plan --help"),
        (["--joules", "-1"], DEVICES, 2, "'-1' is not a number above 0", "plan --help"),
        (["--microbatches", "4097"], DEVICES, 2, "4097 is not in the range", "plan --help"),
        (["--microbatch-size", "9999999"], DEVICES, 2, "is not in the range", "plan --help"),
        (["--steps", str(1 << 41)], DEVICES, 2, "is not in the range", "plan --help"),
    ],
)  # fmt: skip
def test_bad_input_names_the_nearest_that_works(
    arguments: list[str], devices: str, code: int, sentence: str, hint: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert _plan(*arguments, devices=devices) == code
    printed = capsys.readouterr()
    assert sentence in printed.err
    assert hint in printed.err.split("hint:")[1]


def _followed(hint: str, devices: str, arguments: list[str]) -> tuple[str, list[str]]:
    """Do what one alternative of a hint says."""
    options = dict(zip(arguments[::2], arguments[1::2], strict=True))
    options |= dict(re.findall(r"(--[a-z-]+) ([0-9.]+)", hint))
    flags = ["--rematerialise"] if "--rematerialise" in hint else []
    if added := re.search("add a device with at least ([0-9.]+ [MG]iB)", hint):
        devices += SLOW.format(memory=added[1]).replace('"slow"', '"one more"')
    if given := re.search("give slow ([0-9.]+ [MG]iB)", hint):
        devices = re.sub('memory = ".*"', f'memory = "{given[1]}"', devices)
    if "plug slow in" in hint:
        devices = re.sub("battery_wh = .*", "", devices)
    kept = ["--private"] if "--home" in options and "leave --private out" not in hint else []
    return devices, [*itertools.chain(*options.items()), *flags, *kept]


@pytest.mark.parametrize(
    ("devices", "arguments"),
    [
        (SLOW.format(memory="170MiB"), []),
        (SLOW.format(memory="170MiB"), ["--deadline", "1"]),
        (SLOW.format(memory="150MiB"), ["--schedule", "gpipe", "--microbatches", "64"]),
        (SLOW.format(memory="100MiB"), ["--microbatch-size", "16"]),
        (SLOW.format(memory="170MiB"), ["--home", "slow"]),
        (SLOW.format(memory="4GiB") + "battery_wh = 0.1", ["--joules", "500", "--deadline", "900"]),
        (SLOW.format(memory="4GiB") + "battery_wh = 1", ["--steps", "100000"]),
        (DEVICES, ["--deadline", "1"]),
        (DEVICES, ["--joules", "1"]),
        (DEVICES, ["--joules", "1", "--deadline", "1"]),
        (DEVICES, ["--objective", "energy", "--joules", "900", "--deadline", "40"]),
    ],
)
def test_every_alternative_of_a_hint_works(
    devices: str, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    private = ["--private"] if "--home" in arguments else []
    assert _plan(*arguments, *private, devices=devices) == 4
    hint = capsys.readouterr().err.split("hint:")[1]
    for alternative in hint.split(", or "):
        changed, asked = _followed(alternative, devices, arguments)
        assert (changed, asked) != (devices, [*arguments, *private]), alternative
        assert _plan(*asked, devices=changed) == 0, (alternative, capsys.readouterr().err)
        capsys.readouterr()


def test_byte_order_mark_of_an_editor_is_passed_over(capsys: pytest.CaptureFixture[str]) -> None:
    assert _plan(devices="\ufeff" + DEVICES) == 0
    assert capsys.readouterr().err == ""


def test_directory_instead_of_file_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "--model", "gpt-nano", "--devices", "."]) == 2
    assert "there is no file " in capsys.readouterr().err
    assert run(["plan", "--model", "no-such", "--devices", "d.toml"]) == 2


def test_private_plan_keeps_both_ends_on_the_owner_of_the_data(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert _plan("--json") == 0
    ordinary = json.loads(capsys.readouterr().out)
    assert "private" not in " ".join(ordinary["reasons"])
    for asked, owner in (((), "laptop"), (("--home", "pi-2"), "pi-2")):
        assert _plan("--json", "--private", *asked) == 0
        answer = json.loads(capsys.readouterr().out)
        assert {one["kind"] for one in answer["candidates"]} == {"one device", "pipeline"}
        assert "stay with the data" in answer["impossible"]["data"]
        for candidate in answer["candidates"]:
            parts = sorted(candidate["parts"], key=lambda part: part["stage"])
            assert parts[0]["device"] == parts[-1]["device"] == owner
            assert all(part["device"] != owner for part in parts[1:-1])
        assert answer["reasons"][1].startswith(f"private: {owner} ")


def test_private_plan_that_the_owner_cannot_hold_says_what_it_takes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    devices = DEVICES + SLOW.format(memory="100 MiB")
    assert _plan("--private", "--home", "slow", devices=devices) == 4
    printed = capsys.readouterr()
    assert "the first and the last stage need at least" in printed.err
    assert "give slow 1" in printed.err
    assert _plan("--home", "pi", devices=devices) == 2
    assert "devices: laptop, pi-1, pi-2, slow" in capsys.readouterr().err
    Path("p.toml").write_text("[[stage]]\ndevices = ['laptop']\nsegments = 10\n", "utf-8")
    assert _plan("--private", "--plan", "p.toml") == 2
    assert "leave --plan or --private out" in capsys.readouterr().err
