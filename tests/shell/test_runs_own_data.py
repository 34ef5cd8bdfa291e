"""Runs whose peers feed their own data: like one peer that has all of it, and nothing leaves."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import trio

from p2ptrain import limits
from p2ptrain.bundle.manifest import Manifest
from p2ptrain.cli.tables import plan_lines
from p2ptrain.data.opening import OpenData, open_samples
from p2ptrain.data.options import GivenData
from p2ptrain.errors import ConfigError, PlanInfeasible
from p2ptrain.ids import DeviceId, RunId
from p2ptrain.runtime.planning import offers, own_data
from p2ptrain.runtime.planning.job import open_job
from p2ptrain.runtime.reports import NoteReport, PlanReport, TrainRequest
from p2ptrain.runtime.runs.run_status import run_status_report
from p2ptrain.runtime.services import Services
from p2ptrain.store.bundles import load_bundle, read_tokenizer, shipped_bundles
from p2ptrain.training.contract import Contract, OptimizerChoice
from p2ptrain.training.messages import BlobRequest, Profiled, Wanted, stamp_of
from p2ptrain.training.minibatch import read_own_part
from p2ptrain.training.program import Item
from p2ptrain.wire.codec import INTEGER_MAX
from tests.bundles import write_bundle
from tests.disturbed_runs import BUNDLE, CLIPPING, SECONDS_MAX, Disturbed
from tests.memory_group import MemoryGroup, float_bits, memory_group, until
from tests.own_data import (
    Write,
    alone_request,
    contract_of,
    given,
    own_request,
    put_together,
    segments_of,
    write_arrays,
    write_chats,
    write_text,
    write_tokenized,
    write_words,
)
from tests.replicated import (
    TOLERANCE,
    Run,
    assert_near,
    deviation,
    parameters,
    plan_text,
)
from tests.shell.test_runs_private import PIECE_BYTES, Watcher, forms, traces
from tests.shipped_training import short_context

STEPS = 20
SGD = OptimizerChoice(name="sgd", peak_learning_rate=0.05, warmup_steps=4, clip_norm=1.0)


async def train(path: Path, asked: TrainRequest, sets: list[GivenData], members: int = 0) -> Run:
    tensors = path / "trained.safetensors"
    async with memory_group(path, members or len(sets), sets) as group:
        with trio.fail_after(SECONDS_MAX):
            result = await group[0].train(dataclasses.replace(asked, safetensors=str(tensors)))
    return Run(result, parameters(tensors), group)


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    """The folder of the tiny bundle."""
    return str(write_bundle(tmp_path / "bundle", BUNDLE))


def short(path: Path, name: str) -> str:
    """The folder of a shipped bundle, with few tokens in a sample where it has tokens."""
    return str(write_bundle(path / "shipped", short_context(load_bundle(shipped_bundles()[name]))))


KINDS: dict[str, tuple[str, Write, list[int]]] = {
    "text": ("tiny", write_text, [1, 1, 1]),
    "text, uneven": ("tiny", write_text, [2, 1, 1]),
    "arrays": ("mlp", write_arrays, [2, 1, 1]),
    "chats": ("gpt-nano", write_chats, [1, 2]),
}


@pytest.mark.parametrize("kind", KINDS)
async def test_owners_agree_with_one_peer_that_has_all_their_data(
    tmp_path: Path, tiny: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, write, weights = KINDS[kind]
    bundle = tiny if name == "tiny" else short(tmp_path, name)
    sets = given(tmp_path / "data", write, len(weights))
    plan = plan_text([(list(range(len(sets))), segments_of(bundle), weights)])
    times = 1 if kind == "chats" else 2
    microbatches = times * sum(weights)
    asked = own_request(
        bundle, steps=STEPS, microbatches=microbatches, plan=plan, evaluate_every=5, dropout=0.2,
        optimizer=CLIPPING if name == "tiny" else SGD,
    )  # fmt: skip
    shared = await train(tmp_path / "shared", asked, sets)
    contract = contract_of(shared.group[0].runs_path)
    assert [owner.microbatches for owner in contract.owners] == [times * w for w in weights]
    with put_together(monkeypatch, contract, sets):
        wanted = alone_request(asked, contract, sets[0].path)
        one = await train(tmp_path / "one", wanted, [], members=1)
    assert_near(shared.result, one.result)
    assert shared.result.heldout_first == pytest.approx(one.result.heldout_first, rel=TOLERANCE)
    assert deviation(shared.trained, one.trained) < TOLERANCE
    if name == "tiny":
        again = await train(tmp_path / "again", asked, sets)
        assert again.bits == shared.bits


def notes(group: MemoryGroup) -> list[str]:
    return [report.text for report in group.reports("note") if isinstance(report, NoteReport)]


async def test_quicker_owners_feed_more_of_a_step_and_the_plan_says_whose_data_it_is(
    tmp_path: Path, tiny: str
) -> None:
    """One member has no data, one has data of the wrong kind: both are named and left out."""
    sets: list[GivenData | None] = [*given(tmp_path, write_text, 3)]
    sets += [None, GivenData(path=str(write_arrays(tmp_path, 0)))]
    async with memory_group(tmp_path, 5, sets) as group:
        group[1].work.slowness = 4
        with trio.fail_after(SECONDS_MAX):
            result = await group[0].train(own_request(tiny, microbatches=9, steps=3))
    (plan,) = group.reports("plan")
    assert isinstance(plan, PlanReport)
    told = {owner.name: (owner.records, owner.unit, owner.microbatches) for owner in plan.owners}
    assert told == {
        "peer-0": (1140, "bytes", 4), "peer-1": (1520, "bytes", 1), "peer-2": (1900, "bytes", 4)
    }  # fmt: skip
    assert plan.exactness.startswith("exact for these owners")
    assert plan_lines(plan)[2:] == [
        "data of peer-0: 1,140 bytes, 4 of 9 microbatches",
        "data of peer-1: 1,520 bytes, 1 of 9 microbatches",
        "data of peer-2: 1,900 bytes, 4 of 9 microbatches",
    ]
    assert (result.peers, result.owners) == (3, plan.owners)
    left_out = [note for note in notes(group) if "takes no part" in note]
    assert left_out[0] == (
        "peer-3 takes no part: it gives no data: start it with p2ptrain join --data PATH"
    )
    assert left_out[1] == (
        "peer-4 takes no part: its data, arrays, does not fit this model: p2ptrain train --data "
        "there says why"
    )


async def test_device_without_data_conducts_a_run_of_others(tmp_path: Path, tiny: str) -> None:
    sets: list[GivenData | None] = [None, *given(tmp_path, write_text, 2)]
    async with memory_group(tmp_path, 3, sets) as group:
        run = Disturbed(group)
        with trio.fail_after(SECONDS_MAX):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run.train, own_request(tiny, steps=8, evaluate_every=2))
                await run.wait_step(2)
                member = group[1].runs.member
                assert member is not None
                status = run_status_report(member)
                group[0].runs.stop()
    assert status.members == (
        "peer-0: conducts the run",
        "peer-1: stage 1 of 1, feeds its own data",
        "peer-2: stage 1 of 1, feeds its own data",
    )
    assert status.data_holders == ("peer-1", "peer-2")
    assert run.result is not None
    assert run.result.stopped
    assert 2 <= len(run.result.losses) <= 8


async def test_what_is_wrong_with_a_record_is_said_where_it_is(tmp_path: Path) -> None:
    """Reasons that quote a record do not travel; the device that asks hears its own."""
    path = tmp_path / "chats.jsonl"
    path.write_text('{"messages": ["secret"]}\n')
    bundle = short(tmp_path, "gpt-nano")
    wrong = GivenData(path=str(path))
    (right,) = given(tmp_path, write_chats, 1)
    async with memory_group(tmp_path / "theirs", 2, [right, wrong]) as group:
        watcher = Watcher(group)
        with trio.fail_after(SECONDS_MAX), pytest.raises(PlanInfeasible):
            await group[0].train(own_request(bundle))
        assert "does not fit this model" in notes(group)[0]
    marks = {"reason": {b"message 1"}, "file": {b"chats.jsonl"}, "told": {b"does not fit"}}
    assert watcher.shows(marks) == {"reason": 0, "file": 0, "told": 1}
    async with memory_group(tmp_path / "ours", 2, [wrong, right]) as group:
        with trio.fail_after(SECONDS_MAX), pytest.raises(PlanInfeasible):
            await group[0].train(own_request(bundle))
        assert "message 1 is not an object" in notes(group)[0]


async def test_owners_get_the_tokenizer_of_the_model(tmp_path: Path) -> None:
    """It is kept where a restarted process finds it, and not fetched twice."""
    bundle, digest = write_tokenized(tmp_path / "bundle", BUNDLE)
    sets, asked = given(tmp_path / "data", write_words, 2), own_request(bundle, steps=2)
    async with memory_group(tmp_path, 2, sets) as group:
        with trio.fail_after(SECONDS_MAX):
            first = await group[0].train(asked)
            again = await group[0].train(asked)
    assert float_bits(first.losses) == float_bits(again.losses)
    manifest = load_bundle(bundle).manifest
    for name in ("peer-0", "peer-1"):
        assert read_tokenizer(tmp_path / f"cache-{name}" / "tokenizers" / digest, manifest)
    asked_for = [m.digest for m in group[0].received if isinstance(m, BlobRequest)]
    assert asked_for.count(digest) == 1


async def test_member_of_an_older_version_is_left_out(
    tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It passes over what it does not know of the offer, and tells of no data."""
    tell = offers.offered_data

    async def older(services: Services, *rest: Any) -> OpenData | None:  # Any: as it takes them
        return None if services.host == "peer-2" else await tell(services, *rest)

    monkeypatch.setattr(offers, "offered_data", older)
    async with memory_group(tmp_path, 3, given(tmp_path, write_text, 3)) as group:
        with trio.fail_after(SECONDS_MAX):
            result = await group[0].train(own_request(tiny, steps=1))
    assert result.peers == 2
    assert "peer-2 takes no part: its version of p2ptrain gives no data of its own" in notes(group)


