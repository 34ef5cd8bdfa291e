"""What goes wrong around a run: who declines, refuses, keeps silent, dies between two messages.

The clock is virtual and stands still: whatever a test does not jump over cannot time out.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import pytest
import trio
from trio.testing import MockClock

from p2ptrain import limits
from p2ptrain.agreement.journal import DecidedRecord
from p2ptrain.agreement.messages import Decided, Propose
from p2ptrain.agreement.run_messages import RUN_MESSAGES
from p2ptrain.engine.contract import Engine
from p2ptrain.errors import (
    CheckpointError,
    EngineError,
    Interrupted,
    P2PTrainError,
    PeerLost,
    PlanInfeasible,
    RemoteProtocolError,
)
from p2ptrain.ids import Digest, RunId, ViewNumber
from p2ptrain.runtime.compute.stage import StageWorker
from p2ptrain.runtime.keeping.run_state import RunState
from p2ptrain.runtime.reports import NoteReport, TrainRequest, TrainResult
from p2ptrain.runtime.runs.run_member import BEGIN_WITHIN_S
from p2ptrain.training.messages import (
    Abort,
    Begin,
    Declined,
    Done,
    Evaluated,
    Offer,
    Profiled,
    Ready,
    SegmentSaved,
    stamp_of,
)
from tests.bundles import tiny_bundle
from tests.memory_group import (
    MEMORY_BYTES,
    SECONDS_MAX,
    Member,
    MemoryGroup,
    memory_group,
    request_for,
    until,
)

BUNDLE = tiny_bundle()
T = TypeVar("T")


def request(path: Path, **changes: object) -> TrainRequest:
    return request_for(path, BUNDLE, **{"steps": 2, **changes})


def notes(group: MemoryGroup) -> list[str]:
    return [report.text for report in group.reports("note") if isinstance(report, NoteReport)]


def heard(member: Member, kind: type[T]) -> list[T]:
    return [message for message in member.received if isinstance(message, kind)]


class Outcome:
    """How a `train` that runs beside the test ends."""

    def __init__(self) -> None:
        self.result: TrainResult | None = None
        self.error: P2PTrainError | None = None

    async def of(self, member: Member, wanted: TrainRequest) -> None:
        try:
            self.result = await member.train(wanted)
        except P2PTrainError as error:
            self.error = error


async def until_idle(*members: Member) -> None:
    await until(lambda: all(m.runs.current_run is None for m in members))


class Gate:
    """Holds a member's decision back from its disk."""

    def __init__(self) -> None:
        self.opened = trio.Event()

    async def durable(self, records: Sequence[object]) -> None:
        if any(isinstance(record, DecidedRecord) for record in records):
            await self.opened.wait()


async def test_member_that_never_answers_is_left_out(tmp_path: Path, mock_clock: MockClock) -> None:
    async with memory_group(tmp_path, 3) as group:
        group[2].drops = lambda message: isinstance(message, Profiled)
        outcome = Outcome()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(outcome.of, group[0], request(tmp_path, stages=2))
            await until(lambda: len(heard(group[0], Profiled)) == 2)
            mock_clock.jump(limits.OFFER_TIMEOUT_S)
        assert outcome.result is not None
        assert outcome.result.stages == 2
        assert "peer-2 takes no part: it did not answer in time" in notes(group)
        await until(lambda: group[2].runs.statistics().prepared_count == 1)
        mock_clock.jump(limits.OFFER_KEPT_S)
        await until(lambda: group[2].runs.statistics().prepared_count == 0)


def fails_with(error: Exception) -> Callable[[int], Engine]:
    def open_nothing(threads: int) -> Engine:
        raise error

    return open_nothing


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (EngineError("onnxruntime is damaged"), "onnxruntime is damaged"),
        (MemoryError(), "not enough memory"),
        (ValueError("odd"), "ValueError: odd"),
        (OSError("disk gone"), "OSError: disk gone"),
    ],
)
async def test_member_without_an_engine_declines(
    tmp_path: Path, mock_clock: MockClock, error: Exception, reason: str
) -> None:
    async with memory_group(tmp_path, 2) as group:
        group[1].open_engine = fails_with(error)
        result = await group[0].train(request(tmp_path))
        assert result.stages == 1
        assert f"peer-1 takes no part: {reason}" in notes(group)
        assert group[1].runs.statistics().prepared_count == 0


