"""The pure parts of throttled peers: what is written where, and what cannot be promised."""

from __future__ import annotations

from pathlib import Path

import pytest

from p2ptrain.errors import ConfigError
from tools import throttled_peers
from tools.throttle import cgroups
from tools.throttle.cgroups import Hierarchy, Limits
from tools.throttle.group import Cable, Place, checked
from tools.throttle.wires import Wires, shaping
from tools.wifi_emulator.medium import Air
from tools.wifi_emulator.namespaces import Unavailable

V1 = Hierarchy(version=1, cpu=Path("/c"), memory=Path("/m"))
V2 = Hierarchy(version=2, cpu=Path("/g"), memory=Path("/g"))


def test_both_versions_are_told_the_same_limits() -> None:
    limits = Limits(cores=0.4, memory_bytes=1 << 20)
    assert {(str(root), file): said for root, file, said in V1.settings(limits)} == {
        ("/c", "cpu.cfs_period_us"): "10000",
        ("/c", "cpu.cfs_quota_us"): "4000",
        ("/c", "cpu.shares"): "100000",
        ("/m", "memory.limit_in_bytes"): "1048576",
    }
    assert {file: said for _, file, said in V2.settings(limits)} == {
        "cpu.max": "4000 10000",
        "cpu.weight": "10000",
        "memory.max": "1048576",
    }
    assert {file: said for _, file, said in V2.settings(Limits())} == {
        "cpu.max": "max 10000",
        "cpu.weight": "10000",
        "memory.max": "max",
    }
    assert ("/c", "cpu.cfs_quota_us", "-1") in [(str(r), f, s) for r, f, s in V1.settings(Limits())]


def test_command_enters_every_hierarchy_and_keeps_its_words() -> None:
    *shell, script, name = cgroups.Group(V1, "p2t-1-a").prefix
    assert (shell, name) == (["sh", "-c"], "enter")
    assert script == (
        "echo $$ > '/c/p2t-1-a/cgroup.procs' && echo $$ > '/m/p2t-1-a/cgroup.procs' && exec \"$@\""
    )
    assert cgroups.Group(V2, "x").prefix[2].count("cgroup.procs") == 1


@pytest.mark.parametrize("limits", [{"cores": 0.0}, {"cores": -1.0}, {"memory_bytes": 0}])
def test_absurd_limits_are_refused(limits: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="at least"):
        Limits(**limits)  # type: ignore[arg-type]  # wrong on purpose


def test_more_than_the_machine_can_keep_is_refused() -> None:
    checked([Place(limits=Limits(cores=0.8)), Place(limits=Limits(cores=0.8))])
    with pytest.raises(ConfigError, match=r"come to 1\.7 cores, 0 have none"):
        checked([Place(limits=Limits(cores=0.8)), Place(limits=Limits(cores=0.9))])
    with pytest.raises(ConfigError, match="1 have none"):
        checked([Place(limits=Limits())])


def test_machine_without_limits_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(Unavailable, match="need root"):
        cgroups.hierarchy(tmp_path)
    monkeypatch.setattr("os.geteuid", lambda: 0)
    with pytest.raises(Unavailable, match="no control groups"):
        cgroups.hierarchy(tmp_path)
    (tmp_path / "cgroup.controllers").write_text("cpuset io memory\n")
    with pytest.raises(Unavailable, match="cannot limit: cpu"):
        cgroups.hierarchy(tmp_path)
    (tmp_path / "cgroup.controllers").write_text("cpu memory\n")
    assert cgroups.hierarchy(tmp_path).version == 2
    for name in ("cpu", "memory"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "cgroup.procs").touch()
    assert cgroups.hierarchy(tmp_path).version == 1


def test_groups_of_makers_that_are_gone_are_swept(tmp_path: Path) -> None:
    where = Hierarchy(version=2, cpu=tmp_path, memory=tmp_path)
    for name in ("p2t-4194399-a", "p2t-1-b", "other"):
        (tmp_path / name).mkdir()
    removed: list[Path] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cgroups, "_remove", removed.append)
        assert cgroups.sweep(where) == removed == [tmp_path / "p2t-4194399-a"]


def test_cable_has_a_token_bucket_for_its_rate() -> None:
    line = " ".join(shaping("eth0", 1000, 50))
    assert line == (
        "qdisc add dev eth0 root tbf rate 1000mbit burst 250000 latency 50ms"
    )  # fmt: skip
    assert "burst 16384 " in " ".join(shaping("eth0", 2.5, 50))
    made = Wires(("s1", "s2"), 7)
    assert made.addresses == {"s1": "10.97.0.1", "s2": "10.97.0.2"}
    assert made.namespace("s2") == "p2c-7-s2"


def test_command_line_becomes_places_and_a_network() -> None:
    parse = throttled_peers.parser().parse_args
    found = throttled_peers.places([0.5, 0.3], ["400MiB"])
    assert [each.limits.memory_bytes for each in found] == [400 << 20, None]
    assert [each.limits.cores for each in found] == [0.5, 0.3]
    assert throttled_peers.network(parse(["--rate", "100"])) == Cable(rate_mbit=100)
    air = throttled_peers.network(parse(["--wifi", "--rate", "50", "--loss", "1"]))
    assert air == Air(rate_mbit=50, delay_ms=2, loss_percent=1)


def test_command_line_that_makes_no_sense_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for line in ([], ["--cores", "1", "--cores", "1"], ["--cores", "1", "--memory", "much"]):
        assert throttled_peers.main(line) == throttled_peers.WRONG
        assert capsys.readouterr().err.startswith("throttled_peers: ")
    too_many = ["--cores", "1", "--memory", "1MiB", "--memory", "1MiB"]
    assert throttled_peers.main(too_many) == throttled_peers.WRONG
    assert "2 memory limits for 1 peers" in capsys.readouterr().err
