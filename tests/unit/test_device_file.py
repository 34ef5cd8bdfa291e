"""Files of devices and links: what they give, and what is refused with which hint."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

from p2ptrain.errors import ConfigError
from p2ptrain.planner.device_file import DEVICE_KEYS, RANGES, parse_devices, parse_links
from p2ptrain.store.device_types import device_types

TYPES = device_types()
GOOD = """
[[device]]
name = "a"
gflops = 10
memory = "2GiB"
idle_watts = 1.5
busy_watts = 4
"""


def _parse(text: str) -> tuple[str, ...]:
    return tuple(spec.name for spec in parse_devices(text, file="d.toml", types=TYPES))


def test_a_device_is_read_in_its_units() -> None:
    (spec,) = parse_devices(GOOD + "battery_wh = 3", file="d.toml", types=TYPES)
    assert (spec.gflops, spec.memory_bytes) == (10.0, 2 * 1024**3)
    assert (spec.idle_watts, spec.busy_watts, spec.battery_wh) == (1.5, 4.0, 3.0)
    assert spec.joules_per_byte == 1e-7


def test_count_makes_several_and_a_type_gives_the_numbers() -> None:
    text = (
        '[[device]]\ntype = "raspberry-pi-5"\ncount = 2\n\n[[device]]\ntype = "phone"\ngflops = 9'
    )
    specs = parse_devices(text, file="d.toml", types=TYPES)
    assert [spec.name for spec in specs] == ["raspberry-pi-5-1", "raspberry-pi-5-2", "phone"]
    assert specs[2].gflops == 9.0
    assert "gflops" not in specs[2].sources
    assert specs[2].sources["memory"].startswith("assumption")


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("", "d.toml has no device", "[[device]]"),
        ("device = 3", "device is a list of tables", "[[device]]"),
        ("[[device]", "d.toml is not TOML", "README"),
        (GOOD.replace("gflops = 10", "gflops = -10"), "gflops lies between 0.01 and", "correct"),
        (GOOD.replace("gflops = 10", "gflops = 0"), "gflops lies between", "correct"),
        (GOOD.replace("gflops = 10", "gflops = nan"), "gflops lies between", "correct"),
        (GOOD.replace("gflops = 10", "gflops = 1e9"), "gflops lies between", "correct"),
        (GOOD.replace("gflops = 10", "gflops = true"), "gflops lies between", "correct"),
        (GOOD.replace("gflops = 10", 'gflops = "10"'), "gflops lies between", "correct"),
        (GOOD.replace("gflops = 10", ""), "'a': gflops is missing", "a type that has it"),
        (GOOD.replace('memory = "2GiB"', ""), "memory is missing", "a type that has it"),
        (GOOD.replace("2GiB", "2MiB"), "memory is what training may use", '"4GiB"'),
        (GOOD.replace("2GiB", "much"), "memory is what training may use", '"4GiB"'),
        (GOOD.replace("busy_watts = 4", "busy_watts = 1"), "is below idle_watts", "idle included"),
        (GOOD + "count = 2.5", "count is a whole number", "count = 2"),
        (GOOD + "count = 65", "count lies between 1 and 64", "correct"),
        (GOOD + "gflop = 3", "unknown key 'gflop'", "did you mean gflops?"),
        (GOOD + 'type = "raspbery-pi-5"', "no type 'raspbery-pi-5'", "'raspberry-pi-5'"),
        (GOOD + "battery_wh = 0", "battery_wh lies between", "correct"),
        (GOOD.replace('"a"', '""'), "name is a short text", "kitchen"),
        (GOOD + GOOD, "two devices are called 'a'", "name"),
        (GOOD + "count = 40\n" + GOOD.replace('"a"', '"b"') + "count = 40", "has 80", "count"),
        (GOOD.replace("gflops = 10", f"gflops = 1{'0' * 400}"), "gflops lies between", "correct"),
        (GOOD.replace("gflops = 10", f"gflops = 1{'0' * 5000}"), "thousands of digits", "correct"),
        (GOOD.replace("gflops = 10", f"gflops = 0x{'f' * 9000}"), "gflops lies between", "correct"),
        (GOOD.replace('"a"', f"0x{'f' * 9000}"), "name is a short text", "kitchen"),
        (GOOD + 'source = "a shop"', "source is a table of texts", "gflops"),
        (GOOD + "source = { gflops = 3 }", "source is a table of texts", "gflops"),
        ('[[device]]\ntype = "phone"\nsource = [1]', "source is a table of texts", "gflops"),
        ("[[device]]\ntype = 3", "no type '3'", "types: jetson-nano"),
        (GOOD + GOOD.replace("device", "devices"), "unknown key 'devices'", "did you mean device?"),
        ("mbit_per_s = 3\n" + GOOD, "d.toml has an unknown key 'mbit_per_s'", "keys: device"),
    ],
)
def test_bad_devices_are_refused(text: str, message: str, hint: str) -> None:
    with pytest.raises(ConfigError) as refused:
        _parse(text)
    assert message in refused.value.message
    assert hint in refused.value.hint


def test_links_are_named_else_of_a_medium_else_of_the_file() -> None:
    text = """