async def test_data_is_looked_through_once_for_a_run(
    tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []

    def counted(manifest: Manifest, bundle: Path, data: str, *rest: Any, **more: Any) -> OpenData:
        opened.append(data)  # Any: as `open_samples` takes them
        return open_samples(manifest, bundle, data, *rest, **more)

    monkeypatch.setattr(own_data, "open_samples", counted)
    sets = given(tmp_path, write_text, 2)
    async with memory_group(tmp_path, 2, sets) as group:
        with trio.fail_after(SECONDS_MAX):
            await group[0].train(own_request(tiny, steps=1))
    assert sorted(opened) == sorted(own.path for own in sets)


async def test_owner_that_tells_absurd_times_is_left_out(
    tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their sum would be no integer on the wire, and an owner must be in the plan."""
    async with memory_group(tmp_path, 3, given(tmp_path, write_text, 3)) as group:
        liar, send = group[2], group[2].send

        def lies(to: DeviceId, message: object) -> None:
            if isinstance(message, Profiled):
                kinds = {
                    name: dataclasses.replace(cost, norm_ns=INTEGER_MAX)
                    for name, cost in message.profile.kinds.items()
                }
                absurd = dataclasses.replace(message.profile, kinds=kinds)
                message = dataclasses.replace(message, profile=absurd)
            send(to, message)

        monkeypatch.setattr(liar, "send", lies)
        with trio.fail_after(SECONDS_MAX):
            result = await group[0].train(own_request(tiny, steps=1))
    assert result.peers == 2
    assert notes(group) == ["peer-2 takes no part: its measurement does not fit the model"]


async def test_owner_that_looks_through_much_data_is_waited_for(
    tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    look = offers.offered_data

    def waited_for() -> bool:
        return any(note.startswith("waiting for ") and "peer-2" in note for note in notes(group))

    async def slow(services: Services, *rest: Any) -> OpenData:  # Any: as it takes them
        if services.host == "peer-2":
            await group.wait(waited_for)
        return await look(services, *rest)

    monkeypatch.setattr(offers, "offered_data", slow)
    monkeypatch.setattr(limits, "OFFER_TIMEOUT_S", 0.05)
    async with memory_group(tmp_path, 3, given(tmp_path, write_text, 3)) as group:
        with trio.fail_after(SECONDS_MAX):
            result = await group[0].train(own_request(tiny, steps=1))
    assert result.peers == 3


def test_model_with_running_statistics_is_refused(tmp_path: Path) -> None:
    bundle = str(shipped_bundles()["mobilenet-v2"])
    with pytest.raises(PlanInfeasible, match="running statistics") as refused:
        open_job(
            own_request(bundle), runs_path=tmp_path, new_run=RunId("0" * 32), default_threads=1
        )
    assert refused.value.hint


class Marks:
    """What a wire that carries an owner's data would show."""

    def __init__(self, contract: Contract, bundle: str, sets: list[GivenData], path: Path) -> None:
        self.found: dict[str, set[bytes]] = defaultdict(set)
        manifest = load_bundle(Path(bundle)).manifest
        items = [Item(kind="train", step=step) for step in range(1, contract.steps + 1)]
        items.append(Item(kind="evaluate", step=0))
        for owner, own in zip(contract.owners, sets, strict=True):
            opened = open_samples(
                manifest, Path(bundle), own.path, None, own.options, path,
                minibatch_size=owner.microbatches * contract.microbatch_size,
            )  # fmt: skip
            for item in items:
                part = read_own_part(opened.samples, contract, manifest.loss, owner, item)
                for feed in part.feeds.values():
                    self.found["inputs"] |= set(forms(feed.inputs[0][:1]))
                    rows = feed.labels.ndim > 1
                    self.found["labels"] |= (
                        set(forms(feed.labels)) if rows else {feed.labels.tobytes()}
                    )
            content = Path(own.path).read_bytes()
            pieces = (
                content[at : at + PIECE_BYTES]
                for at in range(0, len(content) - PIECE_BYTES, len(content) // 40)
            )
            self.found["file"] |= set(pieces)


@pytest.mark.parametrize("kind", ["text", "arrays"])
async def test_no_record_leaves_its_owner(tmp_path: Path, tiny: str, kind: str) -> None:
    bundle = tiny if kind == "text" else str(shipped_bundles()["mlp"])
    write = write_text if kind == "text" else write_arrays
    sets = given(tmp_path / "data", write, 3)
    asked = own_request(bundle, steps=2, microbatches=3, microbatch_size=6, heldout_microbatches=3)
    async with memory_group(tmp_path / "own", 3, sets) as group:
        watcher = Watcher(group)
        with trio.fail_after(SECONDS_MAX):
            await group[0].train(asked)
            await until(lambda: all(m.runs.current_run is None for m in group.members.values()))
    assert all(len(watcher.sent[group[index].device]) > 10_000 for index in range(3))
    contract = contract_of(group[0].runs_path)
    marks = Marks(contract, bundle, sets, tmp_path / "cache").found
    assert all(marks.values())
    assert watcher.shows(marks) == dict.fromkeys(marks, 0)
    # An ordinary run sends both, so what is looked for can be seen.
    everyone = plan_text([([1, 2], segments_of(bundle), [1, 1])])
    ordinary = dataclasses.replace(
        asked, own_data=False, data=sets[0].path, plan=everyone, keep_data_here=True
    )
    async with memory_group(tmp_path / "open", 3) as group:
        watcher = Watcher(group)
        with trio.fail_after(SECONDS_MAX):
            await group[0].train(ordinary)
    seen = traces(ordinary, tmp_path)
    shown = watcher.shows({name: seen[name] for name in ("inputs", "labels")})
    assert min(shown.values()) > 0


async def test_who_asks_an_owner_for_its_data_loses_the_link(tmp_path: Path, tiny: str) -> None:
    async with memory_group(tmp_path, 2, given(tmp_path, write_text, 2)) as group:
        run, pair = Disturbed(group), frozenset(group.members)
        with trio.fail_after(SECONDS_MAX):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run.train, own_request(tiny, steps=20))
                await run.wait_step(3)
                member = group[0].runs.member
                assert member is not None
                assert member.plan is not None
                asked = Wanted(stamp=stamp_of(member.plan), what="labels", segment=0, step=1)
                group[0].send(group[1].device, asked)
                await until(lambda: pair in group.broken)
                group.heal_link(group[0].device, group[1].device)
    assert run.result is not None
    assert len(run.result.losses) == 20


REFUSED: dict[str, tuple[dict[str, object], str]] = {
    "data here": ({"data": "notes.txt"}, "--data and --own-data exclude"),
    "held-out data here": ({"heldout": "notes.txt"}, "--data and --own-data exclude"),
    "fields": ({"text_field": "body"}, "each owner says itself"),
    "private": ({"private": True}, "--private and --own-data exclude"),
    "a pipeline": ({"parallelism": "pipeline"}, "replicas of the whole model"),
    "shards": ({"parallelism": "tensor"}, "replicas of the whole model"),
    "stages": ({"stages": 2}, "one stage, not 2"),
    "delayed gradients": ({"schedule": "zb-h1"}, "no schedule of replicas"),
    "a plan of two stages": ({"plan": plan_text([([0], 2, [1]), ([1], 4, [1])])}, "whole model"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_such_a_run_cannot_be_is_refused(tmp_path: Path, tiny: str, case: str) -> None:
    changes, sentence = REFUSED[case]
    with pytest.raises(ConfigError, match=sentence) as refused:
        open_job(
            own_request(tiny, **changes), runs_path=tmp_path, new_run=RunId("0" * 32),
            default_threads=1,
        )  # fmt: skip
    assert refused.value.hint


@pytest.mark.parametrize(
    ("owners", "changes", "sentence"),
    [
        (0, {}, "0 of the peers have data|no peer can take part"),
        (1, {}, "1 of the peers have data for this run, and it takes two"),
        (3, {"microbatches": 2}, "3 devices have data, but a step has 2 microbatches"),
    ],
)
async def test_too_few_owners_or_microbatches_are_refused(
    tmp_path: Path, tiny: str, owners: int, changes: dict[str, object], sentence: str
) -> None:
    async with memory_group(tmp_path, 3, given(tmp_path, write_text, owners)) as group:
        with trio.fail_after(SECONDS_MAX), pytest.raises(PlanInfeasible, match=sentence) as refused:
            await group[0].train(own_request(tiny, **changes))
    assert refused.value.hint


async def test_owner_that_cannot_hold_the_model_is_left_out(tmp_path: Path, tiny: str) -> None:
    async with memory_group(tmp_path, 3, given(tmp_path, write_text, 3)) as group:
        group[2].memory_bytes = lambda: 1 << 20
        with trio.fail_after(SECONDS_MAX):
            result = await group[0].train(own_request(tiny, steps=1))
    assert result.peers == 2
    assert any(
        note.startswith("peer-2 has no stage: the whole model needs") for note in notes(group)
    )
