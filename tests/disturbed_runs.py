"""Runs in one process that a test disturbs, and the undisturbed run they are held against."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import trio

from p2ptrain.errors import PeerLost
from p2ptrain.ids import DeviceId
from p2ptrain.runtime.reports import PlanReport, StepReport, TrainRequest, TrainResult
from p2ptrain.runtime.runs.run_member import LeftOut
from p2ptrain.training.contract import OptimizerChoice
from tests.bundles import tiny_bundle
from tests.memory_group import Member, MemoryGroup, float_bits, memory_group, request_for

CLIPPING = OptimizerChoice(warmup_steps=2, clip_norm=0.05, peak_learning_rate=0.02)
BUNDLE = tiny_bundle()
SECONDS_MAX = 60
STEPS = 30


def request(path: Path, **changes: object) -> TrainRequest:
    fields = {"optimizer": CLIPPING, "steps": STEPS, "replicate_every": 3, **changes}
    return request_for(path, BUNDLE, **fields)


def undisturbed(path: Path) -> TrainResult:
    """The same run on one member, to its end."""

    async def train() -> TrainResult:
        async with memory_group(path, 1) as group:
            return await group[0].train(request(path))

    return trio.run(train)


def assert_same(result: TrainResult, alone: TrainResult) -> None:
    assert float_bits(result.losses) == float_bits(alone.losses)
    assert result.state_digest == alone.state_digest
    assert result.heldout_last == alone.heldout_last


class Disturbed:
    """A run under way, and what a test does to it."""

    def __init__(self, group: MemoryGroup) -> None:
        self.group = group
        self.result: TrainResult | None = None

    async def train(self, asked: TrainRequest) -> None:
        """Have the first member conduct the run; where that is killed, it tells nobody anything."""
        try:
            self.result = await self.group[0].train(asked)
        except PeerLost:
            if self.group[0].lives:
                raise

    async def train_or_hand_over(self, asked: TrainRequest) -> None:
        """The same where the home peer leaves: whoever watches is told that others go on."""
        with contextlib.suppress(LeftOut):
            await self.train(asked)

    async def wait_step(self, step: int) -> None:
        await self.group.wait(
            lambda: any(isinstance(r, StepReport) and r.step >= step for _, r in self.group.events)
        )

    def stage_devices(self) -> list[DeviceId]:
        plan = next(r for _, r in self.group.events if isinstance(r, PlanReport))
        return [stage.device for stage in plan.stages]


def progress(path: Path) -> list[float]:
    """The losses that a data holder wrote down, by step; some twice if it was restarted."""
    lines = [json.loads(line) for line in (path / "progress.jsonl").read_text().splitlines()]
    losses = {(line["step"], line["loss"]) for line in lines}
    assert len({step for step, _ in losses}) == len(losses)
    return [loss for _, loss in sorted(losses)]


def assert_stored(members: list[Member], alone: TrainResult) -> None:
    """One of these members ended the run: its model and losses are those of the undisturbed."""
    folders = [path for member in members for path in member.runs_path.iterdir()]
    (folder,) = [path for path in folders if (path / "trained.onnx").exists()]
    assert (folder / "trained.onnx").read_bytes() == Path(alone.model_path or "").read_bytes()
    assert float_bits(progress(folder)) == float_bits(alone.losses)


def copies(member: Member) -> set[DeviceId]:
    """Who has the run's data, as one member knows."""
    part = member.runs.member
    return set() if part is None else part.state.data_copies
