"""Plans that a person asks for: priced as they are, or refused with the nearest that works."""

from __future__ import annotations

import dataclasses

import pytest

from p2ptrain.bundle.manifest import Value
from p2ptrain.bundle.sharding import Sharding
from p2ptrain.errors import ConfigError, PlanInfeasible
from p2ptrain.ids import DeviceId
from p2ptrain.planner.asked import Known, asked_candidate
from p2ptrain.planner.explore import Candidate, Explorer
from p2ptrain.planner.kinds import KINDS
from p2ptrain.planner.objective import Objective
from p2ptrain.planner.plan_file import read_plan
from p2ptrain.planner.pricing import Pricing
from p2ptrain.planner.question import Question
from p2ptrain.schedule.actions import Held
from tests.planning_cases import device
from tests.planning_questions import bert_question, equal_devices, question

A, B, C = (device(letter) for letter in "abc")


def _asked(memory_bytes: int = 1 << 40, slowness: tuple[int, ...] = (1, 1, 1)) -> Question:
    return question(
        equal_devices("abc", segment_count=6, memory_bytes=memory_bytes, slowness=slowness),
        segment_count=6,
    )


def _forced(text: str, asked: Question | None = None, known: Known | None = None) -> Candidate:
    pricing = Pricing(asked or _asked())
    plan = read_plan(text, file="p.toml")
    return asked_candidate(plan, explorer=Explorer(pricing), pricing=pricing, known=known)


def _stages(*stages: tuple[list[str], int | str], schedule: str = "1f1b") -> str:
    tables = [f"[[stage]]\ndevices = {names}\nsegments = {count}\n" for names, count in stages]
    return "\n".join([f'schedule = "{schedule}"', *tables])


def _shared(names: list[str], count: int | str, line: str = "", schedule: str = "1f1b") -> str:
    return _stages((names, count), schedule=schedule) + line + "\n"


