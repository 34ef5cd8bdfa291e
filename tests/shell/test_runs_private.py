"""Private runs: both ends on the data's owner, the bits of one peer, and no data on any wire."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import trio

from p2ptrain.errors import ConfigError
from p2ptrain.ids import DeviceId, RunId
from p2ptrain.runtime.planning.job import Job, open_job
from p2ptrain.runtime.reports import TrainRequest, TrainResult
from p2ptrain.runtime.runs.run_status import run_status_report
from p2ptrain.store.bundles import Bundle, shipped_bundles
from p2ptrain.training.messages import Wanted, stamp_of
from p2ptrain.training.minibatch import read_minibatch
from p2ptrain.training.program import Item
from tests.disturbed_runs import (
    BUNDLE,
    SECONDS_MAX,
    Disturbed,
    assert_same,
    assert_stored,
    request,
    undisturbed,
)
from tests.memory_group import (
    MemoryGroup,
    memory_group,
    request_for,
    stopped_after,
    until,
)
from tests.shell.test_runs_shipped import write_arrays
from tests.shell.test_runs_tied import BUNDLE as TIED_BUNDLE

TOKENS_MIN = 8
"""Of a row of tokens: shorter ones could come about by chance."""
PIECE_BYTES = 40
OPEN = "".join(
    f'[[stage]]\ndevices = ["peer-{peer}"]\nsegments = {count}\n'
    for peer, count in ((1, 1), (0, 1), (2, "{rest}"))
)
"""An ordinary plan, both ends of it away from the data."""


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """The undisturbed run on one member."""
    return undisturbed(tmp_path_factory.mktemp("alone"))


def texts(path: Path, **changes: object) -> TrainRequest:
    """Windows of a text: inputs and labels are rows of tokens."""
    return request_for(path, BUNDLE, steps=4, evaluate_every=2, replicate_every=2, **changes)


def pictures(path: Path, **changes: object) -> TrainRequest:
    """Pictures and their classes."""
    base = TrainRequest(
        bundle=str(shipped_bundles()["mlp"]), data=str(write_arrays(path)), steps=3,
        microbatches=2, microbatch_size=6, heldout_microbatches=1, threads=1, checkpoint_every=2,
    )  # fmt: skip
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]  # fields by name


REQUESTS = {"texts": texts, "pictures": pictures}


def job_of(asked: TrainRequest, path: Path) -> Job:
    return open_job(asked, runs_path=path / "looked", new_run=RunId("0" * 32), default_threads=1)


def traces(asked: TrainRequest, path: Path) -> dict[str, set[bytes]]:
    """What a wire that carries the data would show: each fed row as it is fed and as tokens of
    other widths, each microbatch's labels, and pieces of the file itself."""
    job = job_of(asked, path)
    found: dict[str, set[bytes]] = defaultdict(set)
    items = [Item(kind="train", step=step) for step in range(1, asked.steps + 1)]
    items += [Item(kind="evaluate", step=step) for step in range(asked.steps + 1)]
    for item in items:
        read = read_minibatch(job.samples, job.contract, job.bundle.manifest.loss, item)
        for microbatch in range(len(read.feeds)):
            (inputs,) = read.arrays("input", microbatch)
            labels, _ = read.arrays("labels", microbatch)
            found["inputs"] |= set(forms(inputs))
            found["labels"] |= set(forms(labels)) if labels.ndim > 1 else {labels.tobytes()}
    file = Path(asked.data).read_bytes()
    pieces = (file[at : at + PIECE_BYTES] for at in range(0, len(file), 8 * PIECE_BYTES))
    found["file"] = {piece for piece in pieces if len(piece) == PIECE_BYTES}
    return found


