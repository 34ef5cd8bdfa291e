"""One disturbed run with real processes, held against the undisturbed one, bit by bit."""

from __future__ import annotations

import json
import math
import struct
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import trio

from p2ptrain.errors import P2PTrainError
from p2ptrain.runtime.reports import TrainRequest, TrainResult
from tests.e2e.faulty_peer import EVENTS_VARIABLE, FAULT_VARIABLE, Fault
from tests.e2e.peers import Member, PeerProcess, Watched, job, peer_group, train

REPLICATE_EVERY: Final = 3
CHECKPOINT_EVERY: Final = 10
FAULT_STEP: Final = 8
"""At the earliest, and when the run is protected: two replica sets are whole before."""
STEPS: Final = 24
STEPS_TOGETHER: Final = 40
"""Where somebody leaves, while the others train on, or is back after a cut: the run must not be
over first. After a kill or a stop it stands still until the next view."""
STOP_S: Final = 30.0
CASE_TIMEOUT_S: Final = 120.0
ROLES: Final = ("first", "middle", "last", "holder")
PHASES: Final = ("forward", "backward", "update", "commit", "replicate", "replay", "replan")
FAULTS: Final = ("kill", "stop", "cut", "leave")
Event = dict[str, Any]  # Any: JSON values
Undisturbed = dict[int, TrainResult]
"""By the number of steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is done to a run of `peers` stages."""

    peers: int
    role: str
    phase: str
    how: str

    def __str__(self) -> str:
        return f"{self.peers}-{self.role}-{self.phase}-{self.how}"

    @property
    def steps(self) -> int:
        """How many the run has."""
        alone = all(each.how in ("kill", "stop") for each in self.faults)
        return STEPS if alone else STEPS_TOGETHER

    @property
    def faults(self) -> list[Fault]:
        """The wishes; what hits a recovery needs a loss before it."""
        if self.phase not in ("replay", "replan"):
            return [Fault(role=self.role, phase=self.phase, step=FAULT_STEP, how=self.how)]
        whom = "replayer" if self.phase == "replay" else "proposer"
        other = "last" if self.role in ("first", "middle") else "middle"
        # Whoever leaves still votes: with a kill two of four would be left, and no quorum.
        how = "kill" if self.phase == "replay" else "leave"
        return [
            Fault(role=other, phase="forward", step=FAULT_STEP, how=how),
            Fault(role=whom, phase=self.phase, step=0, how=self.how),
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of a case."""

    case: Case
    seconds: float
    events: tuple[tuple[Event, ...], ...]
    """By peer."""

    @property
    def state_bytes_moved(self) -> int:
        """Of model state, between devices, in all recoveries together."""
        return sum(event.get("bytes", 0) for events in self.events for event in events)

    @property
    def replayed(self) -> list[tuple[int, int, int]]:
        """(first segment, end segment, step) of every step replayed because of a loss."""
        return [
            (*event["span"], event["update"])
            for events in self.events
            for entered, event in _in_views(events)
            if event.get("replay") and entered["view"] not in self.advanced_views
        ]

    @property
    def advanced_views(self) -> set[int]:
        """Views that move segments, the one before having sent their states in advance."""
        notes = [event for events in self.events for event in events if event.get("aims")]
        return {note["view"] + 1 for note in notes}


def _in_views(events: tuple[Event, ...]) -> Iterator[tuple[Event, Event]]:
    """Each event with the note of the view that its peer was in."""
    entered: Event = {"view": 0}
    for event in events:
        entered = event if "view" in event else entered
        yield entered, event


def matrix() -> list[Case]:
    """Every case that makes sense: recovery phases have roles of their own."""
    cases = []
    for peers in (3, 4):
        for phase in PHASES:
            for role in ROLES if phase not in ("replay", "replan") else ("first", "last"):
                cases += [Case(peers=peers, role=role, phase=phase, how=how) for how in FAULTS]
    return cases


def exact_job(text: Path, *, stages: int, steps: int) -> TrainRequest:
    """Enough steps that a fault finds the run protected, and much left to do."""
    usual = job(text, stages=stages)
    return replace(
        usual, steps=steps, replicate_every=REPLICATE_EVERY, checkpoint_every=CHECKPOINT_EVERY
    )


async def undisturbed_runs(directory: Path, text: Path) -> Undisturbed:
    """The jobs of all cases on one peer, without anything going wrong."""
    async with peer_group(directory, 1) as (peer,):
        return {
            steps: (await train(peer, exact_job(text, stages=1, steps=steps)))[0]
            for steps in (STEPS, STEPS_TOGETHER)
        }


async def run_case(case: Case, directory: Path, text: Path, undisturbed: Undisturbed) -> Outcome:
    """Run it and check everything; AssertionError says what does not hold."""
    struck, group = directory / "struck", directory / "group"
    struck.mkdir()
    group.mkdir()
    began_s = time.monotonic()

    def change(member: Member) -> Member:
        variables = {
            FAULT_VARIABLE: json.dumps([asdict(fault) for fault in case.faults]),
            EVENTS_VARIABLE: str(struck / f"{member.name}.jsonl"),
        }
        return replace(member, module="tests.e2e.faulty_peer", variables=variables)

    async with peer_group(group, case.peers, change=change) as peers:
        asked = exact_job(text, stages=case.peers, steps=case.steps)
        with trio.fail_after(CASE_TIMEOUT_S):
            await _train_somewhere(peers, asked, struck)
        homes = [peer.member.home for peer in peers]
    events = tuple(_events(struck / f"{peer.name}.jsonl") for peer in peers)
    outcome = Outcome(case=case, seconds=time.monotonic() - began_s, events=events)
    _check(outcome, homes, undisturbed[case.steps])
    return outcome


async def _train_somewhere(
    peers: tuple[PeerProcess, ...], asked: Any, struck: Path
) -> None:  # Any: a request
    """Start the run and wait until somebody has stored its model, whoever that is."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_conduct, peers[0], asked)
        nursery.start_soon(_bring_back, peers)
        while not _models([peer.member.home for peer in peers]):
            for peer in peers:
                _wake(peer, struck)
                _check_none_failed(peer.member.home)
            await trio.sleep(0.1)  # between two looks at files of other processes
        nursery.cancel_scope.cancel()


async def _conduct(peer: PeerProcess, asked: TrainRequest) -> None:
    try:
        await train(peer, asked, Watched(), timeout_s=CASE_TIMEOUT_S)
    except P2PTrainError:
        return  # the home peer was hit: the others go on


async def _bring_back(peers: tuple[PeerProcess, ...]) -> None:
    """Start again whoever was killed once all that are left say that they are paused: a second
    loss, amid a recovery, may take the last copy of something, and a person would do the same."""
    while True:
        living = [peer for peer in peers if peer.is_running]
        dead = [peer for peer in peers if not peer.is_running]
        if dead and all([await _is_paused(peer) for peer in living]):
            break
        await trio.sleep(1.0)  # between two questions to other processes
    status = await living[0].status()
    address = status.address.split(",")[0]
    for peer in dead:
        await peer.start(address)


async def _is_paused(peer: PeerProcess) -> bool:
    with trio.move_on_after(1.0):
        status = await peer.member.status()
        run = None if status is None else status.run_status
        return run is not None and (run.waits_for or "").startswith("paused")
    return False


def _wake(peer: PeerProcess, struck: Path) -> None:
    """Let a stopped process go on after a while, as a lid that is opened."""
    for event in _events(struck / f"{peer.name}.jsonl"):
        if event.get("fault") == "stop" and event["at"] + STOP_S < time.time():
            peer.resume()


def _check_none_failed(home: Path) -> None:
    """Raise the reason that a peer gives for the end of its run, rather than wait for a model."""
    for path in home.glob("runs/*/ended.json"):
        end = json.loads(path.read_text())
        assert end["outcome"] != "failed", end["reason"]


def _models(homes: list[Path]) -> list[Path]:
    return [path for home in homes for path in home.glob("runs/*/trained.onnx")]


def _events(path: Path) -> tuple[Event, ...]:
    if not path.exists():
        return ()
    return tuple(json.loads(line) for line in path.read_text().splitlines())


def _check(outcome: Outcome, homes: list[Path], undisturbed: TrainResult) -> None:
    hits = [event for events in outcome.events for event in events if "fault" in event]
    struck = sorted(hits, key=lambda event: event["at"])
    assert len(struck) == len(outcome.case.faults), f"not everything was done: {struck}"
    assert struck[0]["step"] >= FAULT_STEP > 2 * REPLICATE_EVERY
    assert struck[0]["step"] < outcome.case.steps - REPLICATE_EVERY, "nearly over before"
    (model,) = _models(homes)
    assert model.read_bytes() == Path(undisturbed.model_path or "").read_bytes()
    assert _bits(_losses(model.parent)) == _bits(undisturbed.losses)
    for events in outcome.events:
        live = [event["update"] for event in events if event.get("replay") is False]
        assert live == sorted(set(live)), "a survivor ran a committed step twice"
    if outcome.case.how == "leave" and len(outcome.case.faults) == 1:
        assert outcome.replayed == []
    elif len(outcome.case.faults) == 1:
        assert len({span[:2] for span in outcome.replayed}) == 1, "more than one stage was replayed"
        assert min(step for *_, step in outcome.replayed) > REPLICATE_EVERY
    if len(outcome.case.faults) == 1:
        _check_moves(outcome)


def _check_moves(outcome: Outcome) -> None:
    """Only the struck stage's segments moved; where somebody was stopped or cut off, returned and
    was taken in, only those that the new cut gives to whoever did not have them."""
    notes = [event for events in outcome.events for event in events if "view" in event]
    members = {note["view"]: set(note["members"]) for note in notes}
    (struck,) = [each for each in outcome.events if any("fault" in event for event in each)]
    lost = set(range(*next(event["span"] for event in struck if event.get("replay") is False)))
    for events in outcome.events:
        held: set[int] = set()
        before, moved = set[str](), list[int]()
        for entered, event in _in_views(events):
            if "view" in event:
                moved = []
                before = members.get(event["view"] - 1, set())
                held = held if event["device"] in before else set()  # what it has is an old state
            elif event.get("replay") is False:
                held = set(range(*event["span"]))
            elif "state" in event:
                moved.append(event["state"])
                assert len(moved) == len(set(moved)), "a state moved twice for one view"
                joined = members[entered["view"]] - before
                moves = bool(joined) or entered["view"] in outcome.advanced_views
                assert event["state"] in (_due(entered) - held if moves else lost), (
                    f"segment {event['state']} moved needlessly in view {entered['view']}"
                )


def _due(entered: Event) -> set[int]:
    """The segments that a device must have in a view, to run or to replay them."""
    own = entered["device"]
    spans = [span for device, span in entered["spans"].items() if device == own]
    spans += [span for device, *span in entered["replays"] if device == own]
    return {segment for span in spans for segment in range(*span)}


def _losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "progress.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["loss"] for line in lines}
    assert all(losses[line["step"]] == line["loss"] for line in lines)
    return [losses[step] for step in sorted(losses)]


def _bits(losses: Any) -> bytes:  # Any: a sequence of floats
    assert all(map(math.isfinite, losses))
    return struct.pack(f"<{len(losses)}d", *losses)
