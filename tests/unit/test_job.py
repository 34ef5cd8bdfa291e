"""What a request names, read and checked before anybody is asked."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from p2ptrain.data.samples import WindowSamples
from p2ptrain.errors import BundleError, CheckpointError, ConfigError, DataError, NotFound
from p2ptrain.ids import Digest, Lineage, RunId, ViewNumber
from p2ptrain.planner.objective import Objective
from p2ptrain.planner.profile import KindCost, SizedCosts
from p2ptrain.runtime.planning.job import Job, open_job, wanted_objective
from p2ptrain.runtime.planning.placement import Group, _outsiders, place, with_builds
from p2ptrain.runtime.reports import TrainRequest
from p2ptrain.store.runs import CheckpointRecord, RunDirectory, SavedSegment
from tests.bundles import CONTEXT, graph_files, tiny_bundle, write_bundle
from tests.memory_group import request_for, tiny_text
from tests.planning_cases import profile
from tests.sim.plans import BUILD

BUNDLE = tiny_bundle(blocks=1)
RUN = RunId("a" * 26)


def job_of(request: TrainRequest, path: Path) -> Job:
    return open_job(request, runs_path=path / "runs", new_run=RUN, default_threads=3)


def tokens_of(job: Job) -> tuple[bytes, bytes]:
    """Training and held-out text of a job over text."""
    assert isinstance(job.samples, WindowSamples)
    return job.samples.training_tokens.tobytes(), job.samples.heldout_tokens.tobytes()


def request(path: Path, **changes: object) -> TrainRequest:
    return request_for(path, BUNDLE, **changes)


def test_new_job_has_a_contract_without_builds(tmp_path: Path) -> None:
    job = job_of(request(tmp_path, threads=None), tmp_path)
    assert (job.run, job.view, job.first_step, job.checkpoint) == (RUN, 1, 0, None)
    assert job.contract.builds == ()
    assert job.contract.threads == 3
    assert not job.resumed
    assert job.contract.bundle == BUNDLE.digest
    text = tiny_text()
    training, heldout = tokens_of(job)
    assert training + heldout == text
    assert not (tmp_path / "runs").exists(), "opening a job writes nothing"


def test_heldout_file_leaves_the_training_text_whole(tmp_path: Path) -> None:
    heldout = tmp_path / "heldout.txt"
    heldout.write_bytes(tiny_text(100)[::-1])
    job = job_of(request(tmp_path, heldout=str(heldout)), tmp_path)
    assert tokens_of(job) == (tiny_text(), heldout.read_bytes())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"", "is empty"),
        (b"x" * CONTEXT, "takes 18"),
        (b"x" * (2 * CONTEXT + 1), "takes 18"),
    ],
)
def test_data_that_cannot_be_used_is_refused(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    wanted = request(tmp_path)
    path = Path(wanted.data)
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        job_of(wanted, tmp_path)


def test_smallest_text_is_enough(tmp_path: Path) -> None:
    wanted = request(tmp_path)
    Path(wanted.data).write_bytes(b"x" * (2 * CONTEXT + 2))
    job = job_of(wanted, tmp_path)
    assert tokens_of(job) == (b"x" * (CONTEXT + 1), b"x" * (CONTEXT + 1))


def test_short_heldout_file_is_the_one_that_is_named(tmp_path: Path) -> None:
    heldout = tmp_path / "heldout.txt"
    heldout.write_bytes(b"x" * CONTEXT)
    with pytest.raises(
        DataError, match=r"heldout.txt: 8 bytes of held-out text; one sample needs 9"
    ):
        job_of(request(tmp_path, heldout=str(heldout)), tmp_path)


def test_folder_without_text_is_no_data(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="holds no text files"):
        job_of(request(tmp_path, data=str(tmp_path / "folder")), tmp_path)


def test_names_of_fields_are_kept_for_a_resume(tmp_path: Path) -> None:
    data = tmp_path / "texts.jsonl"
    data.write_text('{"body": "a text of some length"}\n' * 20)
    wanted = request(tmp_path, data=str(data), text_field="body")
    job = job_of(wanted, tmp_path)
    assert job.data_notes == ("the data: 418 bytes of text; 22 held out",)
    job.directory.write_record(job.record(with_builds(job.contract, [BUILD])))
    job.directory.write_bundle(BUNDLE.manifest_bytes, graph_files(BUNDLE))
    again = job_of(request(tmp_path, resume=RUN), tmp_path)
    assert again.data_options.text_field == "body"
    assert tokens_of(again) == tokens_of(job)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"bundle": ""}, ConfigError, "a model and data"),
        ({"data": ""}, ConfigError, "a model and data"),
        ({"bundle": "nowhere"}, NotFound, "no bundle 'nowhere'"),
        ({"steps": 0}, ConfigError, "at least 1"),
        ({"microbatches": 0}, ConfigError, "microbatches must be"),
        ({"microbatches": 1 << 20}, ConfigError, "microbatches must be"),
        ({"heldout_microbatches": 0}, ConfigError, "held-out microbatches"),
        ({"microbatch_size": 0}, ConfigError, "at least 1"),
        ({"dropout": 1.0}, ConfigError, "dropout"),
        ({"seed": -1}, ConfigError, "seed"),
        ({"form": "fancy"}, ConfigError, "graph form"),
        ({"schedule": "zero-bubble"}, ConfigError, "unknown schedule"),
        ({"stages": 0}, ConfigError, "stages must be"),
        ({"stages": 65}, ConfigError, "stages must be"),
        ({"checkpoint_every": -1}, ConfigError, "checkpoints are 0 or more"),
        ({"evaluate_every": -1}, ConfigError, "evaluations are 0 or more"),
        ({"resume": "aa"}, NotFound, "no run 'aa'"),
    ],
)
def test_request_that_makes_no_sense_is_refused(
    tmp_path: Path, changes: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        job_of(request(tmp_path, **changes), tmp_path)


def test_directory_that_is_no_bundle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(BundleError, match=r"no manifest.json"):
        job_of(request(tmp_path, bundle=str(tmp_path / "empty")), tmp_path)


# Resuming.


@pytest.fixture
def begun(tmp_path: Path) -> Job:
    """A run that was agreed and has no checkpoint yet."""
    job = job_of(request(tmp_path), tmp_path)
    contract = with_builds(job.contract, [BUILD, BUILD])
    job.directory.write_record(job.record(contract))
    job.directory.write_bundle(BUNDLE.manifest_bytes, graph_files(BUNDLE))
    return dataclasses.replace(job, contract=contract)


def commit(job: Job, **changes: object) -> None:
    segments = tuple(
        SavedSegment(segment=i, blob=Digest("0" * 64), blob_bytes=1, state=Digest("0" * 64))
        for i in range(len(BUNDLE.manifest.segments))
    )
    whole = CheckpointRecord(
        run=job.run, lineage=Lineage(0), view=ViewNumber(1), plan=Digest("0" * 64), step=4,
        bundle=BUNDLE.digest, contract=job.contract.digest, segments=segments,
    )  # fmt: skip
    job.directory.write_segment(4, 0, b"x")
    job.directory.commit_checkpoint(dataclasses.replace(whole, **changes))  # type: ignore[arg-type]  # by name


def test_run_without_a_checkpoint_resumes_from_its_beginning(tmp_path: Path, begun: Job) -> None:
    job = job_of(request(tmp_path, resume="aaa", steps=999, seed=999), tmp_path)
    assert (job.first_step, job.lineage, job.view) == (0, 1, 1), "a lineage of its own"
    assert job.resumed
    assert job.contract == begun.contract, "a resumed run keeps its contract, whatever is asked"


def test_run_resumes_after_its_checkpoint(tmp_path: Path, begun: Job) -> None:
    commit(begun)
    job = job_of(request(tmp_path, resume=RUN), tmp_path)
    assert job.first_step == 4
    assert tokens_of(job) == tokens_of(begun)


def test_same_model_may_be_named_again_and_another_may_not(tmp_path: Path, begun: Job) -> None:
    same = str(tmp_path / "bundle")
    assert job_of(request(tmp_path, resume=RUN, bundle=same), tmp_path).run == RUN
    other = write_bundle(tmp_path / "other", tiny_bundle(blocks=3))
    with pytest.raises(CheckpointError, match="trains tiny, not this tiny bundle") as caught:
        job_of(request(tmp_path, resume=RUN, bundle=str(other)), tmp_path)
    assert "--model" in caught.value.hint


def test_bundle_that_was_exchanged_is_refused(tmp_path: Path, begun: Job) -> None:
    other = tiny_bundle(blocks=3)
    begun.directory.write_bundle(other.manifest_bytes, graph_files(other))
    with pytest.raises(CheckpointError, match="stored with run aaaaaaaa is another model"):
        job_of(request(tmp_path, resume=RUN), tmp_path)


@pytest.mark.parametrize("content", [b"other text " * 100, tiny_text()[:-1], tiny_text() + b"x"])
def test_data_that_has_changed_is_refused(tmp_path: Path, begun: Job, content: bytes) -> None:
    Path(begun.data).write_bytes(content)
    with pytest.raises(DataError, match=r"data of run aaaaaaaa has changed: .*data.txt"):
        job_of(request(tmp_path, resume=RUN), tmp_path)


def test_data_that_is_gone_is_refused(tmp_path: Path, begun: Job) -> None:
    Path(begun.data).unlink()
    with pytest.raises(DataError, match="no such file"):
        job_of(request_for(tmp_path, BUNDLE, resume=RUN), tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"contract": Digest("5" * 64)}, "another contract"),
        ({"bundle": Digest("5" * 64)}, "another model"),
        ({"run": RunId("b" * 26)}, "another run"),
    ],
)
def test_checkpoint_of_something_else_is_refused(
    tmp_path: Path, begun: Job, changes: dict[str, object], message: str
) -> None:
    commit(begun, **changes)
    with pytest.raises(CheckpointError, match=message):
        job_of(request(tmp_path, resume=RUN), tmp_path)


def test_run_directory_without_its_bundle_is_refused(tmp_path: Path, begun: Job) -> None:
    (begun.directory.bundle_path / "manifest.json").unlink()
    with pytest.raises(BundleError):
        job_of(request(tmp_path, resume=RUN), tmp_path)
    assert isinstance(begun.directory, RunDirectory)


# Who may take part (runtime.planning.placement).


def test_builds_of_a_contract_are_distinct_and_sorted(begun: Job) -> None:
    other = dataclasses.replace(BUILD, isa="avx512")
    assert with_builds(begun.contract, [other, BUILD, other]).builds == (BUILD, other)


def test_rematerialised_run_counts_the_second_forward(tmp_path: Path) -> None:
    plans = []
    for rematerialise in (False, True):
        wanted = request(tmp_path, rematerialise=rematerialise)
        job = job_of(wanted, tmp_path)
        assert job.contract.rematerialise == rematerialise
        peer = profile("a", [(1000, 2000)] * 4)
        peer = dataclasses.replace(
            peer, kinds=dict.fromkeys(job.bundle.manifest.kinds, peer.kinds["k0"])
        )
        found = place(wanted, job, Group(profiles={peer.device: peer}, home=peer.device))
        plans.append(found.plan)
    plain, again = (plan.stages[0].step_compute_ns for plan in plans)
    assert again == plain * 4 // 3


def test_resumed_run_takes_no_peer_of_another_build(tmp_path: Path, begun: Job) -> None:
    same = dataclasses.replace(profile("a", [(1, 1)]), build=BUILD)
    other = dataclasses.replace(
        profile("b", [(1, 1)]), build=dataclasses.replace(BUILD, version="9")
    )
    (left,) = _outsiders(begun, [same, other])
    assert left.device == other.device
    assert "numerics contract" in left.reason
    fresh = job_of(request(tmp_path), tmp_path)
    assert _outsiders(fresh, [same, other]) == ()


@pytest.mark.parametrize(
    "changes",
    [{"objective": "beauty"}, {"deadline_s": 0.0}, {"joules": float("nan")}, {"joules": -1.0}],
)
def test_an_objective_that_makes_no_sense_is_refused(
    tmp_path: Path, changes: dict[str, object]
) -> None:
    with pytest.raises(ConfigError, match=r"objective|more than nothing"):
        job_of(request(tmp_path, **changes), tmp_path)


def test_an_objective_is_kept_in_the_units_of_the_planner(tmp_path: Path) -> None:
    asked = request(tmp_path, objective="energy", deadline_s=2.5, joules=1e-9)
    assert wanted_objective(asked) == Objective(
        goal="energy", deadline_ns=2_500_000_000, joules_uj=1
    )


def test_a_run_that_leaves_its_size_to_the_planner_gets_the_fastest(tmp_path: Path) -> None:
    wanted = request(tmp_path, microbatch_size=None, microbatches=4, schedule="auto", codec="auto")
    job = job_of(wanted, tmp_path)
    assert (job.contract.microbatch_size, job.contract.codec) == (4, "fp32")
    kinds = job.bundle.manifest.kinds

    def costs(time_ns: int) -> dict[str, KindCost]:
        return dict.fromkeys(kinds, KindCost(forward_ns=time_ns, backward_ns=time_ns))

    peer = dataclasses.replace(
        profile("a", []),
        kinds=costs(4000),
        other_sizes=(
            SizedCosts(microbatch_size=2, kinds=costs(1000)),
            SizedCosts(microbatch_size=8, kinds=costs(8000)),
        ),
    )
    found = place(wanted, job, Group(profiles={peer.device: peer}, home=peer.device))
    assert (found.contract.microbatch_size, found.contract.microbatches) == (2, 8)
    assert found.contract.minibatch_size == job.contract.minibatch_size
    assert found.contract.codec == "fp32"
    assert found.profiles[peer.device].kinds == costs(1000)
    assert found.plan.contract == found.contract.digest
    assert "8 microbatches of 2, fp32" in found.plan.reasons[-1]
