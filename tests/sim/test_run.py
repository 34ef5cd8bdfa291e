"""Simulated runs: the rules hold for many seeds, and every broken rule is noticed."""

from __future__ import annotations

import pytest

from tests.sim.checkers import Violation
from tests.sim.run import main, replay_command
from tests.sim.run_mutations import MUTATIONS
from tests.sim.run_scenario import run_story

SEEDS = 120
SEEDS_PER_TEST = 10
MUTATION_SEEDS = 80


@pytest.mark.parametrize("first", range(0, SEEDS, SEEDS_PER_TEST))
def test_run_keeps_its_rules(first: int) -> None:
    outcomes = []
    for seed in range(first, first + SEEDS_PER_TEST):
        try:
            outcomes.append(run_story(seed))
        except AssertionError as error:
            pytest.fail(f"seed {seed}: {error}; replay: {replay_command(seed, 'run')}")
    assert sum(outcome.commits for outcome in outcomes) > 500
    assert sum(outcome.views for outcome in outcomes) > 20
    assert sum(outcome.replays for outcome in outcomes) > 3
    assert sum(outcome.checked_claims for outcome in outcomes) > 20


@pytest.mark.parametrize("name", MUTATIONS)
def test_broken_rule_is_noticed(name: str) -> None:
    mutation = MUTATIONS[name]
    for seed in range(mutation.first_seed, mutation.first_seed + MUTATION_SEEDS):
        try:
            run_story(seed, rules=mutation.rules, flaws=mutation.flaws, fault=mutation.fault)
        except Violation as violation:
            if any(words in str(violation) for words in mutation.says):
                return
    pytest.fail(f"{MUTATION_SEEDS} seeds did not notice: {name}")


def test_same_seed_gives_the_same_story() -> None:
    assert run_story(3) == run_story(3)
    assert run_story(3) != run_story(4)


@pytest.mark.parametrize(
    "seed", [45, 247, 322, 441, 501, 593, 643, 680, 863, 1158, 1235, 2577, 4437]
)
def test_seed_that_once_broke_a_rule(seed: int) -> None:
    assert run_story(seed).commits > 0


def test_campaign_prints_how_to_replay_a_failing_seed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["--story", "run", "--seeds", "1", "--first", "4"]) == 0
    assert "run: 1 seeds, 0 violations" in capsys.readouterr().out

    def broken(seed: int) -> None:
        raise Violation("two views are decided")

    monkeypatch.setattr("tests.sim.run.run_story", broken)
    assert main(["--story", "run", "--seeds", "1", "--first", "4"]) == 1
    printed = capsys.readouterr().out
    assert "seed 4: two views are decided" in printed
    assert "replay: python -m tests.sim.run --story run --seeds 1 --first 4" in printed
