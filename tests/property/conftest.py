"""Hypothesis as CONVENTIONS section 8 wants tests: the same examples every time, no clock."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("p2ptrain", deadline=None, derandomize=True)
settings.load_profile("p2ptrain")
