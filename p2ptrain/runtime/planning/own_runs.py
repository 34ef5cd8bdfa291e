"""Runs whose peers feed their own data: what they cannot be, and what stands for the data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from p2ptrain.bundle.manifest import Manifest
from p2ptrain.errors import ConfigError, InvariantBroken, PlanInfeasible
from p2ptrain.ids import Digest
from p2ptrain.planner.plan_file import AskedPlan
from p2ptrain.runtime.reports import TrainRequest
from p2ptrain.schedule.actions import AUTO, delays_gradients
from p2ptrain.training.contract import Contract
from p2ptrain.training.feed import Feed

WHOLE_MODEL: Final = "peers that feed their own data are replicas of the whole model"


@dataclass(frozen=True, slots=True)
class ElsewhereSamples:
    """What the job of such a run has for samples: they are with their owners."""

    digest: Digest

    def training(self, *, seed: int, step: int, first_sample: int, count: int) -> Feed:
        """Never asked for."""
        raise InvariantBroken("the samples are with their owners")

    def heldout(self, *, sample_count: int, first_sample: int, count: int) -> Feed:
        """Never asked for."""
        raise InvariantBroken("the samples are with their owners")


def check_own(request: TrainRequest) -> None:
    """ConfigError for what such a run cannot be."""
    if request.data or request.heldout or request.labels or request.heldout_labels:
        raise ConfigError(
            "--data and --own-data exclude each other: who gives data says so when it joins",
            hint="leave --data and what belongs to it out, and start each owner with "
            "p2ptrain join --data PATH",
        )
    if request.text_field or request.label_field:
        raise ConfigError(
            "each owner says itself what the fields of its data are called",
            hint="put text_field and label_field into [data] of config.toml there",
        )
    if request.private:
        raise ConfigError(
            "--private and --own-data exclude each other",
            hint="leave --private out: with --own-data no owner's data leaves it either",
        )
    if request.parallelism != "data":
        raise ConfigError(
            f"{WHOLE_MODEL}, not parts of it ({request.parallelism} parallelism)",
            hint="add --parallelism data",
        )
    if request.stages not in (None, 1):
        raise ConfigError(
            f"{WHOLE_MODEL}, so there is one stage, not {request.stages}",
            hint="leave --stages out",
        )
    if request.schedule != AUTO and delays_gradients(request.schedule):
        raise ConfigError(
            f"{request.schedule} is no schedule of replicas", hint="leave --schedule out"
        )


def check_own_resumed(request: TrainRequest, contract: Contract) -> None:
    """ConfigError for what a request to resume wants of owners that the run cannot have."""
    if not contract.owners:
        if request.own_data:
            raise ConfigError(
                "this run was begun with one body of data",
                hint="leave --own-data out, or begin a new run with it",
            )
        return
    check_own(replace(request, parallelism=contract.parallelism))
    if request.plan is not None:
        raise ConfigError(
            "the owners' shares of a step are part of the run", hint="resume it without --plan"
        )


def check_own_model(manifest: Manifest) -> None:
    """PlanInfeasible for a model that cannot have replicas."""
    if any(kind.running for kind in manifest.kinds.values()):
        raise PlanInfeasible(
            f"{WHOLE_MODEL}, but running statistics (BatchNorm) are made of all microbatches in "
            "order, by one",
            hint="train this model with --data, or one without running statistics",
        )


def check_own_plan(asked: AskedPlan) -> None:
    """ConfigError for a plan that is not one stage of replicas."""
    if len(asked.stages) != 1 or asked.stages[0].split != "replicas":
        raise ConfigError(
            f"{asked.file}: {WHOLE_MODEL}",
            hint='write one stage with all segments, its owners and split = "replicas"',
        )
