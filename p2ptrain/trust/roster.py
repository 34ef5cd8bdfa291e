"""The certificates of every member that was ever heard of: whom to revoke, and who moved on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from p2ptrain import limits
from p2ptrain.ids import DeviceId
from p2ptrain.trust.chains import MemberChain


def chain_digest(chain: MemberChain) -> str:
    """Hex sha256 of a chain as it travels."""
    digest = hashlib.sha256()
    for der in chain.to_der():
        digest.update(len(der).to_bytes(4, "big") + der)
    return digest.hexdigest()


class Roster:
    """The newest chain of each device; at most ROSTER_MAX of them."""

    def __init__(self, chains: Iterable[MemberChain] = ()) -> None:
        self._chains: dict[DeviceId, MemberChain] = {}
        self._digests: dict[DeviceId, str] = {}
        for chain in chains:
            self.add(chain)

    def add(self, chain: MemberChain) -> bool:
        """Take a checked chain; False when one as new is known, or there are too many devices."""
        known = self._chains.get(chain.device)
        if known is None and len(self._chains) >= limits.ROSTER_MAX:
            return False
        if known is not None and _rank(known) >= _rank(chain):
            return False
        self._chains[chain.device] = chain
        self._digests[chain.device] = chain_digest(chain)
        return True

    def get(self, device: DeviceId) -> MemberChain | None:
        """The newest chain of a device."""
        return self._chains.get(device)

    @property
    def chains(self) -> tuple[MemberChain, ...]:
        """By device id."""
        return tuple(chain for _, chain in sorted(self._chains.items()))

    @property
    def digests(self) -> dict[str, str]:
        """Device id -> hash of its newest chain."""
        return dict(sorted(self._digests.items()))

    def below(self, chain: MemberChain) -> tuple[MemberChain, ...]:
        """Members whose chains stand on an issuer key that this one's device holds itself."""
        if not chain.may_admit:
            return ()
        key = chain.keys[1]
        return tuple(c for c in self.chains if c.device != chain.device and key in c.keys)


def _rank(chain: MemberChain) -> tuple[int, tuple[float, ...], str]:
    """Total order that every peer agrees on: by root, then by age, equal ages by hash.

    Dates have whole seconds and come from many clocks, so that they alone would have a member that
    moved below a new root look as if it had not, and the old root trusted for its sake.
    """
    return (chain.generation, chain.age_key, chain_digest(chain))