def test_it_is_priced_as_asked() -> None:
    candidate = _forced(_stages(([B], 2), ([C, A], 4), schedule="gpipe"))
    assert (candidate.kind, candidate.schedule) == ("hybrid", "gpipe")
    assert candidate.devices == (1, 2, 0), "by rank, as they are written"
    assert candidate.cuts == (2, 6)


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("[[stage]", "is not TOML", "README"),
        ("", "has no stages", "[[stage]]"),
        (_stages(([A], 6), schedule="zz"), "unknown schedule 'zz'", "1f1b"),
        (_stages((["x"], 6)), "no device 'x'", "devices:"),
        (_stages(([A[:-1] + "x"], 6)), "no device", f"did you mean '{A}'?"),
        (_stages(([A], 3), ([A], 3)), "named twice", "one stage"),
        (_stages(([], 6)), "needs devices", "laptop"),
        (_stages(([A], 0), ([B], 6)), "stage 0 needs a number", "segments = 4"),
        (_stages(([A], 10**30)), "stage 0 needs a number", "segments = 4"),
        (_shared([A], f"1{'0' * 5000}"), "thousands of digits", "correct"),
        ('shedule = "zb-h1"\n' + _stages(([A], 6)), "unknown key 'shedule'", "mean schedule?"),
        (_stages(([A], 2), ([B], 3)), "have 5 segments, the model has 6", "have to take 4"),
        (_stages(([A], 7), ([B], 3)), "have 10 segments", "take some away"),
        (_shared([A, B], 6, 'split = "rows"'), "unknown split 'rows'", "tensor"),
        (_shared([A], 6, 'split = "tensor"'), "nobody to share", "another device"),
        (_shared([A, B], 6, "weights = [1]"), "2 devices and 1 weights", "one weight"),
        (_shared([A, B], 6, "weights = [1, 0]"), "weights are whole numbers", "[3, 1]"),
        (_shared([A, B], 6, "weight = [1, 1]"), "unknown key 'weight'", "weights"),
        (
            _shared([A, B], 3, 'split = "tensor"') + _stages(([C], 3)).split("\n", 1)[1],
            "share all of it",
            "one stage",
        ),
        (
            _shared([A, B], 6, schedule="zb-h1"),
            "no schedule of stages that several",
            '"1f1b"',
        ),
        (_stages(([A], 3), ([A[:8]], 3)), "named twice", "one stage"),
    ],
)
def test_what_matches_neither_model_nor_devices_is_refused(
    text: str, message: str, hint: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        _forced(text)
    assert message in refused.value.message
    assert hint in refused.value.hint


def test_what_does_not_fit_names_cuts_that_do() -> None:
    asked = _asked(memory_bytes=900)  # 4 segments with one microbatch in flight, 3 with two
    with pytest.raises(PlanInfeasible) as refused:
        _forced(_stages(([A], 5), ([B], 1)), asked)
    assert "stage 0 needs 1.5 KiB" in refused.value.message
    counts = [int(word) for word in refused.value.hint.replace(",", "").split() if word.isdigit()]
    assert sum(counts) == 6
    fitting = _stages(([A], counts[0]), ([B], counts[1]))
    assert _forced(fitting, asked).memory_bytes == tuple(
        n * 100 * (1 + held) for n, held in zip(counts, (2, 1), strict=True)
    )
    with pytest.raises(PlanInfeasible, match="stage 0 needs") as refused:
        _forced(_stages(([A], 6)), asked)
    assert "nothing of this shape fits" in refused.value.hint


def test_limits_hold_for_asked_plans_too() -> None:
    asked = dataclasses.replace(_asked(), objective=Objective(deadline_ns=1000))
    with pytest.raises(PlanInfeasible, match="and the deadline is 1 us") as refused:
        _forced(_stages(([A], 6)), asked)
    assert refused.value.hint == "use --deadline 1.44"
    enough = dataclasses.replace(_asked(), objective=Objective(deadline_ns=1_440_000_000))
    _forced(_stages(([A], 6)), enough)
    nearly = dataclasses.replace(_asked(), objective=Objective(deadline_ns=1_300_000_000))
    with pytest.raises(PlanInfeasible, match="this plan takes") as refused:
        _forced(_stages(([A], 6)), nearly)
    assert refused.value.hint.startswith("use --deadline 1.44, or --steps 9 is possible, or leave ")


def test_a_replica_without_a_microbatch_is_refused() -> None:
    slow = _asked(slowness=(1, 100, 1))
    with pytest.raises(PlanInfeasible, match=f"{B} gets no microbatch of 8") as refused:
        _forced(_stages(([A, B], 6)), slow)
    assert refused.value.hint == f"use --microbatches 101, or leave {B} out"
    more = dataclasses.replace(slow, contract=dataclasses.replace(slow.contract, microbatches=101))
    assert _forced(_stages(([A, B], 6)), more).kind == "data"
    with pytest.raises(PlanInfeasible, match=f"{B} gets no microbatch of 8") as refused:
        _forced(_shared([A, B], 6, "weights = [1000000, 1]"))
    assert refused.value.hint == f"give {B} a larger weight, or leave {B} out"


def test_weights_say_who_runs_how_many_microbatches() -> None:
    candidate = _forced(_shared([B, A], 6, "weights = [3, 1]"))
    assert candidate.kind == "data"
    assert [(s.device, s.microbatches) for s in candidate.price.shares] == [(1, 6), (0, 2)]
    assert candidate.arrangement is not None
    assert candidate.arrangement.weights == ((3, 1),)
    found = _forced(_shared([B, A], 6), _asked(slowness=(1, 3, 1)))
    assert found.arrangement is not None
    assert found.arrangement.weights == ((2, 6),), "after their speeds, where none are written"


def test_devices_are_known_by_name_by_id_and_by_its_beginning() -> None:
    known = Known(names={DeviceId(A): "laptop", DeviceId(B): "cellar"})
    for word in ("cellar", B, B[:4]):
        assert _forced(_stages(([word], 6)), known=known).devices == (1,)
    known = Known(names={DeviceId(A): B[:4], DeviceId(B): "cellar"})
    assert _forced(_stages(([B[:4]], 6)), known=known).devices == (0,), "it is called just so"
    with pytest.raises(ConfigError) as refused:
        _forced(_stages((["celar"], 6)), known=known)
    assert "did you mean 'cellar'?" in refused.value.hint


def test_names_of_two_devices_and_of_absent_ones_are_refused() -> None:
    known = Known(names={DeviceId(A): "pi", DeviceId(B): "pi"}, absent={device("x"): "it is busy"})
    with pytest.raises(ConfigError, match="2 devices are called 'pi'") as refused:
        _forced(_stages((["pi"], 6)), known=known)
    assert A in refused.value.hint
    assert B in refused.value.hint
    with pytest.raises(ConfigError, match="takes no part: it is busy"):
        _forced(_stages(([device("x")], 6)), known=known)


def _bert(text: str, *, memory_bytes: int = 1 << 40, for_run: bool = False) -> Candidate:
    asked = bert_question("ab", "tensor", memory_bytes=memory_bytes)
    return _forced(text, dataclasses.replace(asked, for_run=for_run))


@pytest.mark.parametrize("split", ["tensor", "sequence"])
def test_a_whole_model_is_shared_by_weights(split: str) -> None:
    candidate = _bert(_shared([A, B], 26, f'split = "{split}"\nweights = [2, 1]'))
    assert (candidate.kind, candidate.weights) == (split, (2, 1))
    slower, faster = candidate.price.shares[1], candidate.price.shares[0]
    assert slower.compute_ns < faster.compute_ns


def test_a_run_shares_nothing_that_its_bundle_does_not_describe() -> None:
    text = _shared([A, B], 26, 'split = "tensor"')
    with pytest.raises(PlanInfeasible, match="no tensor sharding because the bundle does") as no:
        _bert(text, for_run=True)
    assert "2 stages of one device" in no.value.hint
    assert _bert(text).kind == "tensor", "what-if takes it for what its parameters look like"


def test_more_devices_than_units_are_refused() -> None:
    asked = bert_question("abcdefghijklm", "tensor")
    names = [device(letter) for letter in "abcdefghijklm"]
    with pytest.raises(PlanInfeasible, match="12 heads or columns for 13 devices"):
        _forced(_shared(names, 26, 'split = "tensor"'), asked)


def test_a_bundle_says_itself_why_it_cannot_be_shared() -> None:
    asked = bert_question("ab", "tensor")
    whole = dict.fromkeys(asked.manifest.kinds, "no axis is sliced")
    sharding = {"tensor": Sharding(kinds={}, whole=whole)}
    asked = dataclasses.replace(
        asked, manifest=dataclasses.replace(asked.manifest, sharding=sharding)
    )
    with pytest.raises(PlanInfeasible, match="no tensor sharding because no segment can be"):
        _forced(_shared([A, B], 26, 'split = "tensor"'), asked)


def test_a_part_that_does_not_fit_is_refused() -> None:
    with pytest.raises(PlanInfeasible, match="its part needs"):
        _bert(_shared([A, B], 26, 'split = "sequence"'), memory_bytes=10)


def test_running_statistics_keep_a_model_from_being_shared() -> None:
    """They are made of all microbatches, one after the other."""
    base = _asked()
    kinds = {
        name: dataclasses.replace(kind, running=(Value(name="mean", shape=(4,), dtype="float32"),))
        for name, kind in base.manifest.kinds.items()
    }
    asked = dataclasses.replace(base, manifest=dataclasses.replace(base.manifest, kinds=kinds))
    with pytest.raises(PlanInfeasible, match="running statistics"):
        _forced(_stages(([A, B], 6)), asked)
    with pytest.raises(PlanInfeasible, match="no tensor sharding") as refused:
        _forced(_shared([A, B], 6, 'split = "tensor"'), asked)
    assert refused.value.hint == "2 stages of one device each need no sharding"
    assert _forced(_stages(([A], 3), ([B], 3)), asked).kind == "pipeline"
    found = Explorer(Pricing(dataclasses.replace(asked, kinds=KINDS))).run()
    assert {"data", "hybrid"} <= found.objections.keys() - found.by_kind.keys()
    assert "running statistics" in found.objections["data"]


def test_replicas_need_room_for_each_others_gradients() -> None:
    pricing = Pricing(_asked())
    alone, shared = (pricing.memory_bytes(0, 6, Held(in_flight=2, delayed=0), n) for n in (1, 3))
    gradients = sum(s.gradient_bytes for s in pricing.costs.segments)
    assert gradients > 0
    assert shared - alone == -(-2 * 2 * gradients // 3)
