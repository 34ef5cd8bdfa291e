"""Runs whose peers feed their own data lose one, wait for it, and go on with the same bits."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import trio

from p2ptrain.data.options import GivenData
from p2ptrain.errors import ConfigError, DataError, PlanInfeasible
from p2ptrain.runtime.keeping import run_state
from p2ptrain.runtime.reports import TrainRequest, TrainResult
from p2ptrain.runtime.runs.run_status import run_status_report
from p2ptrain.training.feed import Samples
from p2ptrain.training.messages import LabelsCounted
from tests.bundles import write_bundle
from tests.disturbed_runs import (
    BUNDLE,
    CLIPPING,
    SECONDS_MAX,
    Disturbed,
    assert_same,
    assert_stored,
)
from tests.memory_group import Member, MemoryGroup, memory_group, stopped_after, until
from tests.own_data import (
    given,
    own_request,
    segments_of,
    turn_round,
    write_text,
    write_tokenized,
    write_words,
)
from tests.replicated import plan_text

STEPS, AT = 16, 6
WEIGHTS = [2, 1, 1]
NOT_READ = (
    "paused: the data of {0} is not read yet, or not what the run began with: p2ptrain status on "
    "{0} says which"
)


def data_in(path: Path) -> list[GivenData]:
    return given(path / "data", write_text, len(WEIGHTS))


def request_in(path: Path) -> TrainRequest:
    bundle = write_bundle(path / "bundle", BUNDLE)
    plan = plan_text([([0, 1, 2], segments_of(bundle), WEIGHTS)])
    return own_request(bundle, steps=STEPS, plan=plan, optimizer=CLIPPING, evaluate_every=4)


@pytest.fixture
def sets(tmp_path: Path) -> list[GivenData]:
    return data_in(tmp_path)


@pytest.fixture
def asked(tmp_path: Path) -> TrainRequest:
    return request_in(tmp_path)


async def undisturbed(
    path: Path, asked: TrainRequest, sets: Sequence[GivenData | None]
) -> TrainResult:
    async with memory_group(path / "whole", len(sets), sets) as group:
        with trio.fail_after(SECONDS_MAX):
            return await group[0].train(asked)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """The undisturbed run, on copies of the same data."""
    path = tmp_path_factory.mktemp("whole")
    return trio.run(undisturbed, path, request_in(path), data_in(path))


def waits(members: list[Member]) -> set[str | None]:
    """What each of them says of its run."""
    found = [member.runs.member for member in members]
    return {None if member is None else run_status_report(member).waits_for for member in found}


async def kill_and_take_back(group: MemoryGroup, index: int, sentence: str) -> Member:
    """Nothing goes on without it, and everybody says whom it takes."""
    group.kill(group[index])
    others = [group[i] for i in range(len(WEIGHTS)) if i != index]
    await until(lambda: waits(others) == {sentence})
    return await group.restart(group[index])


async def test_lost_owner_is_waited_for_and_brings_the_same_bits(
    tmp_path: Path, asked: TrainRequest, sets: list[GivenData], whole: TrainResult
) -> None:
    async with memory_group(tmp_path / "struck", 3, sets) as group:
        run = Disturbed(group)
        with trio.fail_after(SECONDS_MAX):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run.train, asked)
                await run.wait_step(AT)
                sentence = "paused: the data of peer-2 is gone: it takes peer-2 back"
                await kill_and_take_back(group, 2, sentence)
    assert run.result is not None
    assert_same(run.result, whole)


async def test_two_lost_owners_are_waited_for_and_no_force_helps(
    tmp_path: Path, asked: TrainRequest, sets: list[GivenData], whole: TrainResult
) -> None:
    async with memory_group(tmp_path / "struck", 3, sets) as group:
        run = Disturbed(group)
        with trio.fail_after(SECONDS_MAX):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run.train, asked)
                await run.wait_step(AT)
                lost = [group[1], group[2]]
                for member in lost:
                    group.kill(member)
                sentence = (
                    "paused: no quorum (1 of 3: peer-1, peer-2 missing); goes on when enough of "
                    "them are back"
                )
                await until(lambda: waits([group[0]]) == {sentence})
                home = group[0].runs.member
                assert home is not None
                with pytest.raises(PlanInfeasible, match="is gone: it takes"):
                    await home.force()
                for member in lost:
                    await group.restart(member)
    assert run.result is not None
    assert_same(run.result, whole)


@pytest.mark.parametrize("home_owns", [True, False])
async def test_lost_home_peer_is_waited_for_and_ends_the_run(
    tmp_path: Path,
    asked: TrainRequest,
    sets: list[GivenData | None],
    whole: TrainResult,
    home_owns: bool,
) -> None:
    if not home_owns:
        sets[0], asked = None, dataclasses.replace(asked, plan=None)
        whole = await undisturbed(tmp_path, asked, sets)
    async with memory_group(tmp_path / "struck", 3, sets) as group:
        run = Disturbed(group)
        with trio.fail_after(SECONDS_MAX):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run.train, asked)
                await run.wait_step(AT)
                lost = "data of peer-0" if home_owns else "home peer"
                sentence = f"paused: the {lost} is gone: it takes peer-0 back"
                home = await kill_and_take_back(group, 0, sentence)
                nursery.cancel_scope.cancel()
            await until(lambda: home.runs.member is not None)
            await until(lambda: all(m.runs.current_run is None for m in group.members.values()))
    assert_stored([home], whole)


async def test_owner_whose_data_has_changed_is_named_until_it_is_restored(
    tmp_path: Path, asked: TrainRequest, sets: list[GivenData], whole: TrainResult
) -> None:
    async with memory_group(tmp_path / "struck", 3, sets) as group:
        run = Disturbed(group)
        with trio.fail_after(SECONDS_MAX):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run.train, asked)
                await run.wait_step(AT)
                group.kill(group[2])
                turn_round(sets[2])
                changed = await group.restart(group[2])
                sentence = NOT_READ.format("peer-2")
                await until(lambda: waits([group[0], group[1]]) == {sentence})
                here = f"{sentence} (here: the data of peer-2 has changed since the run began)"
                await until(lambda: waits([changed]) == {here})
                group.kill(changed)
                turn_round(sets[2])
                await group.restart(changed)
    assert run.result is not None
    assert_same(run.result, whole)


REFUSED: list[tuple[dict[str, Any], str]] = [  # Any: fields by name
    ({"data": "notes.txt"}, "exclude each other"),
    ({"private": True}, "exclude each other"),
    ({"plan": plan_text([([0, 1, 2], 6, [1, 1, 1])])}, "shares of a step are part of the run"),
]


async def test_resumed_run_takes_its_owners_with_their_data(
    tmp_path: Path, asked: TrainRequest, sets: list[GivenData], whole: TrainResult
) -> None:
    async with memory_group(tmp_path / "resumed", 3, sets) as group:
        with trio.fail_after(SECONDS_MAX):
            stopped = await stopped_after(group, AT, asked)
            again = own_request("", resume=stopped.run, own_data=False, parallelism="pipeline")
            for changes, said in REFUSED:
                with pytest.raises(ConfigError, match=said):
                    await group[0].train(dataclasses.replace(again, **changes))
            turn_round(sets[1])
            with pytest.raises(DataError, match="the data of peer-1 has changed") as refused:
                await group[0].train(again)
            assert "restore it on peer-1" in (refused.value.hint or "")
            turn_round(sets[1])
            group.leave_out(group[2])
            with pytest.raises(PlanInfeasible, match="the data of peer-2: it is not there"):
                await group[0].train(again)
            group.let_in(group[2])
            result = await group[0].train(again)
    assert stopped.stopped
    assert (*stopped.losses, *result.losses) == whole.losses
    assert (result.state_digest, result.heldout_last) == (whole.state_digest, whole.heldout_last)


async def test_owner_whose_battery_is_low_spends_nothing_until_it_is_charged(
    tmp_path: Path, asked: TrainRequest, sets: list[GivenData], whole: TrainResult
) -> None:
    """Nobody can take its part over, so it is told so, and the run waits."""
    async with memory_group(tmp_path / "struck", 3, sets) as group:
        run, low = Disturbed(group), group[1]
        with trio.fail_after(SECONDS_MAX):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run.train, asked)
                await run.wait_step(AT)
                low.leaves = True
                problem = await low.runs.leave()
                assert (
                    problem == "the run trains on this device's own data: it waits until it is back"
                )
                sentence = "paused: peer-1 leaves with its data: it takes peer-1 back"
                await until(lambda: waits(list(group.members.values())) == {sentence})
                low.leaves = False
    assert run.result is not None
    assert_same(run.result, whole)


async def test_conductor_without_data_that_leaves_is_waited_for(
    tmp_path: Path, asked: TrainRequest, sets: list[GivenData | None]
) -> None:
    sets[0], asked = None, dataclasses.replace(asked, plan=None)
    async with memory_group(tmp_path, 3, sets) as group:
        run = Disturbed(group)
        with trio.fail_after(SECONDS_MAX):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run.train, asked)
                await run.wait_step(2)
                group[0].leaves = True
                problem = await group[0].runs.leave()
                assert problem == "this device conducts the run: it waits until it is back"
                sentence = "paused: the home peer leaves: it takes peer-0 back"
                await until(lambda: waits(list(group.members.values())) == {sentence})
                group[0].leaves = False
    assert run.result is not None
    assert len(run.result.losses) == STEPS


async def test_owner_that_looks_through_its_data_again_says_so(
    tmp_path: Path,
    asked: TrainRequest,
    sets: list[GivenData],
    whole: TrainResult,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looked, look = threading.Event(), run_state.owner_samples

    def slow(*rest: Any) -> Samples:  # Any: as it takes them
        looked.wait(SECONDS_MAX)
        return look(*rest)

    async with memory_group(tmp_path / "struck", 3, sets) as group:
        run = Disturbed(group)
        with trio.fail_after(SECONDS_MAX):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run.train, asked)
                await run.wait_step(AT)
                monkeypatch.setattr(run_state, "owner_samples", slow)
                group.kill(group[2])
                back = await group.restart(group[2])
                sentence = NOT_READ.format("peer-2")
                here = f"{sentence} (here: the data is still being looked through)"
                await until(lambda: waits([group[0], group[1]]) == {sentence})
                await until(lambda: waits([back]) == {here})
                looked.set()
    assert run.result is not None
    assert_same(run.result, whole)


async def test_owner_that_cannot_read_its_data_again_says_why_and_ends_nothing(
    tmp_path: Path,
) -> None:
    """Its model's tokenizer lies in the cache; somebody has cleared that meanwhile."""
    bundle, _ = write_tokenized(tmp_path / "bundle", BUNDLE)
    sets = given(tmp_path / "data", write_words, 2)
    cache, kept = tmp_path / "cache-peer-1", tmp_path / "kept"
    async with memory_group(tmp_path, 2, sets) as group:
        run = Disturbed(group)
        with trio.fail_after(SECONDS_MAX):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run.train, own_request(bundle, steps=STEPS))
                await run.wait_step(AT)
                group.kill(group[1])
                cache.rename(kept)
                lacking = await group.restart(group[1])
                sentence = NOT_READ.format("peer-1")
                await until(lambda: waits([group[0]]) == {sentence})
                here = f"{sentence} (here: the bundle lacks tokenizer.json)"
                await until(lambda: waits([lacking]) == {here})
                group.kill(lacking)
                kept.rename(cache)
                await group.restart(lacking)
    assert run.result is not None
    assert len(run.result.losses) == STEPS