def forms(rows: np.ndarray) -> Iterator[bytes]:
    """Each row's beginning, at every width that it could travel in."""
    for row in rows:
        start = row.reshape(-1)[: max(TOKENS_MIN, row.size // 2)]
        yield start.tobytes()
        if row.dtype.kind == "i":
            for dtype in (np.uint8, np.int32, np.uint16, np.float32):
                yield start.astype(dtype).tobytes()


class Watcher:
    """Everything that devices of a group send to others."""

    def __init__(self, group: MemoryGroup) -> None:
        self.sent: dict[DeviceId, bytearray] = defaultdict(bytearray)
        group.on_sent = self._note

    def _note(self, sender: DeviceId, content: bytes) -> None:
        self.sent[sender] += content

    def shows(self, marks: dict[str, set[bytes]]) -> dict[str, int]:
        """How many of the marks somebody has sent, by their name."""
        wires = [bytes(each) for each in self.sent.values()]
        return {
            name: sum(any(mark in wire for wire in wires) for mark in own)
            for name, own in marks.items()
        }


async def train(
    path: Path, asked: TrainRequest, *, members: int
) -> tuple[TrainResult, MemoryGroup, Watcher]:
    async with memory_group(path, members) as group:
        watcher = Watcher(group)
        with trio.fail_after(SECONDS_MAX):
            result = await group[0].train(asked)
            await until(lambda: all(m.runs.current_run is None for m in group.members.values()))
    return result, group, watcher


def stages(group: MemoryGroup) -> list[DeviceId]:
    """By stage, its device."""
    plan = group.reports("plan")[0]
    return [stage.device for stage in plan.stages]  # type: ignore[attr-defined]  # a PlanReport


@pytest.mark.parametrize("data", REQUESTS)
async def test_neither_inputs_nor_labels_leave_their_owner(tmp_path: Path, data: str) -> None:
    ask, members = REQUESTS[data], {"texts": 2, "pictures": 3}[data]
    one, _, _ = await train(tmp_path / "one", ask(tmp_path), members=1)
    marks = traces(ask(tmp_path), tmp_path)
    assert all(marks.values())
    asked = ask(tmp_path, stages=members + 1, private=True)
    result, group, watcher = await train(tmp_path / "private", asked, members=members)
    assert_same(result, one)
    assert stages(group) == [group[0].device, *stages(group)[1:-1], group[0].device]
    assert len(set(stages(group))) == members
    assert len(watcher.sent[group[0].device]) > 10_000
    assert watcher.shows(marks) == dict.fromkeys(marks, 0)
    # An ordinary run sends both, so what is looked for can be seen.
    rest = len(job_of(ask(tmp_path), tmp_path).bundle.manifest.segments) - 2
    open_plan = OPEN.replace("{rest}", str(rest))
    result, _, watcher = await train(tmp_path / "open", ask(tmp_path, plan=open_plan), members=3)
    assert_same(result, one)
    shown = watcher.shows(marks)
    assert min(shown["inputs"], shown["labels"]) > 0


@pytest.mark.parametrize("schedule", ["gpipe", "eager-1f1b", "eager-zb-h1"])
async def test_schedules_keep_the_bits(tmp_path: Path, alone: TrainResult, schedule: str) -> None:
    asked = request(tmp_path, private=True, stages=4, schedule=schedule)
    result, _, _ = await train(tmp_path, asked, members=3)
    assert_same(result, alone)


@pytest.mark.parametrize("stage_count", [3, 5])
async def test_tied_tensors_have_one_gradient_at_both_ends(
    tmp_path: Path, stage_count: int
) -> None:
    def asked(**changes: object) -> TrainRequest:
        return request_for(tmp_path, TIED_BUNDLE, **changes)

    one, _, _ = await train(tmp_path / "one", asked(), members=1)
    private = asked(private=True, stages=stage_count)
    result, _, _ = await train(tmp_path, private, members=stage_count - 1)
    assert_same(result, one)


@pytest.mark.parametrize("stage_count", [3, 4])
async def test_lost_middle_stage_is_made_again_from_the_owners_logs(
    tmp_path: Path, alone: TrainResult, stage_count: int
) -> None:
    """The owner takes it over, or the others do; nothing of the data goes to them for it."""
    async with memory_group(tmp_path, 3) as group:
        run, watcher = Disturbed(group), Watcher(group)
        asked = request(tmp_path, private=True, stages=stage_count)
        with trio.fail_after(SECONDS_MAX):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run.train, asked)
                await run.wait_step(8)
                lost = run.stage_devices()[1]
                group.kill(group.members[lost])
    assert run.result is not None
    assert_same(run.result, alone)
    marks = traces(asked, tmp_path)
    assert watcher.shows(marks) == dict.fromkeys(marks, 0)


@pytest.mark.parametrize("bundle", [BUNDLE, TIED_BUNDLE], ids=["untied", "tied"])
async def test_run_waits_for_its_owner_and_goes_on_with_it(tmp_path: Path, bundle: Bundle) -> None:
    def asked(folder: str, **changes: object) -> TrainRequest:
        (tmp_path / folder).mkdir(exist_ok=True)
        how = {"steps": 20, "replicate_every": 3, **changes}
        return request_for(tmp_path / folder, bundle, **how)

    one, _, _ = await train(tmp_path / "one", asked("one"), members=1)
    async with memory_group(tmp_path, 3) as group:
        run, watcher = Disturbed(group), Watcher(group)
        wanted = asked("private", private=True, stages=4, checkpoint_every=0)
        with trio.fail_after(SECONDS_MAX):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run.train, wanted)
                await run.wait_step(8)
                group.kill(group[0])
                nursery.cancel_scope.cancel()
            others = [group[1], group[2]]
            sentence = "paused: nobody who is left has the run's data: it takes peer-0 back"
            await until(lambda: {run_status_report(m.runs.member).waits_for for m in others}
                        == {sentence})  # fmt: skip
            home = await group.restart(group[0])
            await until(lambda: home.runs.member is not None)
            await until(lambda: all(m.runs.current_run is None for m in group.members.values()))
    assert_stored([home], one)
    marks = traces(wanted, tmp_path)
    assert watcher.shows(marks) == dict.fromkeys(marks, 0)


