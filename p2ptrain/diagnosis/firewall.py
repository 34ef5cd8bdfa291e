"""Would the rules of this machine's firewall let a new connection from the network in?

Rules are read in order, as the kernel does. A condition that cannot be judged here (an address, a
rate) counts as met for an accept and as not met for a drop: a false alarm is worse than none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

DEPTH_MAX: Final = 16
ACCEPT: Final = "accept"
BLOCKING: Final = ("drop", "reject")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One rule: what it wants of a packet, and what then happens."""

    verdict: str
    """accept, drop, reject, jump, or return."""
    target: str = ""
    """Of a jump: the chain's name."""
    protocol: str | None = None
    ports: tuple[tuple[int, int], ...] | None = None
    """Ranges of destination ports, both ends included; None: any."""
    never_new: bool = False
    """It only concerns loopback or connections that exist already."""
    is_conditional: bool = False
    """It has a condition that cannot be judged here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """A list of rules; `policy` is what happens at its end, None for one that is jumped to."""

    name: str
    rules: tuple[Rule, ...]
    policy: str | None = None
    is_input: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Firewall:
    """All chains that incoming packets may meet."""

    program: str
    """nftables or iptables."""
    chains: tuple[Chain, ...]

    def blocker(self, protocol: str, port: int) -> str | None:
        """Which chain keeps a new connection to this port out; None when none does."""
        by_name = {chain.name: chain for chain in self.chains}
        for chain in self.chains:
            if not chain.is_input:
                continue
            verdict = _judge(chain, by_name, protocol, port, DEPTH_MAX) or chain.policy
            if verdict in BLOCKING:
                return chain.name
        return None


def _judge(
    chain: Chain, by_name: Mapping[str, Chain], protocol: str, port: int, depth: int
) -> str | None:
    for rule in chain.rules:
        if not _applies(rule, protocol, port):
            continue
        if rule.verdict == "return":
            return None
        if rule.verdict != "jump":
            return rule.verdict
        inner = by_name.get(rule.target)
        if inner is None or depth == 0:
            continue
        verdict = _judge(inner, by_name, protocol, port, depth - 1)
        if verdict == ACCEPT or (verdict is not None and not rule.is_conditional):
            return verdict
    return None


def _applies(rule: Rule, protocol: str, port: int) -> bool:
    if rule.never_new or rule.protocol not in (None, protocol):
        return False
    if rule.ports is not None and not any(low <= port <= high for low, high in rule.ports):
        return False
    return not (rule.is_conditional and rule.verdict in (*BLOCKING, "return"))


def parse_nftables(document: object) -> Firewall:
    """The ruleset as `nft -j list ruleset` prints it; what is not understood is left out."""
    entries = document.get("nftables", ()) if isinstance(document, Mapping) else ()
    rules: dict[tuple[str, str], list[Rule]] = {}
    chains: list[Mapping[str, object]] = []
    for entry in entries if isinstance(entries, Sequence) else ():
        if not isinstance(entry, Mapping):
            continue
        chain, rule = entry.get("chain"), entry.get("rule")
        if isinstance(chain, Mapping) and chain.get("family") in ("ip", "inet"):
            chains.append(chain)
        if isinstance(rule, Mapping) and (made := _nft_rule(rule)) is not None:
            rules.setdefault((str(rule.get("table")), str(rule.get("chain"))), []).append(made)
    return Firewall(
        program="nftables",
        chains=tuple(
            Chain(
                name=f"{chain.get('table')} {chain.get('name')}",
                rules=tuple(rules.get((str(chain.get("table")), str(chain.get("name"))), ())),
                policy=str(chain.get("policy", ACCEPT)) if "hook" in chain else None,
                is_input=chain.get("hook") == "input" and chain.get("type") == "filter",
            )
            for chain in chains
        ),
    )


def _nft_rule(entry: Mapping[str, object]) -> Rule | None:
    verdict, target, conditions = "", "", []
    expressions = entry.get("expr")
    for expression in expressions if isinstance(expressions, Sequence) else ():
        if not isinstance(expression, Mapping):
            continue
        for word, value in expression.items():
            if word in (ACCEPT, *BLOCKING, "return"):
                verdict = word
            elif word in ("jump", "goto") and isinstance(value, Mapping):
                verdict, target = "jump", f"{entry.get('table')} {value.get('target')}"
            elif word == "match" and isinstance(value, Mapping):
                conditions.append(_nft_condition(value))
            elif word not in ("counter", "log", "comment"):
                conditions.append(Rule(verdict="", is_conditional=True))
    return _combined(verdict, target, conditions) if verdict else None


def _nft_condition(match: Mapping[str, object]) -> Rule:
    left, right = match.get("left"), match.get("right")
    negated = match.get("op") == "!="
    if isinstance(left, Mapping) and not negated:
        payload, meta, connection = left.get("payload"), left.get("meta"), left.get("ct")
        if isinstance(payload, Mapping) and payload.get("field") == "dport":
            return Rule(verdict="", protocol=str(payload.get("protocol")), ports=_nft_ports(right))
        if isinstance(meta, Mapping) and meta.get("key") in ("iif", "iifname") and right == "lo":
            return Rule(verdict="", never_new=True)
        if isinstance(meta, Mapping) and meta.get("key") == "l4proto" and isinstance(right, str):
            return Rule(verdict="", protocol=right)
        if isinstance(connection, Mapping) and connection.get("key") == "state":
            states = right if isinstance(right, list) else [right]
            return Rule(verdict="", never_new="new" not in states)
    return Rule(verdict="", is_conditional=True)


def _nft_ports(right: object) -> tuple[tuple[int, int], ...]:
    if isinstance(right, int):
        return ((right, right),)
    if isinstance(right, Mapping):
        span = right.get("range")
        if isinstance(span, list) and len(span) == 2 and all(isinstance(p, int) for p in span):
            return ((span[0], span[1]),)
        members = right.get("set")
        if isinstance(members, list):
            return tuple(pair for member in members for pair in _nft_ports(member))
    return ()


def parse_iptables(text: str) -> Firewall:
    """The rules as `iptables -S` prints them."""
    policies: dict[str, str] = {}
    rules: dict[str, list[Rule]] = {}
    for line in text.splitlines():
        words = line.split()
        match words:
            case ["-P", name, policy]:
                policies[name] = policy.lower()
            case ["-N", name]:
                rules.setdefault(name, [])
            case ["-A", name, *rest]:
                made = _iptables_rule(rest)
                rules.setdefault(name, []).extend([made] if made is not None else [])
    names = dict.fromkeys([*policies, *rules])
    return Firewall(
        program="iptables",
        chains=tuple(
            Chain(
                name=name,
                rules=tuple(rules.get(name, ())),
                policy=policies.get(name),
                is_input=name == "INPUT",
            )
            for name in names
        ),
    )


def _iptables_rule(words: Sequence[str]) -> Rule | None:
    verdict, target = "", ""
    conditions: list[Rule] = []
    pending = list(words)
    while pending:
        word = pending.pop(0)
        value = pending.pop(0) if pending and not pending[0].startswith("-") else ""
        if word in ("-j", "-g"):
            known = value.lower() in (ACCEPT, *BLOCKING, "return")
            verdict, target = (value.lower(), "") if known else ("jump", value)
            pending = []  # what follows are options of the target
        elif word != "-m":
            conditions.append(_iptables_condition(word, value))
    return _combined(verdict, target, conditions) if verdict else None


def _iptables_condition(word: str, value: str) -> Rule:
    match word:
        case "-p":
            return Rule(verdict="", protocol=value)
        case "--dport" | "--dports" | "--destination-port":
            return Rule(verdict="", ports=_iptables_ports(value))
        case "-i" if value == "lo":
            return Rule(verdict="", never_new=True)
        case "--ctstate" | "--state":
            return Rule(verdict="", never_new="NEW" not in value.split(","))
    return Rule(verdict="", is_conditional=True)


def _iptables_ports(value: str) -> tuple[tuple[int, int], ...]:
    spans = []
    for part in value.split(","):
        low, _, high = part.partition(":")
        if low.isdigit() and (high.isdigit() or not high):
            spans.append((int(low), int(high or low)))
    return tuple(spans)


def _combined(verdict: str, target: str, conditions: Sequence[Rule]) -> Rule:
    ports = [each.ports for each in conditions if each.ports is not None]
    protocols = [each.protocol for each in conditions if each.protocol is not None]
    return Rule(
        verdict=verdict,
        target=target,
        protocol=protocols[-1] if protocols else None,
        ports=ports[-1] if ports else None,
        never_new=any(each.never_new for each in conditions),
        is_conditional=any(each.is_conditional for each in conditions),
    )
