"""Segment times on disk: known after a restart, and harmless when damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from p2ptrain.engine.contract import Engine
from p2ptrain.engine.onnxruntime_engine import OnnxRuntimeEngine
from p2ptrain.errors import BundleError
from p2ptrain.planner.profile import KindCost
from p2ptrain.runtime.compute import known_profiles
from p2ptrain.runtime.compute.stopwatch import NO_QUOTA, Stopwatch
from p2ptrain.store import profiles
from p2ptrain.store.bundles import Bundle
from p2ptrain.store.profiles import KEPT_S, SIZES_MAX, ProfileStore, profile_key
from p2ptrain.training.messages import Offer
from tests.bundles import tiny_bundle
from tests.interop.message_samples import sample
from tests.planning_cases import BUILD

COST = KindCost(
    forward_ns=10, backward_ns=20, cotangents_ns=12, gradients_ns=9, norm_ns=3, update_ns=5
)
PLAIN = KindCost(forward_ns=1, backward_ns=2)
BUNDLE = tiny_bundle()


def test_what_was_written_is_read_again_until_it_is_old(tmp_path: Path) -> None:
    store = ProfileStore(tmp_path / "deep" / "profiles")
    assert store.read("key", now_s=100.0) == {}
    store.write("key", {4: COST, 2: PLAIN}, now_s=100.0)
    assert ProfileStore(tmp_path / "deep" / "profiles").read("key", now_s=101.0) == {
        4: COST, 2: PLAIN,
    }  # fmt: skip
    assert store.read("key", now_s=100.0 + KEPT_S + 1) == {}
    assert store.read("key", now_s=99.0) == {}, "it is of the future"
    assert store.read("other", now_s=101.0) == {}


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 5000, b"{}" + b" " * 9000,
        b'{"version": 1, "measured_at_s": 1, "sizes": {}}',
        b'{"version": 2, "measured_at_s": "1", "sizes": {}}',
        b'{"version": 2, "measured_at_s": 1, "sizes": []}',
        b'{"version": 2, "measured_at_s": 1, "sizes": {"x": {}}}',
        b'{"version": 2, "measured_at_s": NaN, "sizes": {}}',
    ],
)  # fmt: skip
def test_damaged_file_is_as_good_as_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "key.json").write_bytes(content)
    assert ProfileStore(tmp_path).read("key", now_s=2.0) == {}


@pytest.mark.parametrize("value", [-1, 10**16, 1.5, True, "1", None, []])
@pytest.mark.parametrize(
    "field", ["forward_ns", "backward_ns", "gradients_ns", "norm_ns", "update_ns"]
)
def test_time_that_cannot_be_is_refused(tmp_path: Path, field: str, value: object) -> None:
    store = ProfileStore(tmp_path)
    store.write("key", {4: COST}, now_s=1.0)
    document = json.loads((tmp_path / "key.json").read_text())
    document["sizes"]["4"][field] = value
    (tmp_path / "key.json").write_text(json.dumps(document))
    assert store.read("key", now_s=2.0) == {}


def test_files_and_sizes_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiles, "PROFILES_MAX", 3)
    store = ProfileStore(tmp_path)
    for index in range(6):
        store.write(f"key-{index}", dict.fromkeys(range(1, 20), PLAIN), now_s=1.0)
    assert len(list(tmp_path.iterdir())) == 3
    assert len(store.read("key-5", now_s=1.0)) == SIZES_MAX


def test_disk_that_refuses_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    store = ProfileStore(tmp_path / "file")
    store.write("key", {4: COST}, now_s=1.0)
    assert store.read("key", now_s=1.0) == {}


def test_key_follows_from_graphs_optimizer_threads_build_and_quota() -> None:
    manifest = BUNDLE.manifest
    assert len(manifest.updates) == 2
    keys = {
        profile_key(
            manifest,
            kind,
            form="portable",
            optimizer=optimizer,
            build=BUILD,
            threads=threads,
            quota_cores=cores,
        )
        for kind in manifest.kinds
        for optimizer in manifest.updates
        for threads in (1, 2)
        for cores in (None, 0.4, 1.0)
    }
    assert len(keys) == 2 * 6 * len(manifest.kinds)


def test_second_time_nothing_is_measured_that_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[tuple[int, frozenset[str]]] = []
    asked: set[str] = set()

    def profile(
        engine: Engine, bundle: Bundle, form: str, batch: int, repeats: int, in_parts: bool,
        *, optimizer: str, kinds: set[str], stopwatch: object, parts_until_ns: int,
    ) -> dict[str, KindCost]:  # fmt: skip
        measured.append((batch, frozenset(kinds)))
        asked.add(optimizer)
        parts = {"cotangents_ns": batch, "gradients_ns": 1} if in_parts else {}
        return {kind: KindCost(forward_ns=batch, backward_ns=2, **parts) for kind in kinds}

    monkeypatch.setattr(known_profiles, "profile_kinds", profile)
    engine, store = OnnxRuntimeEngine(threads=1), ProfileStore(tmp_path)
    everything = frozenset(BUNDLE.manifest.kinds)

    def ask(
        batch: int, *, in_parts: bool = False, stopwatch: Stopwatch = NO_QUOTA, optimizer: str = ""
    ) -> int:
        base = sample(Offer)
        offer = Offer(
            run=base.run, view=base.view, bundle=base.bundle, bundle_bytes=1,
            microbatch_size=batch, form="portable", threads=1, in_parts=in_parts,
            other_sizes=(1, 2, 8, 64), optimizer=optimizer,
        )  # fmt: skip
        known = known_profiles.known_or_measured(store, engine, BUNDLE, offer, stopwatch)
        found = known.kinds
        assert found.keys() == everything
        told = [(o.microbatch_size, o.kinds["block"].forward_ns) for o in known.other_sizes]
        assert told == [(1, 1), (2, 2), (8, 8)], "64 is too far away"
        return found["block"].forward_ns

    assert ask(4) == 4
    assert measured == [(2, everything), (4, everything)]
    assert [ask(4), ask(2), ask(3), ask(8)] == [4, 2, 3, 8]
    assert len(measured) == 2
    assert ask(4, in_parts=True) == 4
    assert measured[2:] == [(2, everything), (4, everything)]
    next(iter(tmp_path.iterdir())).write_bytes(b"damaged")
    ask(4)
    assert [len(kinds) for _, kinds in measured[4:]] == [1, 1]
    measured.clear()
    for cores in (0.4, 0.4, 0.8):
        ask(4, stopwatch=Stopwatch(cores=cores))
    assert measured == 2 * [(2, everything), (4, everything)], "once below each quota"
    first, other = BUNDLE.manifest.updates
    assert asked == {first}
    measured.clear()
    ask(4, optimizer=first)
    assert measured == []
    ask(4, optimizer=other)
    assert measured == [(2, everything), (4, everything)], "an update takes another time"
    with pytest.raises(BundleError, match="no optimizer 'lion'"):
        ask(4, optimizer="lion")
