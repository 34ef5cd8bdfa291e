"""Replicas of any number and weights run a step and an evaluation to the end, within their room."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from p2ptrain.schedule.actions import in_flight_max
from p2ptrain.schedule.replicated import (
    Owners,
    Passage,
    ReplicaTimes,
    owners_by_weight,
    play,
    replicated_actions,
    replicated_evaluation,
)

LINE = Passage(forward_lines=(("out", 1),), backward_lines=(("back", 1),), latency_ns=0)


@st.composite
def groups(draw: st.DrawFn) -> list[list[int]]:
    """By stage, the weights of its replicas."""
    one = st.lists(st.integers(1, 5), min_size=1, max_size=4)
    return draw(st.lists(one, min_size=1, max_size=5).filter(lambda g: max(map(len, g)) > 1))


def times(weights: list[list[int]], salt: int) -> list[list[ReplicaTimes]]:
    """Of any speeds."""
    return [
        [ReplicaTimes(forward_ns=1 + (w * salt) % 7, backward_ns=1 + (w + salt) % 5) for w in own]
        for own in weights
    ]


@given(groups(), st.sampled_from(["1f1b", "gpipe"]), st.integers(1, 16), st.integers(1, 20))
def test_nobody_waits_for_ever(
    weights: list[list[int]], schedule: str, microbatches: int, heldout: int
) -> None:
    replicas = [len(own) for own in weights]
    passages = {
        (stage, a, b): LINE
        for stage in range(len(weights) - 1)
        for a in range(replicas[stage])
        for b in range(replicas[stage + 1])
    }

    def owners(count: int) -> list[Owners]:
        return [owners_by_weight(own, count) for own in weights]

    step = replicated_actions(schedule, owners(microbatches), replicas)
    look = replicated_evaluation(owners(heldout), replicas, microbatches=microbatches)
    for actions, count in ((step, microbatches), (look, heldout)):
        played = play(actions, owners(count), times(weights, count), passages)
        ran = [span for own in played.spans for each in own for span in each]
        assert len(ran) == 2 * count * len(weights)
    for own in look:
        assert all(in_flight_max(actions) <= microbatches + 1 for actions in own)
