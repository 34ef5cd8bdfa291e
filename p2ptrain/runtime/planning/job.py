"""What a home peer brings to a run: the model, the data, the contract, where to begin."""

from __future__ import annotations

import base64
import math
import secrets
from dataclasses import dataclass, replace
from pathlib import Path

from p2ptrain import limits
from p2ptrain.agreement.view import View
from p2ptrain.data.opening import OpenData, open_samples
from p2ptrain.data.options import DataOptions
from p2ptrain.errors import CheckpointError, ConfigError, DataError, InvariantBroken
from p2ptrain.ids import Digest, Lineage, RunId, ViewNumber
from p2ptrain.planner.objective import GOALS, Objective, objective_of
from p2ptrain.planner.plan_file import AskedPlan, read_plan
from p2ptrain.runtime.planning.own_runs import (
    ElsewhereSamples,
    check_own,
    check_own_model,
    check_own_plan,
    check_own_resumed,
)
from p2ptrain.runtime.planning.variants import asked_size
from p2ptrain.runtime.reports import TrainRequest
from p2ptrain.schedule.actions import AUTO, SCHEDULES
from p2ptrain.store.bundles import Bundle, find_bundle, load_bundle
from p2ptrain.store.runs import CheckpointRecord, RunDirectory, RunRecord, find_run
from p2ptrain.training.contract import Contract
from p2ptrain.training.feed import Samples
from p2ptrain.training.owners import joint_digest

CACHE_FOLDER = "cache"
"""Beside the runs: what is derived from data once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Everything the home peer knows before it asks the others; `contract.builds` is empty until
    the participants of a new run are known."""

    run: RunId
    lineage: Lineage
    view: ViewNumber
    bundle: Bundle
    contract: Contract
    samples: Samples
    data: str
    heldout: str | None
    data_options: DataOptions
    data_notes: tuple[str, ...]
    """What the data is and what was decided by looking at it, for people."""
    directory: RunDirectory
    checkpoint: CheckpointRecord | None
    checkpoint_every: int
    asked: AskedPlan | None = None
    """The plan to begin with; None: the planner finds one."""
    private: bool = False
    """Neither inputs nor labels leave this device, however often the run is resumed."""
    own_data: bool = False
    """Every peer feeds its own; who they are, the answers to the offer tell."""

    def wanted_schedule(self, request: TrainRequest) -> str:
        """The schedule that a plan should have: as its file says, else as the request does."""
        written = None if self.asked is None else self.asked.schedule
        return request.schedule if written is None else written

    @property
    def first_step(self) -> int:
        return 0 if self.checkpoint is None else self.checkpoint.step

    @property
    def resumed(self) -> bool:
        return len(self.contract.builds) > 0

    def record(self, contract: Contract) -> RunRecord:
        """What `run.json` holds once the contract is complete."""
        return RunRecord(
            run=self.run,
            lineage=self.lineage,
            view=self.view,
            bundle_name=self.bundle.manifest.name,
            contract=contract,
            data=self.data,
            heldout=self.heldout,
            data_options=self.data_options,
            checkpoint_every=self.checkpoint_every,
            private=self.private,
        )


def open_job(
    request: TrainRequest, *, runs_path: Path, new_run: RunId, default_threads: int
) -> Job:
    """Read and check what a request names; blocking, and nothing is written.

    Raises:
        ConfigError, BundleError, DataError, CheckpointError, NotFound: the request cannot be
            met; the sentence says what is wrong with it.
    """
    _check_request(request)
    asked = None if request.plan is None else read_plan(request.plan, file="--plan")
    if request.resume is not None:
        job = _resumed_job(request, runs_path)
        check_own_resumed(request, job.contract)
        private = job.private or request.private
        if private:
            _check_private(replace(request, parallelism=job.contract.parallelism))
        return replace(job, asked=asked, private=private)
    if not request.bundle or not (request.data or request.own_data):
        raise ConfigError("a new run needs a model and data", hint="give --model and --data")
    bundle = load_bundle(find_bundle(request.bundle))
    bundle.check()
    if request.own_data:
        return _own_job(request, bundle, asked, RunDirectory(runs_path / new_run), default_threads)
    options = _data_options(request)
    minibatch_size = asked_size(request) * request.microbatches
    opened = _open_data(bundle, request.data, request.heldout, options, runs_path, minibatch_size)
    digests = opened.training_digest, opened.heldout_digest
    contract = _new_contract(request, bundle, digests, default_threads)
    return Job(
        run=new_run,
        lineage=Lineage(0),
        view=ViewNumber(1),
        bundle=bundle,
        contract=contract,
        samples=opened.samples,
        data=request.data,
        heldout=request.heldout,
        data_options=options,
        data_notes=(f"the data: {opened.description}", *opened.notes),
        directory=RunDirectory(runs_path / new_run),
        checkpoint=None,
        checkpoint_every=request.checkpoint_every,
        private=request.private,
        asked=asked,
    )


