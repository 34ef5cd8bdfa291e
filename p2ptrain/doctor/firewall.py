"""Read this device's firewall, where that is allowed."""

from __future__ import annotations

import json
import os

from p2ptrain.diagnosis.firewall import Firewall, parse_iptables, parse_nftables
from p2ptrain.doctor.programs import find_program, run_program

PROGRAMS = ("nft", "iptables")


def is_hidden() -> bool:
    """Whether there may be rules that only root can read."""
    is_root = os.name != "posix" or os.geteuid() == 0
    return not is_root and any(find_program(name) for name in PROGRAMS)


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
