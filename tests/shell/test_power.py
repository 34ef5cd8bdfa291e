"""Power readers on fake trees of /sys and /proc."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from p2ptrain.errors import ConfigError
from p2ptrain.power.cgroups import cpu_quota
from p2ptrain.power.host import (
    available_memory_bytes,
    host_identity,
    machine_cpu_ns,
    power_source,
    quota_identity,
)
from p2ptrain.power.meter import open_meter
from p2ptrain.power.model import PowerConfig, model_for, parse_power_config
from p2ptrain.power.rapl import RaplCounter, RaplUnavailable, open_rapl

MIB = 1024 * 1024
RAPL = {
    "intel-rapl:0": ("package-0", 262_143_000_000, 262_143_328_850),
    "intel-rapl:0:0": ("core", 5, 262_143_328_850),
    "intel-rapl:0:1": ("dram", 1_000, 65_712_999_613),
    "intel-rapl:1": ("psys", 77, 262_143_328_850),
    "intel-rapl-mmio:0": ("package-0", 262_143_000_000, 262_143_328_850),
}


def _write(root: Path, files: dict[str, object]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return root


def _rapl_tree(root: Path, zones: dict[str, tuple[str, int, int]]) -> Path:
    for zone, (name, energy_uj, range_uj) in zones.items():
        base = f"sys/class/powercap/{zone}"
        _write(root, {f"{base}/name": name, f"{base}/energy_uj": energy_uj})
        _write(root, {f"{base}/max_energy_range_uj": range_uj})
    _write(root, {"sys/class/powercap/intel-rapl/enabled": 1})
    return root


def _energy(root: Path, zone: str, value: object) -> None:
    _write(root, {f"sys/class/powercap/{zone}/energy_uj": value})


def test_rapl_adds_packages_and_dram_and_survives_a_wrap(tmp_path: Path) -> None:
    counter = open_rapl(_rapl_tree(tmp_path, RAPL))
    assert isinstance(counter, RaplCounter)
    assert [zone.name for zone in counter.zones] == ["package-0", "dram"]
    assert counter.read_uj(0.0) == 0
    _energy(tmp_path, "intel-rapl:0", 671_150)  # wrapped: 1.0 J
    _energy(tmp_path, "intel-rapl:0:1", 1_500)
    _energy(tmp_path, "intel-rapl:0:0", 9_999_999)
    _energy(tmp_path, "intel-rapl:1", 9_999_999)
    assert counter.read_uj(1.0) == 1_000_000 + 500


def test_rapl_uses_psys_only_where_there_is_no_package(tmp_path: Path) -> None:
    counter = open_rapl(_rapl_tree(tmp_path, {"intel-rapl:1": RAPL["intel-rapl:1"]}))
    assert isinstance(counter, RaplCounter)
    assert [zone.name for zone in counter.zones] == ["psys"]


def test_rapl_loses_an_unreadable_interval_rather_than_guess(tmp_path: Path) -> None:
    counter = open_rapl(_rapl_tree(tmp_path, {"intel-rapl:0": ("package-0", 100, 10_000)}))
    assert isinstance(counter, RaplCounter)
    assert counter.read_uj(2.0) == 0
    _energy(tmp_path, "intel-rapl:0", "oops")
    assert counter.read_uj(3.0) is None
    _energy(tmp_path, "intel-rapl:0", 700)
    assert counter.read_uj(4.0) == 0
    _energy(tmp_path, "intel-rapl:0", 800)
    assert counter.read_uj(5.0) == 100


@pytest.mark.parametrize("zones", [{}, {"intel-rapl-mmio:0": RAPL["intel-rapl-mmio:0"]}])
def test_rapl_says_when_there_is_none(
    tmp_path: Path, zones: dict[str, tuple[str, int, int]]
) -> None:
    assert open_rapl(_rapl_tree(tmp_path, zones)) == RaplUnavailable(reason="no RAPL counter")


def test_rapl_that_may_not_be_read_is_unavailable_not_zero(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = _rapl_tree(tmp_path, RAPL)

    def denied(path: Path, *_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_text", denied)  # a test as root reads files of mode 0400
    expected = RaplUnavailable(reason="RAPL package-0: permission denied")
    assert open_rapl(root) == expected


def test_meter_prefers_rapl_and_names_its_scope(tmp_path: Path) -> None:
    root = _rapl_tree(tmp_path, RAPL)
    _write(root, {"proc/stat": "cpu  100 20 30 4000 50 6 7 8 0 0\ncpu0 1 2 3"})
    meter = open_meter(root=root, machine="x86_64", cores=4)
    assert (meter.identity.scope, meter.identity.quality) == ("package", "measured")
    assert meter.identity.meter == f"{host_identity(root)}/rapl"
    assert meter.model.joules_per_byte == 0
    assert meter.read(1.0).counter_uj == 0
    _energy(root, "intel-rapl:0", 262_143_100_000)
    reading = meter.read(2.5)
    assert (reading.at_s, reading.counter_uj) == (2.5, 100_000)
    assert reading.machine_cpu_ns == 163 * 10_000_000


def test_meter_falls_back_to_the_model_and_says_why(tmp_path: Path) -> None:
    meter = open_meter(root=tmp_path, machine="x86_64", cores=4)
    assert (meter.identity.scope, meter.identity.quality) == ("model", "estimated")
    assert meter.identity.error_band == 0.5
    assert meter.identity.source == (
        "model: assumed watts of an x86 laptop or mini PC (no RAPL counter)"
    )
    reading = meter.read(0.0)
    assert (reading.counter_uj, reading.machine_cpu_ns) == (None, None)


def test_config_may_choose_the_model_and_its_watts(tmp_path: Path) -> None:
    config = parse_power_config(
        {"meter": "model", "idle_watts": 0, "core_watts": 2.5, "source": "plug"}
    )
    meter = open_meter(root=_rapl_tree(tmp_path, RAPL), config=config, machine="aarch64", cores=4)
    assert (meter.model.idle_watts, meter.model.core_watts) == (0.0, 2.5)
    assert meter.identity.source == "model: plug"


def test_model_depends_on_the_architecture_and_says_what_is_assumed() -> None:
    arm = model_for(machine="aarch64", cores=4, config=PowerConfig())
    x86 = model_for(machine="x86_64", cores=4, config=PowerConfig())
    half = model_for(machine="x86_64", cores=4, config=PowerConfig(idle_watts=1.0))
    assert arm.core_watts < x86.core_watts
    assert "assumed" in arm.source
    assert half.source.startswith("watts partly from config.toml, else assumed")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"watts": 1}, "unknown key"),
        ({"meter": "guess"}, "meter is one of"),
        ({"idle_watts": -1}, "between 0 and 10000"),
        ({"core_watts": float("nan")}, "between"),
        ({"core_watts": True}, "is a number"),
        ({"joules_per_byte": "1"}, "is a number"),
        ({"joules_per_byte": 2}, "between 0 and 1"),
        ({"source": ""}, "source is a text"),
    ],
)
def test_power_config_refuses(table: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_power_config(table)


def test_host_identity_is_one_per_running_machine(tmp_path: Path) -> None:
    boot = "proc/sys/kernel/random/boot_id"
    name = "proc/sys/kernel/hostname"
    first = _write(tmp_path / "a", {boot: "b1", name: "one", "etc/machine-id": "m1"})
    container = _write(tmp_path / "b", {boot: "b1", name: "two", "etc/machine-id": "m2"})
    other = _write(tmp_path / "c", {boot: "b2", name: "one", "etc/machine-id": "m1"})
    assert host_identity(first) == host_identity(container) != host_identity(other)
    assert len(host_identity(first)) == 16


def test_host_identity_without_a_boot_id_uses_machine_and_name(tmp_path: Path) -> None:
    name = "proc/sys/kernel/hostname"
    one = _write(tmp_path / "a", {name: "one", "etc/machine-id": "m"})
    two = _write(tmp_path / "b", {name: "two", "etc/machine-id": "m"})
    assert host_identity(one) != host_identity(two)
    assert host_identity(tmp_path / "empty")


def test_memory_is_the_tightest_of_machine_and_cgroups(tmp_path: Path) -> None:
    meminfo = "MemTotal:  2048 kB\nMemAvailable:   1048576 kB"
    root = _write(tmp_path, {"proc/meminfo": meminfo})
    assert available_memory_bytes(root) == 1024 * MIB
    groups = "sys/fs/cgroup"
    _write(
        root,
        {
            "proc/self/cgroup": "1:name=systemd:/x\n0::/user/peer",
            f"{groups}/user/peer/memory.max": "max",
            f"{groups}/user/memory.max": 512 * MIB,
            f"{groups}/user/memory.current": 200 * MIB,
            f"{groups}/user/memory.stat": f"anon 1\ninactive_file {50 * MIB}",
        },
    )
    assert available_memory_bytes(root) == 362 * MIB
    _write(root, {f"{groups}/memory.max": 100 * MIB, f"{groups}/memory.current": 300 * MIB})
    assert available_memory_bytes(root) == 0


def test_memory_limits_of_version_1_count(tmp_path: Path) -> None:
    memory = "sys/fs/cgroup/memory"
    root = _write(
        tmp_path,
        {
            "proc/meminfo": "MemAvailable:   1048576 kB",
            "proc/self/cgroup": "4:memory:/docker/abc\n2:cpu,cpuacct:/docker/abc\n0::/",
            f"{memory}/memory.limit_in_bytes": 300 * MIB,
            f"{memory}/memory.usage_in_bytes": 120 * MIB,
            f"{memory}/memory.stat": f"inactive_file 1\ntotal_inactive_file {20 * MIB}",
        },
    )
    assert available_memory_bytes(root) == 200 * MIB  # the container sees its group as the root
    _write(root, {f"{memory}/docker/abc/memory.limit_in_bytes": 9223372036854771712})
    assert available_memory_bytes(root) == 200 * MIB


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, None),
        ({"user/cpu.max": "max 100000"}, None),
        ({"user/cpu.max": "40000 100000"}, 0.4),
        ({"user/cpu.max": "150000 100000", "cpu.max": "50000 100000"}, 0.5),
        ({"user/cpu.max": "40000"}, None),
        ({"user/cpu.max": "40000 0"}, None),
        ({"cpu/user/cpu.cfs_quota_us": -1, "cpu/user/cpu.cfs_period_us": 100_000}, None),
        ({"cpu/user/cpu.cfs_quota_us": 4000, "cpu/user/cpu.cfs_period_us": 10_000}, 0.4),
        ({"cpu/cpu.cfs_quota_us": 20_000, "cpu/cpu.cfs_period_us": 10_000}, 2.0),
    ],
)
def test_tightest_quota_of_either_version_is_found(
    tmp_path: Path, files: dict[str, object], cores: float | None
) -> None:
    root = _write(tmp_path, {"proc/self/cgroup": "3:cpu,cpuacct:/user\n0::/user"})
    _write(root, {f"sys/fs/cgroup/{name}": content for name, content in files.items()})
    quota = cpu_quota(root)
    assert (None if quota is None else quota.cores) == cores


def test_peers_below_quotas_of_their_own_share_no_cores(tmp_path: Path) -> None:
    def machine(group: str, namespace: str) -> Path:
        root = tmp_path / group / namespace
        _write(root, {"proc/sys/kernel/random/boot_id": "1", "proc/self/cgroup": f"0::/{group}"})
        _write(root, {f"sys/fs/cgroup/{group}/cpu.max": "max 100000"})
        (root / "proc/self/ns").mkdir()
        (root / "proc/self/ns/cgroup").symlink_to(f"cgroup:[{namespace}]")
        return root

    roots = [machine("a", "1"), machine("b", "1"), machine("a", "2")]
    assert len({host_identity(root) for root in roots}) == 1
    assert {quota_identity(root) for root in roots} == {""}
    for root, group in zip(roots, "aba", strict=True):
        _write(root, {f"sys/fs/cgroup/{group}/cpu.max": "40000 100000"})
    assert len({quota_identity(root) for root in roots}) == 3
    assert len({host_identity(root) for root in roots}) == 1, "still one machine"


def test_memory_is_unknown_where_nothing_says(tmp_path: Path) -> None:
    assert available_memory_bytes(tmp_path) is None
    _write(tmp_path, {"proc/self/cgroup": "0::/../escape", "proc/meminfo": "MemAvailable: x"})
    _write(tmp_path, {"sys/fs/escape/memory.max": 5})
    assert available_memory_bytes(tmp_path) is None


@pytest.mark.parametrize(
    ("supplies", "expected"),
    [
        ({}, "unknown"),
        ({"AC/type": "Mains", "AC/online": 1}, "mains"),
        ({"AC/type": "Mains", "AC/online": 0, "BAT0/type": "Battery",
          "BAT0/status": "Discharging"}, "battery"),
        ({"BAT0/type": "Battery", "BAT0/status": "Charging"}, "mains"),
        ({"BAT0/type": "Battery", "BAT0/status": "Unknown"}, "unknown"),
        ({"hid/type": "Battery", "hid/scope": "Device", "hid/status": "Discharging"}, "unknown"),
    ],
)  # fmt: skip
def test_power_source(tmp_path: Path, supplies: dict[str, object], expected: str) -> None:
    files = {f"sys/class/power_supply/{name}": value for name, value in supplies.items()}
    assert power_source(_write(tmp_path, files)) == expected


@pytest.mark.parametrize("stat", ["", "cpu 1 2", "cpu a b c d e f g", "intr 1 2 3 4 5 6 7 8"])
def test_machine_cpu_time_is_unknown_when_the_file_is_odd(tmp_path: Path, stat: str) -> None:
    assert machine_cpu_ns(_write(tmp_path, {"proc/stat": stat})) is None


def test_clock_ticks_are_what_this_machine_says() -> None:
    assert os.sysconf("SC_CLK_TCK") == 100
