"""Identifiers: what names a device, a group, a run, a view, a plan, a bundle."""

from __future__ import annotations

import re
from typing import NewType

DeviceId = NewType("DeviceId", str)
"""base32(sha256(public key))[:26], lower case: a device is its key."""
GroupId = NewType("GroupId", str)
"""base32(sha256(root public key))[:16], lower case."""
RunId = NewType("RunId", str)
"""26 base32 characters, drawn at random by the home peer."""
Lineage = NewType("Lineage", int)
"""Counts forced views: 0 until somebody uses --force-view."""
ViewNumber = NewType("ViewNumber", int)
"""Number of a decided view within a run; the first is 1."""
Digest = NewType("Digest", str)
"""Lower-case hex sha256, 64 characters: of a plan, a bundle, a graph, a file."""

_BASE32 = re.compile(r"[a-z2-7]+\Z")
_HEX64 = re.compile(r"[0-9a-f]{64}\Z")


def is_base32(text: str, length: int) -> bool:
    """Whether `text` is exactly `length` lower-case base32 characters."""
    return len(text) == length and _BASE32.match(text) is not None


def is_digest(text: str) -> bool:
    """Whether `text` is a lower-case hex sha256."""
    return _HEX64.match(text) is not None


def short(identifier: str) -> str:
    """The first eight characters: enough for a person to tell devices or runs apart."""
    return identifier[:8]
