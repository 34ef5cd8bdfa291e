"""Medians, ratios round by round and verdicts of `tools/bench_pipeline.py`."""

from __future__ import annotations

import pytest

from tools.bench.ratios import (
    TORCH,
    TORCH_1F1B,
    TORCH_ZERO_BUBBLE,
    Spread,
    Target,
    Turn,
    Verdict,
    loss_difference,
    ours,
    ratios,
    spread,
    targets,
    verdicts,
)


def turn(*seconds: float, losses: tuple[float, ...] = ()) -> Turn:
    return Turn(seconds=seconds, losses=losses)


def test_turn_median_leaves_out_the_warm_up() -> None:
    assert turn(9.0, 1.0, 3.0, 2.0).median_s(dropped=1) == 2.0
    assert turn(9.0, 8.0, 3.0, 2.0).median_s(dropped=2) == 2.5


def test_spread_holds_median_and_ends() -> None:
    assert spread([3.0, 1.0, 2.0]) == Spread(median=2.0, least=1.0, greatest=3.0)


def test_ratios_are_taken_within_a_round() -> None:
    # The machine was twice as slow in the second round: both sides were, so the ratio is steady.
    assert ratios([3.0, 6.0, 3.0], [2.0, 4.0, 2.0]) == Spread(median=1.5, least=1.5, greatest=1.5)


def test_ratios_of_unequal_rounds_are_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        ratios([1.0, 2.0], [1.0])


@pytest.mark.parametrize(("median", "met"), [(1.59, False), (1.6, True), (1.7, True)])
def test_verdict_goes_by_the_median(median: float, met: bool) -> None:
    reached = Spread(median=median, least=1.0, greatest=9.0)
    assert Verdict(what="x", reached=reached, least=1.6).is_met is met


def test_targets_are_those_of_the_two_cases() -> None:
    one, two, long_one, long_two = ours(1, 8), ours(2, 8), ours(1, 32), ours(2, 32)
    delayed = ours(2, 8, "eager-zb-h1")
    assert {(t.fast, t.slow): t.least for t in targets(8, 32)} == {
        (one, TORCH): 1.6,
        (two, one): 1.5,
        (delayed, one): 1.8,
        (delayed, TORCH_ZERO_BUBBLE): 1.45,
        (long_two, long_one): 1.65,
        (two, TORCH_1F1B): 1.45,
    }
    assert all("32" not in target.fast for target in targets(8, None))


def test_verdicts_add_the_share_of_the_ceiling() -> None:
    one, two = ours(1, 8), ours(2, 8)
    steps_s = {one: [3.0, 3.4], two: [2.0, 2.0]}
    wanted = [Target(fast=two, slow=one, least=1.5)]
    speed_up, share = verdicts(steps_s, wanted, {(two, one): [1.6, 1.7]})
    assert speed_up.reached.median == pytest.approx(1.6)
    assert speed_up.is_met
    assert share.reached.median == pytest.approx((1.5 / 1.6 + 1.0) / 2)
    assert share.reached.least == pytest.approx(1.5 / 1.6)
    assert share.reached.greatest == pytest.approx(1.0)
    assert "1.650" in share.what


def test_verdicts_show_a_miss() -> None:
    one = ours(1, 8)
    (verdict,) = verdicts({one: [2.0], TORCH: [3.0]}, targets(8, None)[:1], {})
    assert verdict.reached.median == 1.5
    assert not verdict.is_met


def test_verdicts_leave_out_what_was_not_measured() -> None:
    assert verdicts({ours(1, 8): [1.0]}, targets(8, 32), {}) == ()


def test_loss_difference_is_the_largest_of_all_turns_and_steps() -> None:
    mine = [turn(losses=(8.0, 7.0)), turn(losses=(8.0, 7.5))]
    theirs = [turn(losses=(8.1, 7.0))]
    assert loss_difference(mine, theirs) == pytest.approx(0.5)


def test_loss_difference_refuses_turns_of_other_lengths() -> None:
    with pytest.raises(ValueError, match="shorter"):
        loss_difference([turn(losses=(8.0, 7.0))], [turn(losses=(8.0,))])
