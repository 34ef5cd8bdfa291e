"""Reports as a peer gives them, for the tests of what is shown."""

from __future__ import annotations

from dataclasses import replace

from p2ptrain.ids import DeviceId, RunId
from p2ptrain.runtime.reports import (
    EnergyReport,
    MemberReport,
    PeerEnergy,
    PeerStatus,
    PhaseEnergy,
    PlanReport,
    StageReport,
    StepReport,
    TrafficReport,
    TrainResult,
)

RUN = RunId("r" * 26)
FIRST, SECOND, THIRD = (DeviceId(letter * 26) for letter in "abc")

PLAN = PlanReport(
    run=RUN,
    bundle="gpt-nano",
    plan="c" * 64,
    view=1,
    schedule="1f1b",
    stages=(
        StageReport(
            device=FIRST,
            name="attic",
            stage=0,
            first_segment=0,
            last_segment=1,
            segments=("embedding", "block0.attention"),
            parameters=1_234_567,
            memory_bytes=64 * 1024 * 1024,
            share=0.6,
        ),
        StageReport(
            device=SECOND,
            name="cellar",
            stage=1,
            first_segment=2,
            last_segment=2,
            segments=("head",),
            parameters=65_536,
            memory_bytes=3 * 1024 * 1024,
            share=0.4,
        ),
    ),
    predicted_step_s=0.25,
    exactness="exact: one runtime build on every peer",
    reasons=("attic is 1.5 times faster", "a second reason"),
)

STEP = StepReport(
    step=1,
    steps=40,
    loss=5.5,
    learning_rate=1e-3,
    gradient_norm=1.0,
    seconds=0.5,
    samples_per_s=64.0,
    joules_per_sample=0.25,
    activities={"attic": "stage 0, computing", "cellar": "stage 1, waiting"},
)

PHASES = {
    "compute": PhaseEnergy(seconds=8.0, marginal_joules=80.0, total_joules=100.0),
    "communicate": PhaseEnergy(seconds=1.0, marginal_joules=2.0, total_joules=4.0),
    "wait": PhaseEnergy(seconds=1.0, marginal_joules=0.0, total_joules=2.0),
    "idle": PhaseEnergy(seconds=0.0, marginal_joules=0.0, total_joules=0.0),
}

ATTIC = PeerEnergy(
    device=FIRST,
    name="attic",
    phases=PHASES,
    marginal_joules=82.0,
    total_joules=106.0,
    scope="package",
    quality="measured",
    error_band=0.05,
    meter="rapl:host-1",
    source="RAPL package 0",
    bytes_sent=1_048_576,
    samples=320,
)

ENERGY = EnergyReport(
    peers=(ATTIC, replace(ATTIC, device=SECOND, name="cellar")),
    marginal_joules=82.0,
    total_joules=106.0,
    joules_per_sample=0.33125,
)

RESULT = TrainResult(
    run=RUN,
    bundle="gpt-nano",
    peers=2,
    stages=2,
    first_step=0,
    steps=40,
    losses=(5.5, 4.5, 2.5),
    heldout_first=5.6,
    heldout_last=2.6,
    seconds=20.0,
    samples_per_s=64.0,
    tokens_per_s=8192.0,
    bytes_sent=2_097_152,
    traffic=(
        TrafficReport(sender=FIRST, receiver=SECOND, kind="activation", bytes_sent=1_048_576),
        TrafficReport(sender=SECOND, receiver=FIRST, kind="cotangent", bytes_sent=524_288),
    ),
    energy=ENERGY,
    state_digest="d" * 64,
    model_path="/models/trained.onnx",
    stopped=False,
)

STATUS = PeerStatus(
    group="g" * 16,
    group_name="home",
    device=FIRST,
    name="attic",
    address="192.0.2.7:47615",
    discovery="zeroconf on every interface",
    alone_because=None,
    members=(
        MemberReport(
            device=FIRST,
            name="attic",
            state="self",
            addresses=("192.0.2.7:47615", "[2001:db8::7]:47615"),
            runtime="onnxruntime-training 1.19.2",
            activity="idle",
            last_heard_s=None,
        ),
        MemberReport(
            device=SECOND,
            name="cellar",
            state="alive",
            addresses=("192.0.2.8:47615",),
            runtime="onnxruntime 1.32",
            activity="stage 1",
            last_heard_s=2.0,
            state_s=4500.0,
            round_trip_s=0.0042,
            last_down="suspended for 30 s",
        ),
        MemberReport(
            device=THIRD,
            name="loft",
            state="dead: it was silent",
            addresses=(),
            runtime="",
            activity="",
            last_heard_s=130.0,
            state_s=125.0,
            linked=False,
            last_down="it was silent",
        ),
    ),
    run=None,
    run_state="idle",
    plan=None,
    runs=("rrrrrrrr at step 40",),
)