async def test_nobody_able_is_infeasible_and_says_why(
    tmp_path: Path, mock_clock: MockClock
) -> None:
    async with memory_group(tmp_path, 2) as group:
        for index in (0, 1):
            group[index].open_engine = fails_with(EngineError("broken"))
        with pytest.raises(PlanInfeasible, match="no peer"):
            await group[0].train(request(tmp_path))
        assert sum("takes no part" in note for note in notes(group)) == 2
        await until_idle(group[0], group[1])
        assert not group[0].runs_path.exists()


async def test_member_that_is_gone_when_it_is_asked_is_left_out(
    tmp_path: Path, mock_clock: MockClock
) -> None:
    async with memory_group(tmp_path, 3) as group:
        group.break_link(group[0].device, group[2].device)
        result = await group[0].train(request(tmp_path))
        assert "peer-2 takes no part: it went away" in notes(group)
        assert result.peers <= 2


async def test_member_that_dies_while_it_measures_is_left_out(
    tmp_path: Path, mock_clock: MockClock
) -> None:
    async with memory_group(tmp_path, 2) as group:
        group[1].drops = lambda message: isinstance(message, Profiled)
        outcome = Outcome()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(outcome.of, group[0], request(tmp_path))
            await until(lambda: group[1].runs.statistics().prepared_count == 1)
            group.kill(group[1])
        assert outcome.result is not None
        assert "peer-1 takes no part: it went away" in notes(group)


class ShrinkingMemory:
    """Enough when it is measured, too little when the plan comes."""

    def __init__(self) -> None:
        self.asked_count = 0

    def __call__(self) -> int:
        self.asked_count += 1
        return MEMORY_BYTES if self.asked_count == 1 else 1


async def test_member_that_refuses_is_named_and_the_run_can_be_resumed(
    tmp_path: Path, mock_clock: MockClock
) -> None:
    async with memory_group(tmp_path, 2) as group:
        wanted = request(tmp_path, stages=2)
        first = await group[0].train(wanted)
        again = request(tmp_path, resume=first.run, stages=2)
        group[1].memory_bytes = ShrinkingMemory()
        with pytest.raises(PlanInfeasible, match="peer-1 refused: its stage needs"):
            await group[0].train(again)
        await until_idle(group[0], group[1])
        assert group[0].runs.statistics().prepared_count == 0
        await until(lambda: group[1].runs.statistics().prepared_count == 0)
        # Home has accepted its own plan for that view: the next attempt takes another.
        group[1].memory_bytes = lambda: MEMORY_BYTES
        second = await group[0].train(again)
        assert (second.stages, second.first_step) == (2, 2)


async def test_begin_waits_for_a_slow_disk(tmp_path: Path, mock_clock: MockClock) -> None:
    async with memory_group(tmp_path, 2) as group:
        gate, outcome = Gate(), Outcome()
        group[1].durable = gate.durable
        async with trio.open_nursery() as nursery:
            nursery.start_soon(outcome.of, group[0], request(tmp_path, stages=2))
            await until(lambda: bool(heard(group[1], Begin)))
            assert not group[1].runs.statistics().taking_part
            gate.opened.set()
        assert outcome.result is not None
        assert outcome.result.steps == 2


async def test_abort_ahead_of_the_decision_ends_the_part(
    tmp_path: Path, mock_clock: MockClock
) -> None:
    async with memory_group(tmp_path, 3) as group:
        gate, outcome = Gate(), Outcome()
        group[1].durable = gate.durable
        async with trio.open_nursery() as nursery:
            nursery.start_soon(outcome.of, group[0], request(tmp_path, stages=3))
            await until(lambda: bool(heard(group[1], Begin)))
            group.kill(group[2])
            await until(lambda: bool(heard(group[1], Abort)))
            gate.opened.set()
        assert isinstance(outcome.error, PeerLost)
        assert "peer-2" in outcome.error.message
        await until(lambda: group[1].activities[-1:] == ["idle"])
        assert "peer-2" in (group[1].runs.last_failure or "")
        assert group[1].runs.current_run is None
        result = await group[0].train(request(tmp_path, stages=2))
        assert result.steps == 2


async def test_home_that_dies_between_decision_and_begin_leaves_nobody_waiting(
    tmp_path: Path, mock_clock: MockClock
) -> None:
    async with memory_group(tmp_path, 3) as group:
        gate, outcome = Gate(), Outcome()
        group[1].durable = gate.durable
        async with trio.open_nursery() as nursery:
            nursery.start_soon(outcome.of, group[0], request(tmp_path, stages=3))
            await until(lambda: bool(heard(group[1], Decided)) and bool(heard(group[2], Begin)))
            group.kill(group[0])
            nursery.cancel_scope.cancel()
        gate.opened.set()
        await until_idle(group[1], group[2])
        await until(lambda: group[1].runs.statistics().prepared_count == 0)
        result = await group[1].train(request(tmp_path, stages=2))
        assert result.steps == 2


