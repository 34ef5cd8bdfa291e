"""The tool that measures membership, on groups small enough for a test."""

from __future__ import annotations

import json

import pytest

from p2ptrain import limits
from p2ptrain.membership.states import State
from tools import membership_scale
from tools.bench.membership_world import MembershipWorld
from tools.bench.real_group import RealGroupCost


def test_simulated_group_meets_and_notices_deaths() -> None:
    cost = membership_scale.simulate(8, seed=3)
    assert cost.know_all_s is not None
    assert 0.0 < cost.know_all_s < 3.0
    assert cost.links_per_peer == 7.0
    assert cost.killed_known_s is not None
    assert cost.killed_known_s < 1.0
    assert cost.stopped_known_s is not None
    assert 4.0 < cost.stopped_known_s < 6.0
    assert cost.false_deaths == 0
    # Everybody asks seven others each second and answers seven.
    assert cost.messages_per_peer_s == pytest.approx(14.0, rel=0.1)
    assert cost.by_name["membership.ping"] == pytest.approx(7.0, rel=0.1)
    assert cost.bytes_per_peer_s > 100


def test_world_keeps_to_the_links_a_peer_wants_and_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "LINK_PEERS_WANTED", 4)
    monkeypatch.setattr(limits, "LINK_PEERS_MAX", 8)
    world = MembershipWorld(count=20, seed=1)
    assert world.run_until(world.all_know_all, within_s=30.0) is not None
    assert max(len(node.links) for node in world.active()) <= 8
    victim = next(iter(world.nodes))
    world.stop(victim)
    assert world.run_until(lambda: world.all_hold(victim, State.DEAD), within_s=40.0) is not None
    assert world.false_deaths({victim}) == 0


def test_group_that_cannot_meet_is_said_so() -> None:
    world = MembershipWorld(count=6, seed=1)
    world.stop(next(iter(world.nodes)))
    assert world.run_until(world.all_know_all, within_s=3.0) is None


def test_tool_prints_a_table_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert membership_scale.main(["--sizes", "6,4", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [cost["peers"] for cost in printed] == [4, 6]
    assert membership_scale.main(["--sizes", "4"]) == 0
    assert "false" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        membership_scale.main(["--sizes", "3"])


def test_real_figures_are_printed_for_people() -> None:
    mib = 1024 * 1024
    cost = RealGroupCost(
        peers=3, started_s=1.0, together_s=2.0, restarted_s=1.5, restarted_cpu_s=4.0,
        resident_bytes=(90 * mib, 80 * mib, 91 * mib),
        proportional_bytes=(60 * mib, 61 * mib, 62 * mib), idle_cpu_fractions=(0.01, 0.02, 0.03),
        killed_known_s=0.2, stopped_known_s=5.0, returned_known_s=None,
    )  # fmt: skip
    text = membership_scale.real_table(cost)
    assert "RSS 90.0 MiB (80.0 to 91.0)" in text
    assert "all together PSS 183 MiB" in text
    assert "back after never s" in text