async def test_count_that_a_link_took_with_it_holds_nobody_up(
    tmp_path: Path, asked: TrainRequest, sets: list[GivenData], whole: TrainResult
) -> None:
    async with memory_group(tmp_path / "struck", 3, sets) as group:
        run, lost = Disturbed(group), list[object]()

        def drops(message: object) -> bool:
            is_lost = (
                isinstance(message, LabelsCounted)
                and (message.step, message.stamp.view) == (AT, 1)
            )  # fmt: skip
            lost.extend([message] if is_lost else [])
            group.changed.notify()
            return is_lost

        group[1].drops = drops
        with trio.fail_after(SECONDS_MAX):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run.train, asked)
                await group.wait(lambda: bool(lost))
                group.break_link(group[0].device, group[1].device)
                group.heal_link(group[0].device, group[1].device)
    assert run.result is not None
    assert_same(run.result, whole)


async def test_file_that_changes_under_way_ends_the_run_for_all(
    tmp_path: Path, asked: TrainRequest, sets: list[GivenData]
) -> None:
    async with memory_group(tmp_path, 3, sets) as group:

        async def change() -> None:
            await Disturbed(group).wait_step(2)
            turn_round(sets[1])

        with trio.fail_after(SECONDS_MAX):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(change)
                with pytest.raises(DataError, match="has changed while it is in use") as ended:
                    await group[0].train(asked)
            await until(lambda: all(m.runs.current_run is None for m in group.members.values()))
        failures = {m.runs.last_failure for m in group.members.values()}
    assert sets[1].path in ended.value.message
    assert len(failures) == 3 - 1, "peer-0 and peer-2 say who told them"
