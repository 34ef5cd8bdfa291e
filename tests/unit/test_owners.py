"""Owners of a run's data: shares, seeds, what the contract holds, and what is read of each."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field

import numpy as np
import pytest

from p2ptrain import limits
from p2ptrain.bundle.manifest import Loss
from p2ptrain.errors import ConfigError, DataError, PlanInfeasible, RemoteProtocolError
from p2ptrain.ids import DeviceId, Digest
from p2ptrain.planner.asked import Known
from p2ptrain.planner.plan import Plan, Split, StageShare
from p2ptrain.planner.profile import KindCost, PeerProfile
from p2ptrain.runtime.home.own_feeder import LabelCounts
from p2ptrain.runtime.planning.own_placement import able_owners, asked_of, is_of_owners, recorded
from p2ptrain.runtime.planning.own_runs import check_own_resumed
from p2ptrain.runtime.reports import TrainRequest
from p2ptrain.schedule.actions import Held
from p2ptrain.training.contract import Contract
from p2ptrain.training.feed import Feed
from p2ptrain.training.minibatch import item_weight, read_own_part
from p2ptrain.training.owners import (
    DataOwner,
    OwnedData,
    microbatch_shares,
    own_microbatches,
    own_seed,
    owner_of,
)
from p2ptrain.training.program import Item
from p2ptrain.wire.codec import to_plain
from tests.bundles import contract_for, tiny_bundle
from tests.pipelines import NO_DIGEST
from tests.sim.plans import device, make_plan

BUNDLE = tiny_bundle()
IGNORED = -100


def digest(text: str) -> Digest:
    return Digest(f"{text:0>64}")


def owner(index: int, microbatches: int) -> DataOwner:
    return DataOwner(
        device=device(index), training=digest(f"a{index}"), heldout=digest(f"b{index}"),
        records=10, unit="records", microbatches=microbatches,
    )  # fmt: skip


def told(index: int, *, classes: str = "c", training: str = "a") -> OwnedData:
    return OwnedData(
        training=digest(f"{training}{index}"), heldout=digest(f"b{index}"), records=10,
        unit="records", classes=digest(classes),
    )  # fmt: skip


def contract(**changes: object) -> Contract:
    base = {
        "microbatches": 4, "microbatch_size": 2, "heldout_microbatches": 5, "parallelism": "data",
        "owners": (owner(0, 1), owner(1, 3)), **changes,
    }  # fmt: skip
    return dataclasses.replace(contract_for(BUNDLE), **base)  # type: ignore[arg-type]  # by name


def test_a_contract_without_owners_keeps_the_digest_it_had() -> None:
    shared = contract(owners=())
    fields = {name: value for name, value in to_plain(shared).items() if name != "owners"}
    document = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    assert shared.digest == hashlib.sha256(document.encode()).hexdigest()
    assert contract().digest != shared.digest
    swapped = contract(owners=(owner(1, 3), owner(0, 1)))
    assert swapped.digest != contract().digest, "their order is that of sums"
    assert contract().exactness.startswith("exact for these owners")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"owners": (owner(0, 4),)}, "two owners or more"),
        ({"owners": (owner(0, 1), owner(0, 3))}, "each once"),
        ({"owners": (owner(0, 1), owner(1, 2))}, "are those of a step"),
        ({"heldout_microbatches": 3}, "a microbatch of every owner"),
        ({"parallelism": "pipeline"}, "replicas of the whole model"),
    ],
)
def test_owners_that_contradict_the_contract_are_refused(
    changes: dict[str, object], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        contract(**changes)


@pytest.mark.parametrize(
    "changes",
    [{"training": "x"}, {"classes": ""}, {"records": 0}, {"records": limits.DATA_RECORDS_MAX + 1}],
)
def test_what_no_data_is_cannot_be_told(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="data"):
        dataclasses.replace(told(0), **changes)  # type: ignore[arg-type]  # fields by name


@pytest.mark.parametrize("changes", [{"microbatches": 0}, {"records": 0}, {"heldout": "b"}])
def test_no_owner_is_without_data_or_microbatches(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="owner"):
        dataclasses.replace(owner(0, 1), **changes)  # type: ignore[arg-type]  # fields by name


def test_each_owner_has_its_microbatches_of_a_step_and_some_of_any_evaluation() -> None:
    owners = (owner(0, 1), owner(1, 3), owner(2, 2))
    for count in range(6, 20):
        own = [own_microbatches(owners, each.device, count) for each in owners]
        assert sorted(m for part in own for m in part) == list(range(count))
        assert all(own)
    step = [len(own_microbatches(owners, each.device, 6)) for each in owners]
    assert step == [1, 3, 2]
    assert own_microbatches(owners, device(7), 6) == ()
    assert owner_of(owners, device(1)) == owners[1]
    assert owner_of(owners, device(7)) is None


def test_owners_draw_by_seeds_of_their_own() -> None:
    """Also where two have the same data; the bytes are those of PROTOCOL.md section 6.11."""
    same = dataclasses.replace(owner(1, 1), training=owner(0, 1).training)
    seeds = [own_seed(5, owner(0, 1)), own_seed(6, owner(0, 1)), own_seed(5, same)]
    assert len(set(seeds)) == 3
    assert all(0 <= seed < 1 << 63 for seed in seeds)
    fixed = dataclasses.replace(owner(0, 1), device=DeviceId("a" * 26), training=digest("1"))
    assert own_seed(5, fixed) == 7796031851791349154


@pytest.mark.parametrize(
    ("times", "microbatches", "shares"),
    [
        ([10, 10, 10], 3, (1, 1, 1)),
        ([10, 10, 10], 8, (3, 3, 2)),
        ([10, 20], 6, (4, 2)),
        ([10, 1000, 10], 9, (4, 1, 4)),
        ([5, 5], 2, (1, 1)),
    ],
)
def test_shares_follow_speed_and_leave_nobody_out(
    times: list[int], microbatches: int, shares: tuple[int, ...]
) -> None:
    assert microbatch_shares(times, microbatches) == shares


@dataclass
class Noted:
    """Samples that only say what was asked for; the labels of each are its number, or ignored."""

    asked: list[tuple[str, dict[str, int]]] = field(default_factory=list)
    digest: Digest = NO_DIGEST

    def training(self, **asked: int) -> Feed:
        return self._feed("training", asked)

    def heldout(self, **asked: int) -> Feed:
        return self._feed("heldout", asked)

    def _feed(self, part: str, asked: dict[str, int]) -> Feed:
        self.asked.append((part, asked))
        numbers = np.arange(asked["first_sample"], asked["first_sample"] + asked["count"])
        return Feed(inputs=(numbers,), labels=np.where(numbers % 3 == 0, IGNORED, numbers))


def test_an_owner_reads_its_first_samples_for_its_own_microbatches() -> None:
    made, noted = contract(), Noted()
    second, loss = made.owners[1], Loss(kind="cross-entropy", ignore_index=IGNORED)
    item = Item(kind="train", step=7)
    part = read_own_part(noted, made, loss, second, item)
    own = own_microbatches(made.owners, second.device, 4)
    assert tuple(part.feeds) == own
    assert [feed.inputs[0].tolist() for feed in part.feeds.values()] == [[0, 1], [2, 3], [4, 5]]
    assert part.counted == 4, "numbers 0 and 3 are ignored"
    seed = own_seed(made.seed, second)
    assert noted.asked == [
        ("training", {"seed": seed, "step": 7, "first_sample": first, "count": 2})
        for first in (0, 2, 4)
    ]
    noted.asked.clear()
    read_own_part(noted, made, loss, second, Item(kind="evaluate", step=7))
    own = own_microbatches(made.owners, second.device, 5)
    assert noted.asked == [
        ("heldout", {"sample_count": 2 * len(own), "first_sample": 2 * place, "count": 2})
        for place in range(len(own))
    ]


def test_an_item_without_labels_at_any_owner_is_refused() -> None:
    item = Item(kind="train", step=1)
    assert item_weight(item, 4, 2) == 0.25
    with pytest.raises(DataError, match="no label counts in all of its 2 microbatches"):
        item_weight(item, 0, 2)


def test_counts_are_added_once_all_are_told() -> None:
    counts, item = LabelCounts((device(0), device(1))), Item(kind="train", step=1)
    counts.add(device(0), item, 5)
    counts.add(device(0), item, 5)
    assert not counts.whole(item)
    counts.add(device(1), item, 0)
    assert counts.whole(item)
    assert counts.take(item) == 5
    assert not counts.whole(item)


def test_counts_that_cannot_be_are_the_tellers_error() -> None:
    counts = LabelCounts((device(0), device(1)))
    counts.add(device(0), Item(kind="train", step=1), 5)
    with pytest.raises(RemoteProtocolError, match="twice"):
        counts.add(device(0), Item(kind="train", step=1), 6)
    for step in range(2, limits.COUNTS_AHEAD_MAX + 1):
        counts.add(device(0), Item(kind="train", step=step), 1)
    for step in range(9, 19):
        with pytest.raises(RemoteProtocolError, match="too far ahead"):
            counts.add(device(0), Item(kind="evaluate", step=step), 1)
    assert len(counts.told[device(0)]) == limits.COUNTS_AHEAD_MAX


def shared_plan(*shares: tuple[int, int], split: Split = "replicas", stays: bool = True) -> Plan:
    """One stage of these devices with their weights."""
    base = make_plan(*(device(index) for index, _ in shares), home=device(shares[0][0]))
    parts = tuple(
        StageShare(device=device(index), weight=weight, step_compute_ns=1, memory_bytes=1)
        for index, weight in shares
    )
    stage = dataclasses.replace(base.stages[0], split=split, shares=parts)
    return dataclasses.replace(base, stages=(stage,), keep_data_here=stays)


def test_a_plan_of_owners_gives_each_its_microbatches_whole_and_lets_the_data_stay() -> None:
    owners, shares = (owner(0, 1), owner(1, 3)), [(0, 1), (1, 3)]
    assert is_of_owners(shared_plan(*shares), owners)
    assert not is_of_owners(shared_plan(*shares, split="tensor"), owners)
    assert not is_of_owners(shared_plan(*shares, stays=False), owners)
    assert not is_of_owners(shared_plan(*reversed(shares)), owners)
    assert not is_of_owners(make_plan(device(0), device(1)), owners)


def profile(index: int, *, memory_bytes: int = 1 << 30, pass_ns: int = 1000) -> PeerProfile:
    kinds = dict.fromkeys(
        BUNDLE.manifest.kinds, KindCost(forward_ns=pass_ns, backward_ns=2 * pass_ns)
    )
    return PeerProfile(
        device=device(index), kinds=kinds, memory_bytes=memory_bytes, host=f"h{index}", cores=2,
        build=contract().builds[0],
    )  # fmt: skip


def needs(segments: range, holds: Held) -> int:
    return len(segments) << 20


def test_who_cannot_be_an_owner_is_left_out_with_a_reason() -> None:
    profiles = [profile(3), profile(0), profile(1, memory_bytes=1 << 20), profile(2), profile(4)]
    data = {device(i): told(i, classes="d" if i == 2 else "c") for i in range(4)}
    able, out = able_owners(profiles, data, needs, BUNDLE.manifest)
    assert [p.device for p in able] == [device(0), device(3)]
    reasons = {left.device: left.reason for left in out}
    assert reasons.keys() == {device(1), device(2)}, "who told of no data is no candidate"
    assert reasons[device(1)].startswith("the whole model needs")
    assert reasons[device(2)].startswith("its data numbers the classes otherwise")
    with pytest.raises(PlanInfeasible, match=r"1 of the peers .* \(its data numbers"):
        able_owners([profile(0), profile(2)], data, needs, BUNDLE.manifest)


def test_quick_owners_are_asked_for_more() -> None:
    owners = [profile(0), profile(1, pass_ns=3000)]
    (stage,) = asked_of(owners, contract(), BUNDLE.manifest).stages
    assert (stage.devices, stage.weights) == ((device(0), device(1)), (3, 1))
    assert (stage.split, stage.segments) == ("replicas", len(BUNDLE.manifest.segments))


def test_a_resumed_run_is_asked_for_as_it_was() -> None:
    names = {device(0): "attic", device(1): "pi"}
    known, data = Known(names=names), {device(i): told(i) for i in (0, 1)}
    (stage,) = recorded(contract(), BUNDLE.manifest, data, known).stages
    assert (stage.devices, stage.weights) == ((device(0), device(1)), (1, 3))
    with pytest.raises(DataError, match="the data of pi has changed since the run began"):
        recorded(contract(), BUNDLE.manifest, {**data, device(1): told(1, training="f")}, known)
    with pytest.raises(PlanInfeasible, match="the data of pi: it is not there"):
        recorded(contract(), BUNDLE.manifest, {device(0): told(0)}, known)
    busy = Known(names=names, absent={device(1): "busy with run abc"})
    with pytest.raises(PlanInfeasible, match="the data of pi: busy with run abc"):
        recorded(contract(), BUNDLE.manifest, data, busy)


def test_a_run_of_one_body_of_data_is_not_resumed_on_owners_data() -> None:
    request = TrainRequest(bundle="", data="", resume="abc")
    plain = contract(owners=())
    check_own_resumed(request, plain)
    with pytest.raises(ConfigError, match="begun with one body of data"):
        check_own_resumed(dataclasses.replace(request, own_data=True), plain)
    check_own_resumed(request, contract())
