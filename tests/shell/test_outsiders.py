"""Replicas that only a device outside of the view keeps: of one that leaves, or was left out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from p2ptrain.agreement.view import View
from p2ptrain.ids import DeviceId
from p2ptrain.planner.profile import KindCost
from p2ptrain.runtime.reports import TrainResult
from p2ptrain.training.messages import SegmentSaved
from tests.disturbed_runs import (
    BUNDLE,
    SECONDS_MAX,
    Disturbed,
    assert_same,
    copies,
    request,
    undisturbed,
)
from tests.memory_group import Member, MemoryGroup, memory_group, until


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    return undisturbed(tmp_path_factory.mktemp("alone"))


@pytest.fixture(autouse=True)
def equal_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    cost = KindCost(forward_ns=1_000_000, backward_ns=2_000_000)
    costs = dict.fromkeys(BUNDLE.manifest.kinds, cost)
    monkeypatch.setattr(
        "p2ptrain.runtime.compute.known_profiles.profile_kinds", lambda *_, **__: costs
    )


def view_of(group: MemoryGroup) -> View:
    member = group[0].runs.member
    assert member is not None
    assert member.view is not None
    return member.view


def owner_and_keeper(group: MemoryGroup) -> tuple[Member, Member]:
    """A stage's peer and who keeps its replicas, neither of them the home peer."""
    plan = view_of(group).plan
    pairs = zip(plan.stages, plan.replicas, strict=True)
    stage, keeper = next(
        (s, k) for s, k in pairs if k is not None and plan.home not in (s.device, k)
    )
    return group.members[stage.device], group.members[keeper]


@contextmanager
def no_replicas_after(owner: Member, view: View) -> Iterator[None]:
    """The owner's snapshots of later views reach nobody."""
    owner.drops = lambda m: isinstance(m, SegmentSaved) and m.stamp.view > view.number
    yield
    owner.drops = lambda message: False


def is_protected(group: MemoryGroup) -> bool:
    """Since a replica set that is not the drawn one."""
    member = group[0].runs.member
    if member is None:
        return False
    has_data = all(len(copies(m)) == 2 for m in group.members.values())
    return has_data and (member.state.whole_step or 0) > 0


async def lose(group: MemoryGroup, owner: Member, without: DeviceId, run: Disturbed) -> View:
    """Kill the owner as soon as the view without that keeper works."""
    await until(lambda: without not in view_of(group).members)
    view = view_of(group)
    await run.wait_step(view.resume_step + 1)
    group.kill(owner)
    return view


async def test_left_out_device_that_is_back_gives_the_only_replica(
    tmp_path: Path, alone: TrainResult
) -> None:
    async with memory_group(tmp_path, 4) as group:
        run = Disturbed(group)
        with trio.fail_after(2 * SECONDS_MAX):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run.train, request(tmp_path, stages=4))
                await until(lambda: is_protected(group))
                owner, keeper = owner_and_keeper(group)
                with no_replicas_after(owner, view_of(group)):
                    for device in group.members:
                        if device != keeper.device:
                            group.break_link(device, keeper.device)
                    await lose(group, owner, keeper.device, run)
                home = group[0].runs.member
                assert home is not None
                await until(lambda: home.paused is not None)
                assert "is lost: it takes" in home.paused.reason
                for device in group.members:
                    if device not in (keeper.device, owner.device):
                        group.heal_link(device, keeper.device)
                await until(lambda: owner.device not in view_of(group).members)
                restoration = view_of(group).restoration
        assert restoration is not None
        givers = {at.device for replay in restoration.replays for at in replay.replicas}
        assert givers == {keeper.device}
    assert run.result is not None
    assert_same(run.result, alone)


async def test_who_leaves_stays_until_what_it_kept_is_kept_elsewhere(
    tmp_path: Path, alone: TrainResult
) -> None:
    async with memory_group(tmp_path, 4) as group:
        run = Disturbed(group)
        said: list[str | None] = []

        async def leave(keeper: Member) -> None:
            keeper.leaves = True
            said.append(await keeper.runs.leave())

        with trio.fail_after(2 * SECONDS_MAX):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run.train, request(tmp_path, stages=4))
                await until(lambda: is_protected(group))
                owner, keeper = owner_and_keeper(group)
                with no_replicas_after(owner, view_of(group)):
                    nursery.start_soon(leave, keeper)
                    await lose(group, owner, keeper.device, run)
                    assert said == []
                await until(lambda: owner.device not in view_of(group).members)
                restoration = view_of(group).restoration
                assert restoration is not None
                await until(lambda: bool(said))
        givers = {at.device for replay in restoration.replays for at in replay.replicas}
        assert givers == {keeper.device}
    assert said == [None]
    assert run.result is not None
    assert_same(run.result, alone)
