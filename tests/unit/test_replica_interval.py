"""The steps between replica sets follow from what sending and recovering cost."""

from __future__ import annotations

from p2ptrain.planner.replica_interval import REPLICA_EVERY_MIN, StageCosts, replica_interval

SECOND = 1_000_000_000
MB = 1_000_000


def costs(
    *, state: int = MB, log: int = MB // 10, compute: int = SECOND // 100, rate: int = 125 * MB
) -> StageCosts:
    return StageCosts(state_bytes=state, log_bytes=log, compute_ns=compute, bytes_per_s=rate)


def test_small_model_replicates_no_more_often_than_anybody_notices() -> None:
    found = replica_interval([costs(), costs()], step_ns=SECOND // 20)
    assert found.steps == REPLICA_EVERY_MIN
    assert "fewest" in found.reason


def test_large_state_takes_as_many_steps_as_half_the_link_needs() -> None:
    found = replica_interval([costs(state=100 * MB, rate=2 * MB), costs()], step_ns=SECOND)
    assert found.steps == 100  # 50 s on the link, so 100 s of steps


def test_set_costs_a_fiftieth_of_the_processor_at_most() -> None:
    found = replica_interval([costs(state=100 * MB), costs()], step_ns=SECOND)
    assert found.steps == 40  # 0.8 s of work in 40 s
    assert "costs little" in found.reason


def test_bounds_come_before_thrift() -> None:
    slow = replica_interval([costs(state=1000 * MB, compute=2 * SECOND)], step_ns=2 * SECOND)
    assert slow.steps == 12  # 8 s to fetch the state leave 52 s, and logs may reach back two sets
    assert "time" in slow.reason
    fat = replica_interval([costs(state=100 * MB, log=10 * MB)], step_ns=SECOND)
    assert fat.steps == 13
    assert "logs" in fat.reason


def test_no_bound_makes_a_set_come_before_the_last_one_was_sent() -> None:
    found = replica_interval([costs(state=10_000 * MB)], step_ns=SECOND)
    assert found.steps == 160  # 80 s on the link: it can never be back within 60 s
    assert "carries" in found.reason
    assert found.replay_ns > 60 * SECOND


def test_bert_base_on_100_mbit() -> None:
    """Three stages of a BERT-base with AdamW, 16 samples of 32 tokens, a step of 5 s."""
    stage = costs(state=438 * MB, log=3 * MB, compute=5 * SECOND // 3, rate=12_500_000)
    found = replica_interval([stage] * 3, step_ns=5 * SECOND)
    assert found.steps == 15  # 35 s on the link; 6 steps of 30 s could never be sent
    assert found.replay_ns // SECOND == 92