def _own_job(
    request: TrainRequest,
    bundle: Bundle,
    asked: AskedPlan | None,
    directory: RunDirectory,
    default_threads: int,
) -> Job:
    """A new run whose peers feed their own data; the contract names them once they are known."""
    check_own_model(bundle.manifest)
    if asked is not None:
        check_own_plan(asked)
    nobodys = joint_digest(())
    return Job(
        run=RunId(directory.path.name),
        lineage=Lineage(0),
        view=ViewNumber(1),
        bundle=bundle,
        contract=_new_contract(request, bundle, (nobodys, nobodys), default_threads),
        samples=ElsewhereSamples(nobodys),
        data="",
        heldout=None,
        data_options=DataOptions(),
        data_notes=(),
        directory=directory,
        checkpoint=None,
        checkpoint_every=request.checkpoint_every,
        own_data=True,
        asked=asked,
    )


def reopened_job(directory: RunDirectory, bundle: Bundle, view: View) -> Job:
    """What a data holder brings to a run that a restart of its process interrupted.

    Raises:
        CheckpointError, DataError: the record or the data is not what the run was started with.
    """
    record = directory.read_record()
    if record.contract.digest != view.contract.digest:
        raise CheckpointError(f"run {record.run[:8]} was started anew since")
    return _job_of(directory, record, bundle, view.lineage, view.number)


def _resumed_job(request: TrainRequest, runs_path: Path) -> Job:
    directory = find_run(runs_path, request.resume or "")
    record = directory.read_record()
    bundle = load_bundle(directory.bundle_path)
    bundle.check()
    if bundle.digest != record.contract.bundle:
        raise CheckpointError(f"the bundle stored with run {record.run[:8]} is another model")
    if request.bundle:
        other = load_bundle(find_bundle(request.bundle)).manifest
        if other.digest != bundle.digest:
            raise CheckpointError(
                f"run {record.run[:8]} trains {record.bundle_name}, not this {other.name} bundle",
                hint="leave --model out to resume with the run's own model",
            )
    # A lineage of its own: whoever is still in the last session can not be mistaken for us.
    lineage = Lineage(record.lineage + 1)
    return _job_of(directory, record, bundle, lineage, ViewNumber(1))


def _job_of(
    directory: RunDirectory,
    record: RunRecord,
    bundle: Bundle,
    lineage: Lineage,
    view: ViewNumber,
) -> Job:
    checkpoint = directory.read_checkpoint(bundle.manifest)
    samples, notes = _recorded_data(directory, record, bundle)
    if checkpoint is not None and checkpoint.contract != record.contract.digest:
        raise CheckpointError("the checkpoint belongs to another contract")
    return Job(
        run=record.run,
        lineage=lineage,
        view=view,
        bundle=bundle,
        contract=record.contract,
        samples=samples,
        data=record.data,
        heldout=record.heldout,
        data_options=record.data_options,
        data_notes=notes,
        directory=directory,
        checkpoint=checkpoint,
        checkpoint_every=record.checkpoint_every,
        private=record.private,
        own_data=bool(record.contract.owners),
    )