async def test_home_that_never_begins_is_given_up(tmp_path: Path, mock_clock: MockClock) -> None:
    async with memory_group(tmp_path, 2) as group:
        group[0].drops = lambda message: isinstance(message, (Begin, Abort, *RUN_MESSAGES))
        outcome = Outcome()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(outcome.of, group[0], request(tmp_path, stages=2))
            await until(lambda: group[1].runs.statistics().taking_part)
            await until(lambda: bool(heard(group[0], Ready)))
            mock_clock.jump(limits.PREPARE_TIMEOUT_S)
        assert isinstance(outcome.error, PeerLost)
        assert "peer-1 did not get ready within 120 s" in outcome.error.message
        assert group[1].runs.current_run is not None
        mock_clock.jump(limits.PROPOSAL_TIMEOUT_S)
        await until_idle(group[1])
        assert "home peer peer-0 did not begin" in (group[1].runs.last_failure or "")


async def test_slow_disk_of_ones_own_gives_the_home_peer_no_more_time(
    tmp_path: Path, mock_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_disk, opened = RunState.open_disk, threading.Event()

    def slowly(state: RunState) -> None:
        if state.services.host == "peer-1":
            opened.wait(SECONDS_MAX)
        open_disk(state)

    monkeypatch.setattr(RunState, "open_disk", slowly)
    async with memory_group(tmp_path, 2) as group:
        group[0].drops = lambda message: isinstance(message, (Begin, Abort, *RUN_MESSAGES))
        outcome = Outcome()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(outcome.of, group[0], request(tmp_path, stages=2))
            await until(lambda: bool(heard(group[0], Ready)))
            mock_clock.jump(BEGIN_WITHIN_S)
        opened.set()
        await until_idle(group[1])
        assert "home peer peer-0 did not begin" in (group[1].runs.last_failure or "")


async def test_decision_that_nobody_promised_is_answered_with_abort(
    tmp_path: Path, mock_clock: MockClock
) -> None:
    async with memory_group(tmp_path, 2) as group:
        await group[0].train(request(tmp_path, stages=2))
        await until_idle(group[1])
        (proposal,) = heard(group[1], Propose)
        group[1].runs.decided(proposal.plan, proposal.contract)
        assert group[1].runs.current_run is None
        await until(lambda: bool(heard(group[0], Abort)))
        (abort,) = heard(group[0], Abort)
        assert "peer-1 is not ready for this run any more" in abort.reason


async def test_engine_that_went_before_the_decision_ends_the_run(
    tmp_path: Path, mock_clock: MockClock
) -> None:
    async with memory_group(tmp_path, 2) as group:
        gate, outcome = Gate(), Outcome()
        group[1].durable = gate.durable
        async with trio.open_nursery() as nursery:
            nursery.start_soon(outcome.of, group[0], request(tmp_path, stages=2))
            await until(lambda: bool(heard(group[1], Begin)))
            mock_clock.jump(limits.OFFER_KEPT_S)
            await until(lambda: group[1].runs.statistics().prepared_count == 0)
            gate.opened.set()
        assert isinstance(outcome.error, PeerLost)
        await until_idle(group[0], group[1])


async def test_peer_promises_itself_to_one_plan_at_a_time(
    tmp_path: Path, mock_clock: MockClock
) -> None:
    async with memory_group(tmp_path, 2) as group:
        gate, outcome = Gate(), Outcome()
        group[1].durable = gate.durable
        async with trio.open_nursery() as nursery:
            nursery.start_soon(outcome.of, group[0], request(tmp_path, stages=2))
            await until(lambda: bool(heard(group[1], Begin)))
            (proposal,) = heard(group[1], Propose)
            other = dataclasses.replace(proposal.plan, run=RunId("q" * 26))
            reason = group[1].runs.consider(other, proposal.contract)
            assert reason == f"busy with run {proposal.plan.run[:8]}"
            gate.opened.set()
        assert outcome.result is not None


async def test_two_homes_at_once_both_end(tmp_path: Path, mock_clock: MockClock) -> None:
    async with memory_group(tmp_path, 2) as group:
        outcomes = [Outcome(), Outcome()]
        async with trio.open_nursery() as nursery:
            for index, outcome in enumerate(outcomes):
                nursery.start_soon(outcome.of, group[index], request(tmp_path))
        assert any(outcome.result is not None for outcome in outcomes)
        errors = [outcome.error for outcome in outcomes if outcome.error is not None]
        assert all("busy" in error.message for error in errors)
        await until_idle(group[0], group[1])


@pytest.mark.parametrize("moment", ["offer", "propose", "begin", "step"])
async def test_cancelled_session_leaves_nothing_and_breaks_no_link(
    tmp_path: Path, mock_clock: MockClock, moment: str
) -> None:
    kinds = {"offer": Offer, "propose": Propose, "begin": Begin}
    async with memory_group(tmp_path, 3) as group:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(group[0].train, request(tmp_path, stages=3, steps=500))
            if moment == "step":
                await until(lambda: len(group.reports("step")) == 2)
            else:
                await until(lambda: bool(heard(group[1], kinds[moment])))
            nursery.cancel_scope.cancel()
        await until_idle(*group.members.values())
        mock_clock.jump(limits.OFFER_KEPT_S)
        for member in group.members.values():
            await until(lambda m=member: m.runs.statistics().prepared_count == 0)
            assert member.blobs.statistics().published_count == 0
        assert not group.broken
        result = await group[0].train(request(tmp_path, stages=3))
        assert result.steps == 2


async def test_every_member_reports_the_plan_and_what_it_does(
    tmp_path: Path, mock_clock: MockClock
) -> None:
    async with memory_group(tmp_path, 2) as group:
        outcome = Outcome()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(outcome.of, group[0], request(tmp_path, stages=2, steps=20))
            await until(lambda: bool(group.reports("step")))
            (plan,) = group.reports("plan")
            assert group[0].runs.plan_report == group[1].runs.plan_report == plan
        assert outcome.result is not None
        await until_idle(group[1])
        assert group[1].runs.plan_report is None
        said = {group[0].activities[0], group[1].activities[0]}
        run = outcome.result.run[:8]
        assert said == {f"run {run}, stage 1 of 2", f"run {run}, stage 2 of 2"}
        assert group[1].activities[1:] == ["idle"]


@pytest.mark.parametrize("error", [EngineError("kernel died"), MemoryError("arena")])
async def test_engine_that_dies_in_a_step_ends_the_run_not_the_peer(
    tmp_path: Path,
    mock_clock: MockClock,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    update = StageWorker.update

    def dies(self: StageWorker, *, step: int, learning_rate: float, clip_scale: float) -> None:
        if step == 2:
            raise error
        update(self, step=step, learning_rate=learning_rate, clip_scale=clip_scale)

    async with memory_group(tmp_path, 2) as group:
        with monkeypatch.context() as patch:
            patch.setattr(StageWorker, "update", dies)
            with pytest.raises(EngineError, match=r"kernel died|not enough memory: arena"):
                await group[0].train(request(tmp_path, stages=2))
            await until_idle(group[0], group[1])
        result = await group[0].train(request(tmp_path, stages=2))
        assert result.steps == 2


async def test_disk_that_refuses_a_checkpoint_ends_the_run_not_the_peer(
    tmp_path: Path, mock_clock: MockClock
) -> None:
    async with memory_group(tmp_path, 2) as group:

        def spoil(name: str, report: object) -> None:
            if name == "plan":
                (run,) = group[0].runs_path.iterdir()
                (run / "checkpoints").write_text("a file where a directory should be")

        with pytest.raises(CheckpointError, match="cannot be stored"):
            await group[0].runs.train(request(tmp_path, stages=2), spoil)
        await until_idle(group[0], group[1])
        assert "cannot be stored" in (group[1].runs.last_failure or "")


async def test_damaged_checkpoint_is_not_resumed(tmp_path: Path, mock_clock: MockClock) -> None:
    async with memory_group(tmp_path, 2) as group:
        first = await group[0].train(request(tmp_path, stages=2))
        folder = group[0].runs_path / first.run / "checkpoints" / "step-00000002"
        path = folder / "segment-0003.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        with pytest.raises(
            CheckpointError, match=r"segment-0003\.safetensors of step 2 is damaged"
        ):
            await group[0].train(request(tmp_path, resume=first.run, stages=2))
        await until_idle(group[0], group[1])
        assert group[0].blobs.statistics().published_count == 0


WRONG = {
    "sums": lambda stamp: Done(stamp=stamp, step=1, square_sums=b"", loss=None, skip=False),
    "step": lambda stamp: Done(
        stamp=stamp, step=501, square_sums=bytes(8 * 4), loss=None, skip=False
    ),
    "segment": lambda stamp: SegmentSaved(
        stamp=stamp, step=1, segment=4000, state=Digest("0" * 64), checkpoint=True
    ),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
async def test_member_that_talks_nonsense_ends_the_run_not_the_peer(
    tmp_path: Path, mock_clock: MockClock, wrong: str
) -> None:
    async with memory_group(tmp_path, 2) as group:
        outcome = Outcome()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(outcome.of, group[0], request(tmp_path, stages=2, steps=500))
            await until(lambda: bool(group.reports("step")))
            stamp = stamp_of(heard(group[1], Propose)[0].plan)
            group[1].send(group[0].device, WRONG[wrong](stamp))
        assert isinstance(outcome.error, RemoteProtocolError)
        await until_idle(group[0], group[1])


async def test_messages_of_other_runs_and_strangers_change_nothing(
    tmp_path: Path, mock_clock: MockClock
) -> None:
    async with memory_group(tmp_path, 3) as group:
        outcome = Outcome()
        group[2].open_engine = fails_with(EngineError("it only watches"))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(outcome.of, group[0], request(tmp_path, stages=2, steps=10))
            await until(lambda: bool(group.reports("step")))
            stamp = stamp_of(heard(group[1], Propose)[0].plan)
            stale = dataclasses.replace(stamp, view=ViewNumber(9))
            abort = Abort(stamp=stamp, error="PeerLost", reason="says a stranger")
            group[2].send(group[0].device, abort)
            group[1].send(group[0].device, dataclasses.replace(abort, stamp=stale))
            middle = 1 - [s.name for s in group[0].runs.plan_report.stages].index("peer-1")  # type: ignore[union-attr]  # a run goes on
            liar = group[1] if middle else group[2]
            liar.send(group[0].device, Evaluated(stamp=stale, step=1, loss=0.0))
        assert outcome.result is not None
        assert len(outcome.result.losses) == 10


@pytest.mark.parametrize("size", [-1, limits.MANIFEST_BYTES_MAX + 1, 1 << 60])
async def test_offer_of_a_wild_size_is_declined(
    tmp_path: Path, mock_clock: MockClock, size: int
) -> None:
    async with memory_group(tmp_path, 2) as group:
        offer = Offer(
            run=RunId("r" * 26), view=ViewNumber(1), bundle=Digest("0" * 64), bundle_bytes=size,
            microbatch_size=1, form="portable", threads=1,
        )  # fmt: skip
        group[0].send(group[1].device, offer)
        await until(lambda: bool(heard(group[0], Declined)))
        assert "bytes" in heard(group[0], Declined)[0].reason


async def test_offer_without_its_bundle_is_declined(tmp_path: Path, mock_clock: MockClock) -> None:
    async with memory_group(tmp_path, 2) as group:
        offer = Offer(
            run=RunId("r" * 26), view=ViewNumber(1), bundle=Digest("0" * 64), bundle_bytes=10,
            microbatch_size=1, form="portable", threads=1,
        )  # fmt: skip
        group[0].send(group[1].device, offer)
        await until(lambda: bool(heard(group[0], Declined)))
        assert "no longer has blob" in heard(group[0], Declined)[0].reason
        group[0].send(group[1].device, dataclasses.replace(offer, threads=64))
        await until(lambda: len(heard(group[0], Declined)) == 2)
        assert heard(group[0], Declined)[1].reason == "its owner allows 2 threads"


async def test_stop_without_a_run_does_nothing(tmp_path: Path, mock_clock: MockClock) -> None:
    async with memory_group(tmp_path, 1) as group:
        group[0].runs.stop()
        result = await group[0].train(request(tmp_path))
        assert not result.stopped


@pytest.mark.parametrize("kind", [Profiled, Begin])
async def test_stop_while_the_run_is_arranged_interrupts(
    tmp_path: Path, mock_clock: MockClock, kind: type[object]
) -> None:
    async with memory_group(tmp_path, 2) as group:
        outcome = Outcome()
        receiver = group[0] if kind is Profiled else group[1]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(outcome.of, group[0], request(tmp_path, stages=2))
            await until(lambda: bool(heard(receiver, kind)))
            group[0].runs.stop()
        if kind is Profiled:
            assert isinstance(outcome.error, Interrupted)
        else:  # the run has begun: it is kept, with no step made
            assert outcome.result is not None
            assert outcome.result.stopped
            assert outcome.result.losses == ()
        await until_idle(group[0], group[1])
