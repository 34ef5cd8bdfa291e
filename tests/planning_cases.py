"""Small planning inputs for the planner's tests: a chain of segments with given times."""

from __future__ import annotations

from collections.abc import Sequence

from p2ptrain.bundle.manifest import (
    DataSection,
    Inference,
    Initialiser,
    Loss,
    Manifest,
    Port,
    Segment,
    SegmentKind,
    Symbol,
    Tensor,
    Value,
)
from p2ptrain.ids import DeviceId, Digest, Lineage, RunId, ViewNumber
from p2ptrain.planner.input import LinkEstimate, PlanningInput, StageMemory
from p2ptrain.planner.profile import KindCost, PeerProfile
from p2ptrain.schedule.actions import Held
from p2ptrain.training.contract import Contract, OptimizerChoice, RuntimeBuild

BUILD = RuntimeBuild(
    runtime="onnxruntime", version="1.32.0", numpy="2.0", machine="x86_64", isa="avx2"
)
SEGMENT_BYTES = 100
"""What each segment needs, and as much again per microbatch in flight."""


def device(letter: str) -> DeviceId:
    return DeviceId(letter * 26)


def manifest(segment_count: int, *, width: int = 16) -> Manifest:
    """Segments `s0`, `s1`, ... each of its own kind, with one parameter of `width` values."""
    values = [Value(name=f"w{i}", shape=(str(width),)) for i in range(segment_count)]
    boundary = Value(name="x", shape=("batch", str(width)))
    ports = (Port(value=boundary, role="boundary", differentiable=True),)
    kinds = {
        f"k{i}": SegmentKind(
            name=f"k{i}",
            forms={},
            inputs=ports,
            outputs=ports,
            parameters=(values[i],),
            masks=(),
            forward_flops=1,
            backward_flops=2,
        )
        for i in range(segment_count)
    }
    return Manifest(
        name="chain",
        task="regression",
        description="",
        symbols={"batch": Symbol(size=None, kind="batch")},
        graphs={},
        kinds=kinds,
        segments=tuple(
            Segment(name=f"s{i}", kind=f"k{i}", parameters={f"w{i}": f"t{i}"})
            for i in range(segment_count)
        ),
        tensors=tuple(_tensor(i, width) for i in range(segment_count)),
        updates={},
        inference=Inference(graph=Digest("0" * 64), inputs=(boundary,), output=boundary),
        data=DataSection(
            kind="windows",
            tokenizer="bytes",
            vocabulary=256,
            context=width,
            sampling="philox-1",
        ),
        loss=Loss(kind="mse"),
        golden_parameters=Digest("0" * 64),
    )


def contract(*, microbatches: int = 8, threads: int = 1, microbatch_size: int = 4) -> Contract:
    return Contract(
        bundle=Digest("1" * 64),
        seed=0,
        steps=10,
        microbatch_size=microbatch_size,
        microbatches=microbatches,
        form="portable",
        codec="fp32",
        threads=threads,
        dropout=None,
        optimizer=OptimizerChoice(),
        training_data=Digest("2" * 64),
        heldout_data=Digest("3" * 64),
        evaluate_every=0,
        heldout_microbatches=1,
        builds=(BUILD,),
    )


def profile(
    letter: str,
    times_ns: Sequence[tuple[int, int]],
    *,
    memory_bytes: int = 1 << 40,
    host: str | None = None,
    cores: int = 4,
    delayed_percent: int | None = None,
    own_cores: str = "",
) -> PeerProfile:
    """A peer with one (forward, backward) time per segment, on its own host unless given.

    With `delayed_percent` backwards have parts, of which the second takes that much of the whole.
    """

    def cost(forward: int, backward: int) -> KindCost:
        if delayed_percent is None:
            return KindCost(forward_ns=forward, backward_ns=backward)
        gradients = backward * delayed_percent // 100
        return KindCost(
            forward_ns=forward, backward_ns=backward, cotangents_ns=backward - gradients,
            gradients_ns=gradients,
        )  # fmt: skip

    return PeerProfile(
        device=device(letter),
        kinds={f"k{i}": cost(forward, backward) for i, (forward, backward) in enumerate(times_ns)},
        memory_bytes=memory_bytes,
        host=host if host is not None else f"host-{letter}",
        cores=cores,
        build=BUILD,
        own_cores=own_cores,
    )


def stage_memory(segments: range, holds: Held) -> int:
    """SEGMENT_BYTES per segment for its state, as much for each microbatch in flight, and a tenth
    for each whose gradients wait."""
    return len(segments) * SEGMENT_BYTES * (10 + 10 * holds.in_flight + holds.delayed) // 10


def fast_links(profiles: Sequence[PeerProfile], *, latency_ns: int = 0) -> tuple[LinkEstimate, ...]:
    devices = sorted(profile.device for profile in profiles)
    return tuple(
        LinkEstimate(first=a, second=b, latency_ns=latency_ns, bytes_per_s=10**15)
        for i, a in enumerate(devices)
        for b in devices[i + 1 :]
    )


def planning_input(
    profiles: Sequence[PeerProfile],
    *,
    segment_count: int,
    home: str = "a",
    stages: int | None = None,
    links: tuple[LinkEstimate, ...] | None = None,
    microbatches: int = 8,
    threads: int = 1,
    schedule: str = "1f1b",
    memory: StageMemory = stage_memory,
) -> PlanningInput:
    return PlanningInput(
        manifest=manifest(segment_count),
        contract=contract(microbatches=microbatches, threads=threads),
        profiles=tuple(profiles),
        home=device(home),
        stage_memory=memory,
        run=RunId("r" * 26),
        lineage=Lineage(0),
        view=ViewNumber(1),
        schedule=schedule,
        stages=stages,
        links=fast_links(profiles) if links is None else links,
    )


def _tensor(index: int, width: int) -> Tensor:
    return Tensor(
        name=f"t{index}",
        shape=(width,),
        dtype="float32",
        binding="trainable",
        initialiser=Initialiser(kind="zeros"),
        decay=True,
    )
