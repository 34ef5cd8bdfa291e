"""PROTOCOL.md names every message with all of its fields."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

import p2ptrain.agreement.messages
import p2ptrain.agreement.run_messages
import p2ptrain.membership.messages
import p2ptrain.training.messages
import p2ptrain.trust.gossip
from p2ptrain.wire.codec import registered

PAGE = Path(p2ptrain.__file__).parent / "wire" / "PROTOCOL.md"


def rows() -> dict[str, str]:
    section = PAGE.read_text(encoding="utf-8").split("## 4. Messages")[1].split("## 5.")[0]
    found = (re.match(r"\| `([a-z._]+)` \|(.*)", line) for line in section.splitlines())
    return {match[1]: match[2] for match in found if match and match[1] != "t"}


def names() -> list[str]:
    """The product's messages; other tests register some of their own."""
    return sorted(name for name in registered() if not name.startswith("test"))


def test_page_lists_exactly_the_registered_messages() -> None:
    assert sorted(rows()) == names()


@pytest.mark.parametrize("name", names())
def test_message_row_names_its_fields(name: str) -> None:
    row = rows()[name]
    fields = {field.name for field in dataclasses.fields(registered()[name])}
    named = set(re.findall(r"`([a-z_]+)`", row))
    if "the same" in row:
        named |= {"run", "lineage", "view", "plan"}
    assert fields <= named