mbit_per_s = 8
[[medium]]
name = "wifi"
devices = ["a", "b", "c"]
mbit_per_s = 80
latency_ms = 3
[[link]]
between = ["c", "a"]
mbit_per_s = 800
latency_ms = 0
"""
    links = parse_links(text, file="l.toml", devices=["d", "c", "b", "a"])
    found = {(link.first, link.second): link for link in links}
    assert set(found) == set(itertools.combinations("abcd", 2))
    assert {pair for pair, link in found.items() if link.medium == "wifi"} == {
        ("a", "b"), ("b", "c"),
    }  # fmt: skip
    cable, rest = found["a", "c"], found["a", "d"]
    assert (cable.bytes_per_s, cable.latency_ns, cable.medium) == (10**8, 0, "")
    assert (rest.bytes_per_s, rest.latency_ns) == (10**6, 10**6)


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("[[medium]]\n", "medium 1: mbit_per_s is missing", "throughput"),
        ("mbit_per_s = 0", "mbit_per_s lies between", "correct"),
        ("[[link]]\nbetween = ['a', 'x']\nmbit_per_s = 1", "no device 'x'", "devices: a, bb"),
        ("[[link]]\nbetween = ['a', 'b']\nmbit_per_s = 1", "no device 'b'", "did you mean 'bb'?"),
        ("[[link]]\nbetween = ['a', 'a']\nmbit_per_s = 1", "two different devices", "between"),
        ("[[link]]\nbetween = 'a'\nmbit_per_s = 1", "between is a list of names", "between = ["),
        ("[[link]]\nmbit_per_s = 1", "between is a list of names", "between = ["),
        ("latency_ms = 3", "l.toml: mbit_per_s is missing", "throughput"),
        (f"mbit_per_s = 1{'0' * 400}", "mbit_per_s lies between", "correct"),
        ("[[medium]]\nname = ''\nmbit_per_s = 1", "name is a short text", 'name = "'),
        ("[[medium]]\nname = 3\nmbit_per_s = 1", "name is a short text", 'name = "'),
        (2 * "[[medium]]\nname = 'w'\nmbit_per_s = 1\n", "two media are called 'w'", "a name"),
        ("[[medium]]\nmbit_per_s = 1\nlatency_ms = -1", "latency_ms lies between", "correct"),
        ("speed = 3", "unknown key 'speed'", "keys:"),
    ],
)
def test_bad_links_are_refused(text: str, message: str, hint: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_links(text, file="l.toml", devices=["a", "bb"])
    assert message in refused.value.message
    assert hint in refused.value.hint


def test_every_type_that_comes_along_is_whole_and_says_where_its_numbers_come_from() -> None:
    assert set(TYPES) == {
        "jetson-nano", "jetson-tx2", "jetson-xavier-nx", "jetson-orin-nano", "raspberry-pi-4",
        "raspberry-pi-5", "phone", "laptop",
    }  # fmt: skip
    for name, table in TYPES.items():
        (spec,) = parse_devices(f'[[device]]\ntype = "{name}"', file="d.toml", types=TYPES)
        assert spec.name == name
        numbers = [key for key in table if key != "source"]
        assert set(numbers) == set(spec.sources)
        for text in spec.sources.values():
            assert text.startswith(("https://", "assumption: ")), text


def test_every_range_is_one_that_a_file_can_use() -> None:
    assert set(RANGES) - set(DEVICE_KEYS) == {"mbit_per_s", "latency_ms"}


def test_the_files_in_the_readme_are_read() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```toml\n# (\w+)\.toml\n(.*?)```", readme, re.DOTALL)
    texts = dict(blocks)
    names = _parse(texts["devices"])
    assert names == ("laptop", "pi-1", "pi-2", "drone")
    links = parse_links(texts["links"], file="links.toml", devices=names)
    assert len(links) == 6
    assert sum(link.medium == "wifi" for link in links) == 3
