"""What the doctor says: each trouble with its exact sentence, its reason and its next step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from p2ptrain.diagnosis.diagnose import diagnose
from p2ptrain.diagnosis.findings import FINE, HINT, PROBLEM, Finding, duration
from p2ptrain.diagnosis.observations import Observations
from tests.diagnosis_cases import ALONE, CASES, DAY_S, NOW_S, UNHEARD, WELL, WLAN


def severities(observed: Observations) -> set[str]:
    return {finding.severity for finding in diagnose(observed).findings}


def test_well_device_has_no_problem_and_says_what_was_looked_at() -> None:
    found = {each.check: each.found for each in diagnose(WELL).findings}
    assert severities(WELL) == {FINE}
    assert found == {
        "interface": "wlan0 has 10.98.0.1/24",
        "certificate": "this device's certificate is good for 29 days more",
        "onnxruntime": "onnxruntime 1.20.1 is intact",
        "port": "the peer listens at port 47615",
        "firewall": "nftables lets TCP port 47615 and multicast DNS in",
        "multicast": "heard 1 other peer",
        "reach": "10.98.0.2:47615 answers after 11.0 ms",
        "version": "protocol 2 is spoken at 1 other place",
        "clock": "this device's clock agrees with 1 other",
        "peer": "linked with attic",
    }


def test_nothing_known_is_nothing_wrong_but_the_missing_group() -> None:
    (finding,) = diagnose(Observations(now_s=NOW_S, protocol=(2, 2))).findings
    assert (finding.check, finding.found) == ("group", "this device is in no group")


@pytest.mark.parametrize(
    ("changes", "severity", "check", "found", "next_step"),
    [case[1:] for case in CASES],
    ids=[case[0] for case in CASES],
)
def test_trouble_is_named(
    changes: dict[str, Any],  # Any: fields of several types
    severity: str,
    check: str,
    found: str,
    next_step: str,
) -> None:
    findings = diagnose(replace(WELL, **changes)).findings
    same = [each for each in findings if (each.check, each.found) == (check, found)]
    assert len(same) == 1, [f"{each.check}: {each.found}" for each in findings]
    assert (same[0].severity, same[0].next_step) == (severity, next_step)
    assert same[0].why


def test_problems_come_first_and_causes_before_consequences() -> None:
    no_address = replace(WLAN, networks=())
    observed = replace(WELL, interfaces=(no_address,), multicast=None, peer=ALONE, dials=())
    order = [(each.severity, each.check) for each in diagnose(observed).findings]
    assert order[:2] == [(PROBLEM, "interface"), (PROBLEM, "peer")]
    assert [severity for severity, _ in order] == sorted(
        (severity for severity, _ in order), key=[PROBLEM, HINT, FINE].index
    )


def test_without_a_peer_silence_is_only_a_hint() -> None:
    observed = replace(WELL, multicast=UNHEARD, peer=None, dials=())
    (said,) = [each for each in diagnose(observed).findings if each.check == "multicast"]
    assert said.severity == HINT
    assert "--peer 10.98.0.1:47615" in said.next_step


def test_finding_without_reason_or_next_step_cannot_be_made() -> None:
    with pytest.raises(ValueError, match="why it matters"):
        Finding(check="port", severity=PROBLEM, found="x")
    with pytest.raises(ValueError, match="no severity"):
        Finding(check="port", severity="bad", found="x")


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.4, "0 s"), (119, "119 s"), (120, "2 minutes"), (7200, "2 hours"), (2 * DAY_S, "2 days")],
)
def test_duration_has_the_largest_unit_that_fits(seconds: float, said: str) -> None:
    assert duration(seconds) == said
