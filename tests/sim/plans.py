"""Small valid plans, contracts and records for machines that only compare them."""

from __future__ import annotations

import hashlib

from p2ptrain.ids import DeviceId, Digest, Lineage, RunId, ViewNumber
from p2ptrain.membership.record import MemberRecord
from p2ptrain.planner.plan import Plan, StagePlan
from p2ptrain.training.contract import Contract, OptimizerChoice, RuntimeBuild

RUN = RunId("r" * 26)
BUILD = RuntimeBuild(
    runtime="onnxruntime", version="1.19.2", numpy="2.0.0", machine="x86_64", isa="avx2"
)


def digest_of(text: str) -> Digest:
    return Digest(hashlib.sha256(text.encode()).hexdigest())


def device(index: int) -> DeviceId:
    """The index-th device id: 26 base32 characters, sorted like the index."""
    return DeviceId("abcdefghijklmnopqrstuvwxyz234567"[index] * 26)


def make_contract(seed: int = 0) -> Contract:
    return Contract(
        bundle=digest_of("bundle"), seed=seed, steps=10, microbatch_size=4, microbatches=8,
        form="portable", codec="fp32", threads=1, dropout=None, optimizer=OptimizerChoice(),
        training_data=digest_of("data"), heldout_data=digest_of("heldout"), evaluate_every=0,
        heldout_microbatches=1, builds=(BUILD,),
    )  # fmt: skip


def make_plan(
    *members: DeviceId,
    home: DeviceId | None = None,
    view: int = 1,
    lineage: int = 0,
    run: RunId = RUN,
    contract: Contract | None = None,
    reason: str = "",
) -> Plan:
    """One stage per member; plans with different `reason` have different digests."""
    stages = tuple(
        StagePlan(
            device=member, first_segment=index, segment_count=1, in_flight_max=1,
            step_compute_ns=1, memory_bytes=1, parameter_count=1,
        )
        for index, member in enumerate(members)
    )  # fmt: skip
    owner = members[0] if home is None else home
    return Plan(
        run=run, lineage=Lineage(lineage), view=ViewNumber(view),
        members=tuple(sorted(members)), home=owner, holders=(owner,),
        contract=(contract or make_contract()).digest, schedule="1f1b", stages=stages,
        step_ns=1, reasons=(reason,),
    )  # fmt: skip


def make_record(
    owner: DeviceId, *, incarnation: int = 1, version: int = 0, activity: str = "idle",
    addresses: tuple[str, ...] = (),
) -> MemberRecord:  # fmt: skip
    return MemberRecord(
        device=owner, name=owner[:4], incarnation=incarnation, version=version,
        addresses=addresses, host="host", threads_max=1,
        cores=2, memory_bytes=1 << 30,
        power_source="mains", build=BUILD, activity=activity,
    )  # fmt: skip
