"""Campaigns: `python -m tests.sim.run --seeds 5000`. Exit code 1 on a violation.

Two stories: `run` is one run's views, steps and recovery; `group` is membership and the agreement
on a run's first plan.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from tests.sim.run_scenario import RunOutcome, run_story
from tests.sim.scenario import Outcome, run_seed

T = TypeVar("T")
STORIES = ("run", "group")
PROGRESS_S = 10.0


def replay_command(seed: int, story: str) -> str:
    """What a person types to see one failing seed again."""
    return f"python -m tests.sim.run --story {story} --seeds 1 --first {seed}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=200, help="how many seeds of each story")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--story", choices=STORIES, help="only this one")
    chosen = parser.parse_args(arguments)
    seeds = range(chosen.first, chosen.first + chosen.seeds)
    broken = 0
    if chosen.story != "group":
        broken += campaign("run", seeds, lambda seed: run_story(seed), _summary_of_runs)
    if chosen.story != "run":
        broken += campaign("group", seeds, lambda seed: run_seed(seed), _summary_of_groups)
    return 1 if broken else 0


def campaign(
    story: str, seeds: range, tell: Callable[[int], T], summary: Callable[[Sequence[T]], str]
) -> int:
    """Run the seeds with a line of progress now and then; gives the number of violations."""
    outcomes, broken = [], 0
    began = shown = time.perf_counter()
    for seed in seeds:
        try:
            outcomes.append(tell(seed))
        except AssertionError as error:
            broken += 1
            print(f"seed {seed}: {error}\n  replay: {replay_command(seed, story)}", flush=True)
        if time.perf_counter() - shown > PROGRESS_S:
            shown = time.perf_counter()
            done = seed + 1 - seeds.start
            print(f"{story}: {done} of {len(seeds)} seeds, {broken} violations", flush=True)
    seconds = time.perf_counter() - began
    counted = f"{story}: {len(seeds)} seeds, {broken} violations"
    print(f"{counted}, {summary(outcomes)}, {seconds:.1f} s", flush=True)
    return broken


def _summary_of_runs(outcomes: Sequence[RunOutcome]) -> str:
    def total(name: str) -> int:
        return sum(getattr(outcome, name) for outcome in outcomes)

    return (
        f"{total('steps')} steps in {total('views')} views, {total('replays')} replays, "
        f"{total('checked_claims')} of {total('claims')} claims of protection tried, "
        f"{total('returns')} disks gone back, "
        f"{total('forced')} runs forced after losses beyond one, {total('ended')} of them ended "
        f"without data, {total('messages')} messages"
    )


def _summary_of_groups(outcomes: Sequence[Outcome]) -> str:
    slowest = [
        max((getattr(outcome, name) for outcome in outcomes), default=0.0)
        for name in ("heal_s", "death_s", "silence_s")
    ]
    return (
        f"{sum(outcome.decided for outcome in outcomes)} of "
        f"{sum(outcome.proposals for outcome in outcomes)} proposals decided, "
        f"{sum(outcome.messages for outcome in outcomes)} messages, slowest healing "
        f"{slowest[0]:.2f} s, death {slowest[1]:.2f} s, silence {slowest[2]:.2f} s"
    )


if __name__ == "__main__":
    sys.exit(main())
