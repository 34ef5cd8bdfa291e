"""A peer on aarch64 and a peer on x86-64 train one model over TLS."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from p2ptrain.runtime.reports import TrainRequest
from p2ptrain.schedule.actions import ONE
from p2ptrain.store.bundles import load_bundle
from p2ptrain.store.runs import RunDirectory, run_paths
from p2ptrain.training.contract import OptimizerChoice
from p2ptrain.training.memory import stage_memory
from tests.arm.guest import in_guest
from tests.bundles import contract_for
from tests.e2e.peers import ROOT, Member, peer_group, short_job, train

TOLERANCE: Final = 1e-4
SEGMENTS_ON_ARM: Final = 3
SGD: Final = OptimizerChoice(name="sgd", peak_learning_rate=0.1, warmup_steps=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestMember(Member):
    """A peer whose process runs in the guest; home and control socket are where the host's are."""

    shared: Path

    def command(self, addresses: tuple[str, ...]) -> list[str]:
        _, *line = Member.command(self, addresses)
        return in_guest(self.shared, *line)


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Homes and control sockets: one folder that both machines see."""
    run = tmp_path / "run"
    for folder in (run, tmp_path / "both", tmp_path / "alone"):
        folder.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(run))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return tmp_path


async def test_arm_and_x86_agree_with_x86_alone(shared: Path, text: Path) -> None:
    """Losses of both together beside those of the x86-64 peer alone.

    SGD, because what AdamW makes of rounding is larger than the rounding (the tests of both
    runtimes say how much).
    """
    request = dataclasses.replace(
        short_job(text, stages=2), steps=2, microbatches=2, heldout_microbatches=1, optimizer=SGD,
        checkpoint_every=0, schedule="1f1b",
    )  # fmt: skip

    def change(member: Member) -> Member:
        if member.name == "peer-1":
            return dataclasses.replace(member, options=("--memory", str(room_for_most(request))))
        return GuestMember(name=member.name, home=member.home, shared=shared)

    async with peer_group(shared / "both", 2, change=change) as (home, arm):
        mixed, watched = await train(home, request)
        (run,) = run_paths(home.member.home / "runs")
        builds = RunDirectory(run).read_record().contract.builds
        assert {build.machine for build in builds} == {"aarch64", "x86_64"}
    async with peer_group(shared / "alone", 1) as (home,):
        single, _ = await train(home, dataclasses.replace(request, stages=1))
    (plan,) = watched.named("plan")
    (on_arm,) = (stage for stage in plan["stages"] if stage["name"] == arm.name)
    assert on_arm["last_segment"] - on_arm["first_segment"] + 1 >= SEGMENTS_ON_ARM
    assert plan["exactness"] == "within tolerance: 2 different runtime builds take part"
    assert single.losses[-1] < single.losses[0]
    assert mixed.losses == pytest.approx(single.losses, rel=TOLERANCE, abs=0.0)
    assert mixed.heldout_last == pytest.approx(single.heldout_last, rel=TOLERANCE, abs=0.0)


def room_for_most(request: TrainRequest) -> int:
    """Bytes that hold all but SEGMENTS_ON_ARM segments: emulation makes the guest so slow that
    the planner would give it nothing but the embedding."""
    bundle = load_bundle(Path(request.bundle))
    contract = dataclasses.replace(
        contract_for(bundle),
        form=request.form,
        microbatch_size=request.microbatch_size,
        optimizer=request.optimizer,
    )
    kept = range(SEGMENTS_ON_ARM, len(bundle.manifest.segments))
    return stage_memory(bundle.manifest, kept, contract, ONE).total
