"""A manifest's sharding section is hostile until checked."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from p2ptrain.bundle.reading import parse_manifest
from p2ptrain.bundle.report import bundle_report
from p2ptrain.bundle.shard_traffic import CollectiveCost, shard_traffic
from p2ptrain.cli.tables import bundle_lines
from p2ptrain.errors import BundleError

GOLDENS = Path(__file__).resolve().parents[1] / "interop" / "golden"
GOLDEN = GOLDENS / "manifest-v5.json"
BEFORE = GOLDENS / "manifest-v4.json"

Json = Any  # Any: JSON, to be damaged


@pytest.fixture(scope="module")
def sound() -> Json:
    return json.loads(GOLDEN.read_bytes())


def attention(mode: str) -> Callable[[Json], Json]:
    return lambda document: document["sharding"][mode]["kinds"]["attention"]


tensor, sequence = attention("tensor"), attention("sequence")


def setting(find: Callable[[Json], Json], *path: object, to: object) -> Callable[[Json], None]:
    def change(document: Json) -> None:
        place = find(document)
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = to

    return change


def collective(mode: str, field: str, to: object) -> Callable[[Json], None]:
    return setting(attention(mode), "forward", 0, "collectives", 0, field, to=to)


def whole(document: Json) -> Json:
    return document["sharding"]["tensor"]["whole"]


def _all_backward(document: Json) -> None:
    kind = tensor(document)
    kind["backward"] = [*kind["forward"], *kind["backward"]]
    kind["forward"] = []


BAD: dict[str, tuple[Callable[[Json], None], str]] = {
    "unknown mode": (
        lambda d: d["sharding"].update(expert=d["sharding"]["tensor"]),
        "unknown sharding 'expert'",
    ),
    "kind left out": (lambda d: whole(d).pop("head"), "does not speak of every kind once"),
    "kind told twice": (setting(whole, "mlp", to="why"), "does not speak of every kind once"),
    "no reason": (setting(whole, "head", to=""), "no readable reason for kind 'head'"),
    "terminal codes": (setting(whole, "head", to="\x1b[2J"), "no readable reason"),
    "no axis": (setting(tensor, "axes", to={}), "0 sliced axes"),
    "axis called as a symbol": (
        setting(tensor, "axes", to={"batch": "7"}),
        "'batch' is no name for a sliced axis",
    ),
    "no units": (setting(tensor, "axes", "units0", to="0"), "has 0 units"),
    "endless units": (setting(tensor, "axes", "units0", to=str(1 << 40)), f"has {1 << 40} units"),
    "as many units as samples": (setting(tensor, "axes", "units0", to="batch"), "has batch units"),
    "as many units as another axis": (
        setting(tensor, "axes", "units0", to="units0"),
        "has units0 units",
    ),
    "units of a product": (setting(tensor, "axes", "units0", to="7*1"), r"has 7\*1 units"),
    "negative units": (setting(tensor, "axes", "units0", to="-7"), "has -7 units"),
    "other units": (setting(tensor, "axes", "units0", to="6"), "do not make up its axis"),
    "unknown parameter": (
        setting(tensor, "slices", "absent", to={"units_of": "units0", "axis": 0, "blocks": [1]}),
        "it slices 'absent'",
    ),
    "unknown axis": (
        setting(tensor, "slices", "query.weight", "units_of", to="units9"),
        "sliced along an axis that is not there",
    ),
    "axis beyond": (
        setting(tensor, "slices", "query.weight", "axis", to=2),
        "sliced along an axis that is not there",
    ),
    "negative block": (
        setting(tensor, "slices", "query.weight", "blocks", to=[5, -1]),
        "do not make up its axis",
    ),
    "sum of what is sliced": (
        setting(tensor, "summed", to=["query.weight"]),
        "it sums gradients of 'query.weight'",
    ),
    "value called as a parameter": (
        setting(tensor, "values", 0, "name", to="query.weight"),
        "no name for a value of its own",
    ),
    "value called as a size": (
        setting(tensor, "values", 0, "name", to="shard.start.units0"),
        "no name for a value of its own",
    ),
    "value of unknown size": (
        setting(tensor, "values", 0, "shape", to=["somewhat"]),
        "unknown axis, or too many elements",
    ),
    "value beyond bounds": (
        setting(tensor, "values", 0, "shape", to=["99999999", "99999999"]),
        "unknown axis, or too many elements",
    ),
    "value of unknown type": (
        setting(tensor, "values", 0, "dtype", to="complex"),
        "has no known type",
    ),
    "stash from nowhere": (setting(tensor, "stash", to=["absent"]), "it keeps 'absent'"),
    "no forward": (_all_backward, "it has no forward"),
    "made twice": (
        lambda d: tensor(d)["forward"][1]["outputs"].extend(tensor(d)["forward"][0]["outputs"]),
        "is none of its values or is made twice",
    ),
    "port never made": (
        lambda d: tensor(d)["forward"][1]["outputs"].remove("y"),
        "nothing makes 'y'",
    ),
    "graph not listed": (
        setting(tensor, "forward", 0, "graph", to="0" * 64),
        "is referred to but not listed",
    ),
    "unknown collective": (collective("tensor", "kind", "shout"), "unknown collective 'shout'"),
    "sent before it is made": (
        collective("tensor", "sent", "stash_99"),
        "a reduce makes",
    ),
    "reduce of another shape": (
        collective("tensor", "shape", ["batch", "7"]),
        "for another value than it is",
    ),
    "gather of what is whole": (
        collective("tensor", "kind", "gather"),
        "has no axis of the units",
    ),
    "gather along another axis": (collective("sequence", "axis", 0), "has no axis of the units"),
    "gather along no axis": (collective("sequence", "axis", -1), "has no axis of the units"),
    "scatter of slices": (
        collective("sequence", "kind", "scatter"),
        "for another value than it is",
    ),
    "gather of another type": (
        collective("sequence", "dtype", "int64"),
        "for another value than it is",
    ),
    "boundary sliced on one side": (
        lambda d: sequence(d)["slices"].pop("x"),
        "gives segment 'attention' other slices than it takes",
    ),
    "boundary sliced along another axis": (
        setting(sequence, "slices", "y", "axis", to=0),
        "slices cotangents of 'attention' otherwise",
    ),
    "cotangents sliced otherwise": (
        setting(sequence, "slices", "cotangent.x", "axis", to=2),
        "slices cotangents of 'attention' otherwise",
    ),
    "field of another type": (
        setting(tensor, "axes", "units0", to=7),
        "Manifest.sharding.kinds.axes",
    ),
    "gradient never made": (
        lambda d: tensor(d)["backward"][0]["outputs"].remove("gradient.projection.bias"),
        "nothing makes 'gradient.projection.bias'",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_section_is_refused(case: str, sound: Json) -> None:
    change, said = BAD[case]
    document = copy.deepcopy(sound)
    change(document)
    with pytest.raises(BundleError, match=said.replace("[", r"\[")):
        parse_manifest(json.dumps(document).encode())


def test_the_sound_one_is_not() -> None:
    manifest = parse_manifest(GOLDEN.read_bytes())
    assert manifest.sharding["tensor"].kinds["attention"].axes == {"units0": "7"}


@pytest.mark.parametrize("units", ["7", True, None, 7.0, [7], -7])
def test_version_4_knew_numbers_of_units_only(units: object) -> None:
    document = json.loads(BEFORE.read_bytes())
    tensor(document)["axes"]["units0"] = units
    with pytest.raises(BundleError, match=r"axes|has -7 units"):
        parse_manifest(json.dumps(document).encode())


@pytest.mark.parametrize("damaged", ["sharding", "mode", "kinds", "axes"])
def test_version_4_of_other_shape_is_refused(damaged: str) -> None:
    document = json.loads(BEFORE.read_bytes())
    place: Json = {
        "sharding": document,
        "mode": document["sharding"],
        "kinds": document["sharding"]["tensor"],
        "axes": tensor(document),
    }[damaged]
    place["tensor" if damaged == "mode" else damaged] = "7"
    with pytest.raises(BundleError, match="sharding"):
        parse_manifest(json.dumps(document).encode())


def test_positions_are_as_many_as_the_sequence_is_long(sound: Json) -> None:
    document = copy.deepcopy(sound)
    document["symbols"]["sequence"]["size"] = document["data"]["context"] = 5
    shorter = parse_manifest(json.dumps(document).encode())
    attention = shorter.sharding["sequence"].kinds["attention"]
    assert shorter.units(attention) == {"positions": 5}
    assert shorter.units(shorter.sharding["tensor"].kinds["attention"]) == {"units0": 7}
    plain = 3 * 5 * 28 * 4  # samples, positions, width, bytes
    traffic = next(t for t in shard_traffic(shorter, "sequence", batch=3) if t.forward)
    assert traffic.forward == (CollectiveCost(kind="gather", whole_bytes=plain),) * 2
    assert traffic.units == 5


def test_traffic_of_each_segment() -> None:
    manifest = parse_manifest(GOLDEN.read_bytes())
    names = [segment.name for segment in manifest.segments]
    at = names.index("attention")
    plain = 3 * 12 * 28 * 4  # samples, positions, width, bytes
    by_tensor = shard_traffic(manifest, "tensor", batch=3)[at]
    assert by_tensor.forward == by_tensor.backward
    assert by_tensor.forward == (CollectiveCost(kind="reduce", whole_bytes=plain),)
    assert (by_tensor.step_bytes, by_tensor.units) == (0, 7)
    assert by_tensor.sharded_parameters == 4 * 28 * 28 + 3 * 28
    by_sequence = shard_traffic(manifest, "sequence", batch=3)[at]
    assert by_sequence.forward == (CollectiveCost(kind="gather", whole_bytes=plain),) * 2
    assert by_sequence.backward == (CollectiveCost(kind="scatter", whole_bytes=plain),) * 2
    assert by_sequence.step_bytes == 4 * (4 * 28 * 28 + 6 * 28)
    head = shard_traffic(manifest, "tensor", batch=3)[-1]
    assert (head.forward, head.backward, head.units) == ((), (), 0)


@pytest.mark.parametrize(
    ("kind", "peers", "sent"),
    [
        ("reduce", 4, 150),
        ("gather", 4, 75),
        ("scatter", 2, 50),
        ("reduce", 1, 0),
        ("gather", 3, 67),
    ],
)
def test_each_peer_of_a_ring_sends_its_part(kind: str, peers: int, sent: int) -> None:
    assert CollectiveCost(kind=kind, whole_bytes=100).ring_bytes(peers) == sent


def test_info_says_what_is_divided_and_why_the_rest_is_not() -> None:
    report = bundle_report(parse_manifest(GOLDEN.read_bytes()))
    lines = [line for line in bundle_lines(report) if "sharding" in line]
    assert lines == [
        "sequence sharding: embedding, attention, mlp, head 12 units",
        "tensor sharding: embedding whole: it has no linear over whole rows whose columns could be"
        " divided; attention 7 units; mlp 112 units; head whole: LogSoftmax works along the"
        " divided axis",
    ]
