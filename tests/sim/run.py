"""Campaigns: `python -m tests.sim.run --seeds 5000 --first 0`. Exit code 1 on a violation."""

from __future__ import annotations

import argparse
import sys
import time

from tests.sim.scenario import Outcome, run_seed


def replay_command(seed: int) -> str:
    """What a person types to see one failing seed again."""
    return f"python -m tests.sim.run --seeds 1 --first {seed}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=60)
    parser.add_argument("--first", type=int, default=0)
    chosen = parser.parse_args(arguments)
    outcomes, broken, began = [], 0, time.perf_counter()
    for seed in range(chosen.first, chosen.first + chosen.seeds):
        try:
            outcomes.append(run_seed(seed))
        except AssertionError as error:
            broken += 1
            print(f"seed {seed}: {error}\n  replay: {replay_command(seed)}")
    print(_summary(outcomes, broken, time.perf_counter() - began))
    return 1 if broken else 0


def _summary(outcomes: list[Outcome], broken: int, seconds: float) -> str:
    decided = sum(outcome.decided for outcome in outcomes)
    proposals = sum(outcome.proposals for outcome in outcomes)
    messages = sum(outcome.messages for outcome in outcomes)
    slowest = [
        max((getattr(outcome, name) for outcome in outcomes), default=0.0)
        for name in ("heal_s", "death_s", "silence_s")
    ]
    return (
        f"{len(outcomes) + broken} seeds, {broken} violations, {decided} of {proposals} proposals"
        f" decided, {messages} messages, {seconds:.1f} s; slowest healing {slowest[0]:.2f} s,"
        f" death {slowest[1]:.2f} s, silence {slowest[2]:.2f} s"
    )


if __name__ == "__main__":
    sys.exit(main())
