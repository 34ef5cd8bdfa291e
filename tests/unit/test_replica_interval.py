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
    found = replica_interval([costs(state=1000 * MB), costs()], step_ns=SECOND // 2)
    assert found.steps == 32  # 8 s on the link, so 16 s of steps


def test_bounds_come_before_thrift() -> None:
    slow = replica_interval([costs(state=6000 * MB, compute=2 * SECOND)], step_ns=SECOND)
    assert slow.steps == 2  # 48 s to fetch the state leave 12 s, and logs may reach back two sets
    assert "time" in slow.reason
    fat = replica_interval([costs(state=1000 * MB, log=40 * MB)], step_ns=SECOND)
    assert fat.steps == 3
    assert "logs" in fat.reason


def test_what_can_never_be_in_time_replicates_every_step() -> None:
    assert replica_interval([costs(state=100_000 * MB)], step_ns=SECOND).steps == 1


def test_bert_base_on_100_mbit() -> None:
    """Three stages of a BERT-base with AdamW, 16 samples of 32 tokens, a step of 5 s."""
    stage = costs(state=438 * MB, log=3 * MB, compute=5 * SECOND // 3, rate=12_500_000)
    found = replica_interval([stage] * 3, step_ns=5 * SECOND)
    assert found.steps == 6
    assert found.replay_ns < 60 * SECOND
