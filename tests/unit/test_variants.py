"""What a run could be where its owner leaves that to the planner."""

from __future__ import annotations

import dataclasses

import pytest

from p2ptrain.planner.choose import choose_plan
from p2ptrain.runtime.planning.variants import (
    Way,
    asked_size,
    best,
    chosen,
    contracts,
    may_delay,
    other_sizes,
)
from p2ptrain.runtime.reports import TrainRequest
from tests.bundles import contract_for, tiny_bundle
from tests.parted_bundle import parted_bundle
from tests.planning_cases import contract, planning_input, profile

REQUEST = TrainRequest(bundle="b", data="d")
CONTRACT = contract(microbatches=8, microbatch_size=4)
PLAN = choose_plan(planning_input([profile("a", [(1000, 2000)])], segment_count=1)).plan


def test_nothing_is_chosen_unasked() -> None:
    assert contracts(REQUEST, CONTRACT) == (CONTRACT,)
    assert other_sizes(REQUEST) == ()


@pytest.mark.parametrize(
    ("schedule", "parallelism", "rematerialise", "parted", "wanted"),
    [
        ("auto", "pipeline", False, True, True),
        ("zb-h1", "auto", False, True, True),
        ("eager-1f1b", "pipeline", False, True, False),
        ("auto", "data", False, True, False),
        ("auto", "hybrid", False, True, False),
        ("auto", "pipeline", True, True, False),
        ("auto", "pipeline", False, False, False),
    ],
)
def test_backwards_are_measured_in_parts_only_where_it_may_matter(
    schedule: str, parallelism: str, rematerialise: bool, parted: bool, wanted: bool
) -> None:
    bundle = parted_bundle(tiny_bundle()) if parted else tiny_bundle()
    asked = contract_for(bundle, rematerialise=rematerialise)
    asked = dataclasses.replace(asked, parallelism=parallelism)
    assert may_delay(schedule, bundle.manifest, asked) is wanted


def test_a_minibatch_is_divided_in_every_way_that_is_known() -> None:
    asked = dataclasses.replace(REQUEST, microbatch_size=None)
    assert (asked_size(asked), other_sizes(asked)) == (4, (1, 2, 8))
    found = contracts(asked, CONTRACT)
    assert found[0] == CONTRACT
    assert {(c.microbatch_size, c.microbatches) for c in found} == {
        (4, 8),
        (1, 32),
        (2, 16),
        (8, 4),
    }
    assert {c.minibatch_size for c in found} == {32}
    samples = {c.heldout_microbatches * c.microbatch_size for c in found if c.microbatch_size <= 4}
    assert samples == {4}
    odd = dataclasses.replace(asked, microbatches=1)
    assert other_sizes(odd) == (1, 2), "8 are more than a step has"


def test_every_choice_is_combined() -> None:
    asked = dataclasses.replace(REQUEST, codec="auto", rematerialise=None)
    found = [(c.codec, c.rematerialise) for c in contracts(asked, CONTRACT)]
    assert found[0] == ("fp32", False)
    assert len(set(found)) == len(found) == 6


@pytest.mark.parametrize(
    ("codec", "step_ns", "wins"), [("int8", 950, False), ("int8", 890, True), ("fp32", 999, True)]
)
def test_a_codec_that_rounds_must_gain_a_tenth(codec: str, step_ns: int, wins: bool) -> None:
    exact = Way(contract=CONTRACT, plan=dataclasses.replace(PLAN, step_ns=1000))
    other = Way(
        contract=dataclasses.replace(CONTRACT, codec=codec),
        plan=dataclasses.replace(PLAN, step_ns=step_ns),
    )
    assert (best([exact, other]) is other) == wins
    assert best([exact, exact]) is exact


def test_least_energy_compares_joules() -> None:
    ways = [
        Way(
            contract=CONTRACT,
            plan=dataclasses.replace(PLAN, goal="energy", step_ns=step_ns, step_uj=step_uj),
        )
        for step_ns, step_uj in ((1, 100), (1000, 10))
    ]
    assert best(ways) is ways[1]


def test_the_choice_is_said() -> None:
    way = Way(contract=CONTRACT, plan=PLAN)
    assert chosen(way, 6) == "chosen of 6 ways: 8 microbatches of 4, fp32, not rematerialised"
