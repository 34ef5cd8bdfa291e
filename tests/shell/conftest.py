"""Groups minted on the spot, and peers linked over loopback. No scrypt, no waiting."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from p2ptrain.store.groups import Group, first_member, store_member
from p2ptrain.store.home import Home, open_home
from p2ptrain.trust import certificates as certs
from tests.counted_work import KNOWN_COSTS

MintGroup = Callable[..., list[Group]]


@pytest.fixture(scope="session", autouse=True)
def known_costs() -> Iterator[None]:
    """Members in memory need not count again what a segment takes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("p2ptrain.runtime.compute.known_profiles.profile_kinds", KNOWN_COSTS)
        yield


@pytest.fixture
def make_home(tmp_path: Path) -> Callable[[str], Home]:
    """Open a fresh home by name."""
    return lambda name: open_home(tmp_path / name)


@pytest.fixture
def mint_group(make_home: Callable[[str], Home]) -> MintGroup:
    """Make `count` members of one new group, sorted by device id, each in its own home."""
    made = 0

    def mint(count: int, *, now: float | None = None) -> list[Group]:
        nonlocal made
        made += 1
        at = time.time() if now is None else now
        fresh = certs.create_group(f"group-{made}", now=at)
        members = []
        for index in range(count):
            member = first_member(fresh, f"peer-{index}", now=at)
            member = dataclasses.replace(member, now_s=at)
            home = make_home(f"home-{made}-{index}")
            members.append(store_member(home, f"group-{made}", member))
        return sorted(members, key=lambda group: group.device)

    return mint