async def test_who_asks_for_the_data_loses_its_link(tmp_path: Path, alone: TrainResult) -> None:
    async with memory_group(tmp_path, 3) as group:
        run, watcher = Disturbed(group), Watcher(group)
        asked = request(tmp_path, private=True, stages=3)
        with trio.fail_after(SECONDS_MAX):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run.train, asked)
                await run.wait_step(3)
                home = group[0].runs.member
                assert home is not None
                assert home.plan is not None
                stamp, pair = stamp_of(home.plan), (group[0].device, group[1].device)
                group[1].send(pair[0], Wanted(stamp=stamp, what="labels", segment=0, step=1))
                await until(lambda: frozenset(pair) in group.broken)
    assert run.result is not None
    assert_same(run.result, alone)
    marks = traces(asked, tmp_path)
    assert watcher.shows(marks) == dict.fromkeys(marks, 0)


async def test_newcomer_comes_between_the_ends(tmp_path: Path, alone: TrainResult) -> None:
    async with memory_group(tmp_path, 3) as group:
        group.leave_out(group[2])
        run = Disturbed(group)
        with trio.fail_after(SECONDS_MAX):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run.train, request(tmp_path, private=True, stages=3))
                await run.wait_step(3)
                async with group.held_link(group[0].device, group[1].device):
                    group.let_in(group[2])  # the run stands still: it does not end before
                    await until(lambda: group[2].device in plan_members(group))
    assert run.result is not None
    assert_same(run.result, alone)


def plan_members(group: MemoryGroup) -> tuple[DeviceId, ...]:
    home = group[0].runs.member
    return () if home is None or home.view is None else home.view.members


async def test_status_names_both_stages(tmp_path: Path) -> None:
    async with memory_group(tmp_path, 2) as group:
        run = Disturbed(group)
        with trio.fail_after(SECONDS_MAX):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run.train, request(tmp_path, private=True, stages=3))
                await run.wait_step(2)
                members = run_status_report(group[0].runs.member).members
                assert members == (
                    "peer-0: stages 1 and 3 of 3, feeds the data", "peer-1: stage 2 of 3",
                )  # fmt: skip
                group[0].runs.stop()


async def test_private_run_stays_private_when_it_is_resumed(tmp_path: Path) -> None:
    asked = request(tmp_path, private=True, stages=3, checkpoint_every=2)
    async with memory_group(tmp_path, 2) as group:
        stopped = await stopped_after(group, 3, asked)
        watcher = Watcher(group)
        for changes in ({"plan": OPEN.format(rest=4)}, {"stages": 2}):
            with pytest.raises(ConfigError, match="private run"):
                await group[0].train(request_for(tmp_path, BUNDLE, resume=stopped.run, **changes))
        with trio.fail_after(SECONDS_MAX):
            result = await group[0].train(request_for(tmp_path, BUNDLE, resume=stopped.run))
    assert result.first_step > 0
    marks = traces(asked, tmp_path)
    assert watcher.shows(marks) == dict.fromkeys(marks, 0)


REFUSED = {
    "data parallelism": ({"parallelism": "data"}, "a private run is a pipeline"),
    "tensor parallelism": ({"parallelism": "tensor"}, "a private run is a pipeline"),
    "two stages": ({"stages": 2}, "a private run has one stage"),
    "a plan": ({"plan": '[[stage]]\ndevices = ["a"]\nsegments = 6\n'}, "exclude each other"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_private_run_cannot_be_is_refused(case: str, tmp_path: Path) -> None:
    changes, sentence = REFUSED[case]
    with pytest.raises(ConfigError, match=sentence) as refused:
        job_of(request(tmp_path, private=True, **changes), tmp_path)
    assert refused.value.hint
