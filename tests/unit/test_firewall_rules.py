"""Rules of nftables and iptables, as their programs print them, against a new connection."""

from __future__ import annotations

from typing import Any

import pytest

from p2ptrain.diagnosis.firewall import parse_iptables, parse_nftables

PORT = 47615


def match(left: dict[str, Any], right: object, op: str = "==") -> dict[str, Any]:  # Any: JSON
    return {"match": {"op": op, "left": left, "right": right}}


def dport(right: object, protocol: str = "tcp") -> dict[str, Any]:  # Any: JSON
    return match({"payload": {"protocol": protocol, "field": "dport"}}, right)


LOOPBACK = match({"meta": {"key": "iif"}}, "lo")
ESTABLISHED = match({"ct": {"key": "state"}}, ["established", "related"], "in")
NEW = match({"ct": {"key": "state"}}, "new", "in")
FROM_LAN = match({"payload": {"protocol": "ip", "field": "saddr"}}, "192.168.1.0/24")
ACCEPT, DROP, REJECT = {"accept": None}, {"drop": None}, {"reject": None}


def ruleset(*rules: list[dict[str, Any]], policy: str, inner: tuple[Any, ...] = ()) -> Any:  # Any
    """A table `filter` with an input chain, and a chain `ours` to jump to."""
    chain = {"family": "inet", "table": "filter"}
    entries: list[Any] = [{"metainfo": {"version": "1.0.6"}}]  # Any: JSON
    hook = {"name": "input", "type": "filter", "hook": "input", "policy": policy}
    entries += [{"chain": {**chain, **hook}}, {"chain": {**chain, "name": "ours"}}]
    entries += [{"rule": {**chain, "chain": "input", "expr": list(rule)}} for rule in rules]
    entries += [{"rule": {**chain, "chain": "ours", "expr": list(rule)}} for rule in inner]
    return {"nftables": entries}


@pytest.mark.parametrize(
    ("document", "is_blocked"),
    [
        (ruleset(policy="accept"), False),
        (ruleset(policy="drop"), True),
        (ruleset([LOOPBACK, ACCEPT], [ESTABLISHED, ACCEPT], policy="drop"), True),
        (ruleset([NEW, ACCEPT], policy="drop"), False),
        (ruleset([dport(PORT), ACCEPT], policy="drop"), False),
        (ruleset([dport(PORT, "udp"), ACCEPT], policy="drop"), True),
        (ruleset([dport({"set": [22, PORT]}), ACCEPT], policy="drop"), False),
        (ruleset([dport({"set": [22, {"range": [80, 90]}]}), ACCEPT], policy="drop"), True),
        (ruleset([dport({"range": [47000, 48000]}), DROP], policy="accept"), True),
        (ruleset([dport(22), DROP], policy="accept"), False),
        (ruleset([{"counter": {}}, REJECT], policy="accept"), True),
        (ruleset([FROM_LAN, ACCEPT], policy="drop"), False),
        (ruleset([FROM_LAN, DROP], policy="accept"), False),
        (ruleset([{"jump": {"target": "ours"}}], policy="accept", inner=([DROP],)), True),
        (ruleset([{"jump": {"target": "ours"}}], policy="drop", inner=([ACCEPT],)), False),
        (
            ruleset([{"jump": {"target": "ours"}}], policy="accept", inner=([{"return": None}],)),
            False,
        ),
        (
            ruleset([{"jump": {"target": "ours"}}], policy="accept",
                    inner=([{"jump": {"target": "ours"}}],)),
            False,
        ),
        ({"nftables": [{"chain": 3}, {"rule": {"expr": 4}}, 5]}, False),
        ([], False),
    ],
)  # fmt: skip
def test_nftables(document: object, is_blocked: bool) -> None:
    blocker = parse_nftables(document).blocker("tcp", PORT)
    assert blocker == ("filter input" if is_blocked else None)


UFW = """\
-P INPUT DROP
-P FORWARD DROP
-P OUTPUT ACCEPT
-N ufw-before-input
-N ufw-user-input
-A INPUT -j ufw-before-input
-A ufw-before-input -i lo -j ACCEPT
-A ufw-before-input -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A ufw-before-input -m conntrack --ctstate INVALID -j DROP
-A ufw-before-input -d 224.0.0.251/32 -p udp -m udp --dport 5353 -j ACCEPT
-A ufw-before-input -j ufw-user-input
-A ufw-user-input -p tcp -m tcp --dport 22 -j ACCEPT
"""


def test_iptables_as_ufw_writes_them() -> None:
    assert parse_iptables(UFW).blocker("tcp", PORT) == "INPUT"
    assert parse_iptables(UFW).blocker("tcp", 22) is None
    assert parse_iptables(UFW).blocker("udp", 5353) is None
    opened = f"{UFW}-A ufw-user-input -p tcp -m multiport --dports 80,47600:47700 -j ACCEPT\n"
    assert parse_iptables(opened).blocker("tcp", PORT) is None


@pytest.mark.parametrize(
    ("rules", "is_blocked"),
    [
        ("-P INPUT ACCEPT", False),
        ("-P INPUT ACCEPT\n-A INPUT -j LOG --log-prefix x\n-A INPUT -j DROP", True),
        ("-P INPUT ACCEPT\n-A INPUT -s 10.0.0.0/8 -j DROP", False),
        ("-P INPUT ACCEPT\n-A INPUT -p tcp -j REJECT --reject-with tcp-reset", True),
        ("-P INPUT DROP\n-A INPUT -s 192.168.0.0/16 -j ACCEPT", False),
        ("-P FORWARD DROP", False),
        ("", False),
    ],
)
def test_iptables(rules: str, is_blocked: bool) -> None:
    assert (parse_iptables(rules).blocker("tcp", PORT) is not None) == is_blocked