def _recorded_data(
    directory: RunDirectory, record: RunRecord, bundle: Bundle
) -> tuple[Samples, tuple[str, ...]]:
    """The data that a run was started with, and what is to be said of it; DataError for another."""
    contract = record.contract
    if contract.owners:
        return ElsewhereSamples(contract.training_data), ()
    opened = _open_data(
        bundle,
        record.data,
        record.heldout,
        record.data_options,
        directory.path.parent,
        contract.minibatch_size,
    )
    digests = (opened.training_digest, opened.heldout_digest)
    if digests != (contract.training_data, contract.heldout_data):
        raise DataError(
            f"the data of run {record.run[:8]} has changed: {record.data}",
            hint="restore the file, or start a new run without --resume",
        )
    return opened.samples, (f"the data: {opened.description}", *opened.notes)


def _check_request(request: TrainRequest) -> None:
    if request.schedule not in (*SCHEDULES, AUTO):
        hint = f"choose one of: {', '.join((*SCHEDULES, AUTO))}"
        raise ConfigError(f"unknown schedule {request.schedule!r}", hint=hint)
    if request.stages is not None and not 1 <= request.stages <= limits.STAGES_MAX:
        raise ConfigError(f"stages must be between 1 and {limits.STAGES_MAX}")
    wanted_objective(request)
    if request.own_data and request.resume is None:
        check_own(request)
    if request.private:
        _check_private(request)
    if request.stages is not None and request.plan is not None:
        raise ConfigError("a plan has its own number of stages", hint="leave --stages out")
    if request.checkpoint_every < 0:
        raise ConfigError("steps between checkpoints are 0 or more")


def _check_private(request: TrainRequest) -> None:
    """ConfigError for what a private run cannot be."""
    if request.parallelism != "pipeline":
        raise ConfigError(
            f"a private run is a pipeline: {request.parallelism} parallelism may share data out",
            hint="leave --parallelism out, or --private",
        )
    if request.plan is not None:
        raise ConfigError(
            "a plan of your own and a private run exclude each other",
            hint="leave --plan out: the first and the last stage are on this device then",
        )
    if request.stages == 2:
        raise ConfigError(
            "a private run has one stage, or this device's two and others between",
            hint="use --stages 3, or leave --stages out",
        )


def wanted_objective(request: TrainRequest) -> Objective:
    """What the run's first plan minimises, and within what.

    Raises:
        ConfigError: an unknown goal, or a limit that is no positive number.
    """
    for limit in (request.deadline_s, request.joules):
        if limit is not None and not (math.isfinite(limit) and limit > 0):
            raise ConfigError("a deadline and joules are more than nothing")
    if request.objective not in GOALS:
        hint = f"choose one of: {', '.join(GOALS)}"
        raise ConfigError(f"unknown objective {request.objective!r:.40}", hint=hint)
    return objective_of(request.objective, deadline_s=request.deadline_s, joules=request.joules)


def _data_options(request: TrainRequest) -> DataOptions:
    return DataOptions(
        text_field=request.text_field,
        label_field=request.label_field,
        labels=request.labels,
        heldout_labels=request.heldout_labels,
    )


def _open_data(
    bundle: Bundle,
    data: str,
    heldout: str | None,
    options: DataOptions,
    runs_path: Path,
    minibatch_size: int,
) -> OpenData:
    if bundle.directory is None:
        raise InvariantBroken("a home peer's bundle lies in a directory")
    return open_samples(
        bundle.manifest,
        bundle.directory,
        data,
        heldout,
        options,
        runs_path.parent / CACHE_FOLDER,
        minibatch_size=minibatch_size,
    )


def _new_contract(
    request: TrainRequest, bundle: Bundle, data: tuple[Digest, Digest], default_threads: int
) -> Contract:
    try:
        return Contract(
            bundle=bundle.digest,
            seed=request.seed,
            steps=request.steps,
            microbatch_size=asked_size(request),
            microbatches=request.microbatches,
            form=request.form,
            codec="fp32" if request.codec == AUTO else request.codec,
            threads=request.threads or default_threads,
            dropout=request.dropout,
            optimizer=request.optimizer,
            training_data=data[0],
            heldout_data=data[1],
            evaluate_every=request.evaluate_every,
            heldout_microbatches=request.heldout_microbatches,
            builds=(),
            rematerialise=request.rematerialise is True,
            parallelism=request.parallelism,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error


def new_run_id() -> RunId:
    """26 random base32 characters: 128 bits and more."""
    return RunId(base64.b32encode(secrets.token_bytes(17)).decode().lower()[:26])
