"""Private plans: the owner has both ends, which share its memory and its cores."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import replace

import pytest

from p2ptrain.errors import PlanInfeasible
from p2ptrain.planner.arrangement import Arrangement
from p2ptrain.planner.choose import choose_plan, run_question
from p2ptrain.planner.ends import ends_bytes, fits_ends, private_objection
from p2ptrain.planner.input import PlanningInput
from p2ptrain.planner.plan import Plan
from p2ptrain.planner.pricing import Pricing
from p2ptrain.recovery.placing import placing
from p2ptrain.recovery.successor import Succession, Wish, successor_plans
from p2ptrain.store.bundles import load_bundle, shipped_bundles
from tests.planning_cases import device, manifest, planning_input, profile

A, B, C, D = (device(letter) for letter in "abcd")


def planning(segments: int = 6, room: int = 10**6, **changes: object) -> PlanningInput:
    times = [(1_000_000, 2_000_000)] * segments
    profiles = [profile("a", times, memory_bytes=room)]
    profiles += [profile(letter, times) for letter in "bcd"]
    base = planning_input(profiles, segment_count=segments)
    return replace(base, home=A, private=True, **changes)  # type: ignore[arg-type]  # by name


def owners(plan: Plan) -> str:
    return "".join(stage.device[0] for stage in plan.stages)


def arranged(given: PlanningInput, order: str) -> tuple[Pricing, Arrangement]:
    pricing = Pricing(run_question(given))
    index = {each.id[0]: i for i, each in enumerate(pricing.devices)}
    arrangement = pricing.arrange(tuple((index[letter],) for letter in order), "1f1b")
    assert arrangement is not None
    return pricing, arrangement


@pytest.mark.parametrize("stages", [3, 4, 5])
def test_owner_has_the_first_and_the_last_stage(stages: int) -> None:
    plan = choose_plan(planning(stages=stages)).plan
    assert len(plan.stages) == stages
    assert plan.stages_of(A) == (0, stages - 1)
    assert plan.keep_data_here
    assert plan.holders == (A,)
    assert (plan.replicas[0], plan.replicas[-1]) == (A, A)
    assert A not in owners(plan)[1:-1]
    assert any(reason.startswith("private: aaaaaaaa has the first") for reason in plan.reasons)


def test_both_ends_take_turns_on_the_owners_cores() -> None:
    pricing, folded = arranged(planning(), "aba")
    spans = pricing.timeline(folded, (1, 5, 6)).spans
    own = sorted((s.start_ns, s.end_ns) for stage in (0, 2) for s in spans[stage][0])
    assert all(first[1] <= second[0] for first, second in itertools.pairwise(own))
    _, apart = arranged(planning(), "abc")
    # Where nothing waits for the other end, one device is as slow as both stages together.
    busy = sum(end - start for start, end in own)
    assert pricing.timeline(folded, (2, 3, 6)).end_ns >= busy
    assert pricing.timeline(apart, (2, 3, 6)).end_ns < pricing.timeline(folded, (2, 3, 6)).end_ns


def test_memory_of_both_ends_counts_together() -> None:
    pricing, folded = arranged(planning(), "aba")
    needs = ends_bytes(pricing, folded, (1, 5, 6))
    pricing, folded = arranged(planning(room=needs), "aba")
    assert fits_ends(pricing, folded, (1, 5, 6))
    assert not fits_ends(pricing, folded, (2, 5, 6))
    plan = choose_plan(planning(room=needs, stages=3)).plan
    assert plan.memory_of(A) <= needs
    with pytest.raises(PlanInfeasible, match="the first and the last stage need at least"):
        choose_plan(planning(room=150))


@pytest.mark.parametrize("order", ["aba", "abca", "abc"])
def test_every_byte_that_is_sent_is_received_once(order: str) -> None:
    pricing, arrangement = arranged(planning(), order)
    shares = pricing.shares(arrangement, (1, 3, 5, 6)[-len(order) :], [10] * len(order))
    sent = sum(share.sent_bytes for share in shares)
    assert sum(share.moved_bytes for share in shares) == 2 * sent


def test_too_few_segments_leave_the_owner_alone_and_say_why() -> None:
    plan = choose_plan(planning(segments=2)).plan
    assert owners(plan) == "a"
    (sentence,) = [reason for reason in plan.reasons if reason.startswith("private:")]
    assert "trains alone: the model has 2 segments" in sentence
    with pytest.raises(PlanInfeasible, match="no private plan has 3 stages") as refused:
        choose_plan(planning(segments=2, stages=3))
    assert "use --stages 1" in (refused.value.hint or "")


def test_values_that_nobody_differentiates_stay_with_the_owner() -> None:
    chain = manifest(4)
    kinds = {
        name: dataclasses.replace(
            kind, outputs=tuple(replace(port, differentiable=False) for port in kind.outputs)
        )
        for name, kind in chain.kinds.items()
    }
    assert private_objection(chain) is None
    handing_on = replace(chain, kinds=kinds)
    assert "follow from, inputs" in (private_objection(handing_on) or "")


def test_a_mask_beside_what_is_differentiated_stays_with_the_owner() -> None:
    """BERT's attention mask goes from block to block, and is one of its inputs."""
    bert = load_bundle(shipped_bundles()["bert-mini"]).manifest
    crossing = [port.differentiable for port in bert.kinds["attention"].outputs]
    assert sorted(crossing) == [False, True]
    assert "follow from, inputs" in (private_objection(bert) or "")
    assert private_objection(load_bundle(shipped_bundles()["llama-nano"]).manifest) is None


def test_lost_stages_between_go_to_the_owner_or_another() -> None:
    given = planning(stages=4)
    base = choose_plan(given).plan
    lost = base.stages[1].device
    usable = [each for each in base.members if each != lost]
    follow = Succession(base=base, usable=usable, holding=(A,), reason="it is gone")
    plans = successor_plans(follow, placing(given))
    assert plans
    for plan in plans:
        assert plan.private
        assert plan.stages_of(A) in ((0,), (0, len(plan.stages) - 1))
        assert plan.stages[-1].device == A


def test_lone_owner_is_no_two_stages() -> None:
    plan = choose_plan(planning(stages=3)).plan
    first, middle, last = plan.stages
    two = (replace(first, segment_count=first.segment_count + middle.segment_count), last)
    with pytest.raises(ValueError, match="home peer has the first"):
        replace(plan, stages=two, replicas=())
    with pytest.raises(ValueError, match="a device has two stages"):
        replace(plan, private=False, replicas=())
    with pytest.raises(ValueError, match="stays where it is"):
        replace(plan, keep_data_here=False)
    with pytest.raises(ValueError, match="private ones by no other"):
        replace(plan, replicas=(B, A, A))


def test_private_placements_keep_both_ends_together() -> None:
    place = placing(planning())
    wishes = [
        Wish(devices=(each,), weights=(1,), segments=own)
        for each, own in ((A, range(2)), (B, range(2, 5)), (A, range(5, 6)))
    ]
    placed = place(wishes)
    assert placed is not None
    assert [stage.device for stage in placed.stages] == [A, B, A]
