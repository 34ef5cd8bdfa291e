"""Read this device's firewall, where that is allowed."""

from __future__ import annotations

import json

from p2ptrain.diagnosis.firewall import Firewall, parse_iptables, parse_nftables
from p2ptrain.doctor.programs import run_program


def firewall() -> Firewall | None:
    """The rules for incoming packets; None where they cannot be read (it takes root)."""
    ruleset = run_program("nft", "-j", "list", "ruleset")
    if ruleset is not None:
        try:
            return parse_nftables(json.loads(ruleset))
        except ValueError:
            return None
    rules = run_program("iptables", "-S")
    return None if rules is None else parse_iptables(rules)
